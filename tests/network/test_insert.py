from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.network import insert
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity


def weight_quantizer(weight: Tensor, bit_width: int = 3) -> UniformQuantizer:
    quantizer = UniformQuantizer(bit_width, signed=True, symmetric=True, granularity=Granularity.channel(0))
    quantizer.initialize(weight)
    return quantizer


def activation_quantizer() -> UniformQuantizer:
    quantizer = UniformQuantizer(4, signed=False, symmetric=False)
    quantizer.initialize(torch.linspace(-1, 2, 10))
    return quantizer


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    for layer in (net[0], net[2]):
        insert.set_weight_quantizer(layer, weight_quantizer(layer.weight.detach()))
    insert.set_input_quantizer(net[2], activation_quantizer())
    return net.eval()


X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3))


def test_the_layer_computes_with_quantized_weights(model: nn.Sequential) -> None:
    first = model[0]
    expected = F.conv2d(X, insert.weight_quantizer(first)(insert.float_weight(first)), first.bias)  # type: ignore[misc]
    assert torch.equal(first(X), expected)
    assert first.weight[0].unique().numel() <= 8


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(model: nn.Sequential, clone: object) -> None:
    twin = clone(model)  # type: ignore[operator]
    assert torch.equal(twin(X), model(X))
    before = model(X)
    with torch.no_grad():
        insert.float_weight(twin[0]).mul_(-1)
        twin[2].input_quantizer.scale.mul_(3)
    assert torch.equal(model(X), before) and not torch.equal(twin(X), before)


def test_state_dict_round_trip(model: nn.Sequential) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_baking_changes_nothing_and_leaves_the_original_alone(model: nn.Sequential) -> None:
    expected = model(X)
    baked, codes = insert.bake_weights(model)
    assert torch.equal(baked(X), expected) and torch.equal(model(X), expected)
    assert type(baked[0]) is nn.Conv2d and set(codes) == {"0.weight", "2.weight"}
    assert torch.equal(codes["2.weight"].decode(), baked[2].weight)


def test_switching_quantizers_off_gives_the_float_network(model: nn.Sequential) -> None:
    with insert.quantization_enabled(model, weights=False, activations=False):
        hidden = F.relu(F.conv2d(X, insert.float_weight(model[0]), model[0].bias))
        assert torch.equal(model(X), F.conv2d(hidden, insert.float_weight(model[2])))
    assert set(insert.activation_quantizers(model)) == {"2.input"}


def test_a_quantizer_of_no_bits_stays_off_where_others_are_enabled(model: nn.Sequential) -> None:
    insert.weight_quantizer(model[0]).set_bit_width(None)  # type: ignore[union-attr]
    with insert.quantization_enabled(model, weights=True, activations=True):
        assert torch.equal(model[0].weight, insert.float_weight(model[0]))
    with insert.quantization_enabled(model, weights=False, activations=False):
        pass
    assert torch.equal(model[0].weight, insert.float_weight(model[0])) and model[2].weight[0].unique().numel() <= 8


@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "export", "compile"])
def test_copies_and_graphs_know_what_is_off(model: nn.Sequential, clone: str) -> None:
    torch.compiler.reset()
    on = model(X)
    insert.weight_quantizer(model[0]).set_bit_width(None)  # type: ignore[union-attr]
    insert.input_quantizer(model[2]).set_bit_width(None)  # type: ignore[union-attr]
    expected = F.conv2d(F.relu(F.conv2d(X, insert.float_weight(model[0]), model[0].bias)), model[2].weight)
    torch.testing.assert_close(CLONES[clone](model)(X), expected)
    assert not torch.allclose(expected, on)


def test_baking_leaves_a_weight_without_bits_in_float(model: nn.Sequential) -> None:
    insert.weight_quantizer(model[0]).set_bit_width(None)  # type: ignore[union-attr]
    baked, codes = insert.bake_weights(model)
    assert set(codes) == {"2.weight"} and torch.equal(baked[0].weight, insert.float_weight(model[0]))
    assert torch.equal(baked(X), model(X))


def test_an_output_transform_goes_with_the_input_quantizer(model: nn.Sequential) -> None:
    last, hidden = model[2], F.relu(model[0](X))
    insert.set_output_transform(last, TimesMean())
    insert.input_quantizer(last).set_bit_width(None)  # type: ignore[union-attr]
    assert torch.equal(last(hidden), F.conv2d(hidden, last.weight))


def test_functional_use_of_a_weight_sees_the_quantized_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.encode(x), self.encode.weight.t())

    net = Tied()
    insert.set_weight_quantizer(net.encode, weight_quantizer(net.encode.weight.detach(), 2))
    x = torch.randn(1, 6)
    quantized = net.encode.weight.detach()
    assert quantized.unique().numel() <= 4 * 3
    torch.testing.assert_close(net(x), F.linear(F.linear(x, quantized, net.encode.bias), quantized.t()))


def test_one_quantizer_at_two_sites_is_listed_once() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    shared = activation_quantizer()
    insert.set_input_quantizer(net[0], shared)
    insert.set_input_quantizer(net[1], shared)
    assert list(insert.activation_quantizers(net)) == ["0.input"]


def test_replacing_a_quantizer_does_not_stack(model: nn.Sequential) -> None:
    insert.set_weight_quantizer(model[0], weight_quantizer(insert.float_weight(model[0]).detach(), 8))
    assert insert.weight_quantizer(model[0]).bit_width == 8  # type: ignore[union-attr]
    assert model[0].weight.unique().numel() > 8 * 4


def test_gradients_reach_the_float_weight(model: nn.Sequential) -> None:
    model.train()
    model(X).square().mean().backward()
    gradient = insert.float_weight(model[0]).grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_a_module_without_weight_is_refused() -> None:
    with pytest.raises(LayerError, match="ReLU has no weight"):
        insert.set_weight_quantizer(nn.ReLU(), weight_quantizer(torch.ones(2, 2)))


class TimesMean(nn.Module):
    """Multiplies the output by the mean of the raw input's magnitude."""

    def __init__(self, *, before_bias: bool = False) -> None:
        super().__init__()
        self.before_bias = before_bias
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        return output * x.abs().mean() * self.factor


CLONES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "export": lambda m: torch.export.export(m, (X,)).module(),
    "compile": lambda m: torch.compile(m, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("clone", CLONES)
def test_an_output_transform_sees_the_raw_input_and_the_quantized_layers_output(model: nn.Sequential, clone: str) -> None:
    first, last = model[0], model[2]
    hidden = F.relu(first(X))
    expected = last(hidden) * hidden.abs().mean() * 2
    insert.set_output_transform(last, TimesMean())
    assert not torch.equal(insert.input_quantizer(last)(hidden).abs().mean(), hidden.abs().mean())  # type: ignore[misc]
    torch.testing.assert_close(CLONES[clone](model)(X), expected)
    assert insert.output_transform(last) is last.output_transform and insert.output_transform(first) is None


def test_an_output_transform_works_without_input_quantizer_and_comes_before_the_output_quantizer(model: nn.Sequential) -> None:
    first = model[0]
    quantizer = activation_quantizer()
    expected = quantizer(first(X) * X.abs().mean() * 2)
    insert.set_output_quantizer(first, quantizer)
    insert.set_output_transform(first, TimesMean())
    torch.testing.assert_close(first(X), expected)


def test_an_output_transform_before_the_bias_leaves_the_bias_alone(model: nn.Sequential) -> None:
    first = model[0]
    expected = F.conv2d(X, first.weight) * X.abs().mean() * 2 + first.bias[:, None, None]
    insert.set_output_transform(first, TimesMean(before_bias=True))
    torch.testing.assert_close(first(X), expected)
    linear, x = nn.Linear(3, 4), torch.randn(2, 5, 3)
    expected = F.linear(x, linear.weight) * x.abs().mean() * 2 + linear.bias
    insert.set_output_transform(linear, TimesMean(before_bias=True))
    torch.testing.assert_close(linear(x), expected)


def test_an_output_transform_is_bypassed_with_the_activation_quantizers_and_can_be_replaced(model: nn.Sequential) -> None:
    with insert.quantization_enabled(model, weights=True, activations=False):
        expected = model(X)
    for layer in (model[0], model[2]):
        insert.set_output_transform(layer, TimesMean())
    with insert.quantization_enabled(model, weights=True, activations=False):
        assert torch.equal(model(X), expected)
    once = model[0](X)
    insert.set_output_transform(model[0], TimesMean())
    assert torch.equal(model[0](X), once)


def test_a_layer_used_twice_transforms_each_call_by_its_own_input() -> None:
    layer = nn.Linear(2, 2, bias=False)
    insert.set_input_quantizer(layer, activation_quantizer())
    plain = [layer(x) * x.abs().mean() * 2 for x in (torch.ones(1, 2), torch.full((1, 2), 0.3))]
    insert.set_output_transform(layer, TimesMean())
    torch.testing.assert_close([layer(torch.ones(1, 2)), layer(torch.full((1, 2), 0.3))], plain)


@pytest.mark.parametrize("clone", CLONES)
def test_an_input_transform_comes_before_the_quantizer_and_feeds_the_output_transform(model: nn.Sequential, clone: str) -> None:
    last = model[2]
    hidden = F.relu(model[0](X)) - 0.5
    expected = last(hidden) * hidden.abs().mean() * 2
    insert.set_input_transform(last, Shift())
    insert.set_output_transform(last, TimesMean())
    torch.testing.assert_close(CLONES[clone](model)(X), expected)
    with insert.quantization_enabled(model, weights=True, activations=False):
        assert torch.equal(last(hidden + 0.5), F.conv2d(hidden, last.weight))
    assert insert.input_transform(last) is last.input_transform and insert.input_transform(model[0]) is None


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


# Biases that go with the scale of the weight


class Doubling(UniformQuantizer):
    """Its levels hold a factor of the layer's whole output."""

    def scale_bias(self, bias: Tensor) -> Tensor:
        return 2 * bias


def doubled() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 3))
    for layer in (net[0], net[2], net[4]):
        quantizer = Doubling(4, signed=True, symmetric=True)
        quantizer.initialize(layer.weight.detach())
        insert.set_input_quantizer(layer, activation_quantizer())
        insert.set_weight_quantizer(layer, quantizer)
    return net.eval()


def test_the_bias_follows_a_weight_quantizer_that_scales_the_output() -> None:
    net = doubled()
    for layer in (net[0], net[4]):
        bias = insert.float_bias(layer)
        assert isinstance(bias, nn.Parameter)
        assert torch.equal(layer.bias, 2 * bias) and any(bias is p for p in net.parameters())
    assert net[2].bias is None and insert.float_bias(net[2]) is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_scaled_biases_and_the_order_of_parameters(clone: object) -> None:
    net = doubled()
    twin = clone(net)  # type: ignore[operator]
    assert torch.equal(twin(X), net(X))
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert list(twin.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        insert.float_bias(twin[0]).fill_(7.0)
    assert twin[0].bias[0].item() == 14.0 != net[0].bias[0].item()


def test_baking_gives_an_ordinary_scaled_bias() -> None:
    net = doubled()
    baked, _ = insert.bake_weights(net)
    assert type(baked[0]) is nn.Conv2d and isinstance(baked[0].bias, nn.Parameter)
    assert torch.equal(baked[0].bias, net[0].bias) and torch.equal(baked(X), net(X))
    assert [name for name, _ in baked[0].named_parameters()] == ["weight", "bias"]


def test_the_bias_is_the_float_one_where_weight_quantizers_are_passed_by() -> None:
    net = doubled()
    with insert.quantization_enabled(net, weights=False, activations=True):
        assert torch.equal(net[0].bias, insert.float_bias(net[0]))  # type: ignore[arg-type]
    assert torch.equal(net[0].bias, 2 * insert.float_bias(net[0]))  # type: ignore[operator]
    insert.weight_quantizer(net[0]).set_bit_width(None)  # type: ignore[union-attr]
    assert torch.equal(net[0].bias, insert.float_bias(net[0]))  # type: ignore[arg-type]


def test_another_quantizer_gives_the_bias_back() -> None:
    net = doubled()
    insert.set_weight_quantizer(net[0], weight_quantizer(insert.float_weight(net[0]).detach()))
    assert torch.equal(net[0].bias, insert.float_bias(net[0]))  # type: ignore[arg-type]
    assert torch.equal(pickle.loads(pickle.dumps(net))(X), net(X))


def test_float_biases_train_through_their_scale() -> None:
    net = doubled()
    net(X).sum().backward()
    bias = insert.float_bias(net[4])
    assert bias is not None and bias.grad is not None and bias.grad.tolist() == [4.0] * 3  # two samples

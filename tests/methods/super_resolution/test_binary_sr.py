"""Binary super-resolution: numbers worked out by hand, and what its card says to check."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.super_resolution.binary_sr import BamBlocks, BamWeight, accumulate, chain
from lowbit.models.bsrn import Bsrn
from lowbit.models.srresnet import SrResNet
from lowbit.models.vdsr import Vdsr
from lowbit.network import insert
from lowbit.spec import Granularity


def drawn(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(*earlier: Tensor, alpha: str = "ones") -> BamWeight:
    made = BamWeight(granularity=Granularity.channel(), alpha=alpha)  # type: ignore[arg-type]
    made.earlier = earlier
    return made


def test_alone_a_weight_is_the_sign_of_its_distance_from_the_mean() -> None:
    w = torch.tensor([[1.0, 2.0, 6.0], [-1.0, -1.0, 5.0]])
    torch.testing.assert_close(quantizer()(w), torch.tensor([[-3.0, -3.0, 3.0], [-7 / 3, -7 / 3, 7 / 3]]))


def test_signs_are_those_of_the_accumulated_weight_and_the_scale_is_its_own() -> None:
    first, second = torch.tensor([[9.0, -9.0, 0.0]]), torch.tensor([[-1.0, 2.0, 3.0]])  # together 8, -7, 3 with the mean 4 / 3
    torch.testing.assert_close(quantizer(first)(second), torch.tensor([[2.0, -2.0, 2.0]]))


def test_neither_a_common_factor_nor_a_constant_of_a_channel_changes_signs() -> None:
    first, second = drawn(4, 3, 3, 3), drawn(4, 3, 3, 3, seed=5)
    plain, scaled, shifted = quantizer(first), quantizer(first), quantizer(first + torch.arange(4.0).reshape(4, 1, 1, 1))
    scaled.coefficients = torch.tensor([2.5, 2.5])
    assert torch.equal(plain(second), scaled(second))
    assert torch.equal(plain(second), shifted(second))


@pytest.mark.parametrize("seed", range(5))
def test_searched_coefficients_are_never_worse_than_the_weight_alone(seed: int) -> None:
    *earlier, own = drawn(3, 4, 2, 3, 3, seed=seed).unbind(0)
    used = quantizer(*earlier, alpha="search")
    alpha = used.search(own)
    assert alpha[-1] == 1
    assert used.error(own, alpha) <= used.error(own, torch.tensor([0.0, 0.0, 1.0]))


def test_earlier_weights_change_the_forward_pass_and_get_no_gradient() -> None:
    first, second = drawn(4, 3, 3, 3).requires_grad_(), drawn(4, 3, 3, 3, seed=5).requires_grad_()
    used, grad = quantizer(first), drawn(4, 3, 3, 3, seed=6)
    before = used(second)
    before.backward(grad)
    assert torch.equal(second.grad, grad)  # type: ignore[arg-type]
    assert first.grad is None
    with torch.no_grad():
        first.mul_(-1)
    assert not torch.equal(used(second), before)


def test_activations_are_weighed_by_their_mean_over_channels() -> None:
    a = torch.tensor([[[1.0], [-3.0]]])  # mean -1, of magnitudes 2
    assert accumulate([a], torch.tensor([0.5])).flatten().tolist() == [-0.5, 1.5]
    assert accumulate([a], torch.tensor([0.5]), absolute=True).flatten().tolist() == [1.0, -3.0]
    assert accumulate([a, 2 * a], torch.tensor([1.0, 1.0])).flatten().tolist() == [-5.0, 15.0]


def picture(side: int = 8) -> Tensor:
    return 255 * torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def prepared(network: nn.Module, **options: object) -> nn.Module:
    return lowbit.prepare(network.eval(), method="binary_sr", weight_bits=1, activation_bits=1, policy="paper", sample=picture(), **options)


def earlier_of(model: nn.Module) -> dict[str, int]:
    """How many weights each layer accumulates besides its own."""
    found = {name: site.quantizer for name, site in insert.quantized_weights(model).items()}
    return {name: len(used.earlier) for name, used in found.items() if isinstance(used, BamWeight)}


def test_blocks_of_the_three_networks_accumulate_as_the_paper_has_it() -> None:
    torch.manual_seed(0)
    assert earlier_of(prepared(SrResNet(2, 2, 4, "relu"))) == {
        "blocks.0.conv1": 0, "blocks.0.conv2": 1, "blocks.1.conv1": 0, "blocks.1.conv2": 1,
    }  # fmt: skip
    assert earlier_of(prepared(Vdsr(2, 7, 4))) == {"body.0": 0, "body.2": 1, "body.4": 2, "body.6": 0, "body.8": 1}
    local = {"spatial": 0, "pointwise1": 0, "pointwise2": 1}
    expected = {f"blocks.0.{place}.{name}": count for place in (0, 1) for name, count in local.items()} | {"blocks.0.1.spatial": 1}
    assert earlier_of(prepared(Bsrn(2, 1, 4))) == expected


def test_norms_before_signs_take_the_place_of_those_in_a_block() -> None:
    torch.manual_seed(0)
    network = SrResNet(2, 2, 4, "relu")
    model = prepared(network)
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("scales"))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in network.parameters()) + scales
    assert scales == 2 * 2


def test_inputs_of_binary_layers_are_signs_and_outputs_differ_from_place_to_place() -> None:
    torch.manual_seed(0)
    model, seen = prepared(SrResNet(2, 1, 4, "relu")), []
    for name in ("blocks.0.conv1", "blocks.0.conv2"):
        used = insert.input_quantizer(model.get_submodule(name))
        assert used is not None
        used.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    with torch.no_grad():
        model(picture())
    for signs in seen:
        assert signs.unique().tolist() == [-1.0, 1.0]


def test_copies_accumulate_their_own_weights() -> None:
    torch.manual_seed(0)
    model = prepared(Vdsr(2, 5, 4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        used = insert.weight_quantizer(twin.get_submodule("body.2"))
        assert isinstance(used, BamWeight)
        assert used.earlier[0] is insert.float_weight(twin.get_submodule("body.0"))


def test_without_accumulation_every_layer_stands_alone() -> None:
    torch.manual_seed(0)
    assert set(earlier_of(prepared(SrResNet(2, 2, 4, "relu"), accumulation=False)).values()) == {0}


def test_a_network_without_blocks_is_binary_layer_by_layer_or_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    assert earlier_of(prepared(network)) == {"2": 0}
    with pytest.raises(SpecError, match="no blocks"):
        prepared(network, layers="blocks")


def test_the_output_of_a_block_is_its_last_layers_and_the_shortcut_is_added() -> None:
    layer = nn.Conv2d(2, 2, 1)
    nn.init.zeros_(layer.weight)
    x = drawn(1, 2, 3, 3)
    assert torch.equal(BamBlocks([chain(["a"])], {"a": layer}, residual=True).eval()(x), x)
    assert layer.bias is None


def test_binary_layers_run_on_binary_kernels_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model = prepared(SrResNet(2, 2, 64, "relu")).eval()
    compiled = lowbit.compile_runtime(model, sample=picture())
    assert str(compiled.report).count("binary with batch norm before") == 4
    with torch.no_grad():
        torch.testing.assert_close(compiled(picture()), model(picture()), rtol=1e-3, atol=0.05)

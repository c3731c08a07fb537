from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import lowbit
from lowbit.errors import DataError, LayerError, UnknownNameError
from lowbit.measure.hessian import Hessian
from lowbit.measure.loss_surface import LossSurface
from lowbit.network.insert import quantized_weights
from lowbit.network.taps import Tap

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def squares(output: Tensor, _batch: object) -> Tensor:
    return output.square().mean()


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(middle, nn.Linear(3, 2)))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return]


def test_a_layer_that_differentiates_once_is_named() -> None:
    hessian = Hessian(LossSurface(network(Squares()), [X], squares), {"first": ["0.weight"]})
    with pytest.raises(LayerError, match=r"layer '1\.0' \(Squares\) cannot be differentiated twice"):
        hessian.product([torch.ones(3, 4)])


def test_what_the_network_calls_itself_is_said_to_be_the_cause() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.layer(x))  # type: ignore[no-any-return]

    with pytest.raises(LayerError, match="what the network calls itself cannot be differentiated twice"):
        Hessian(LossSurface(Own(), [X], squares), {"first": ["layer.weight"]}).product([torch.ones(3, 4)])


def test_attention_is_differentiated_twice() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    x, model = torch.randn(3, 5, 4), Attention().double()
    vector = torch.randn(12, 4, dtype=torch.float64)
    (product,) = Hessian(LossSurface(model, [x.double()], squares), {"a": ["attention.in_proj_weight"]}).product([vector])
    step, gradients = 1e-5, []
    for sign in (-1, 1):
        weight = (model.attention.in_proj_weight.detach() + sign * step * vector).requires_grad_()
        output = torch.func.functional_call(model, {"attention.in_proj_weight": weight}, x.double())
        gradients.append(torch.autograd.grad(squares(output, None), weight)[0])
    torch.testing.assert_close(product, (gradients[1] - gradients[0]) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.MaxPool1d(1), nn.GELU(), nn.LayerNorm(3), nn.Hardswish()])
def test_usual_layers_are_differentiated_twice(layer: nn.Module) -> None:
    model = network(layer).double()
    hessian = Hessian(LossSurface(model, [X.double()], squares), {"first": ["0.weight"]})
    vector, step = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 1e-6
    gradients = []
    for sign in (-1, 1):
        weight = (model[0].weight.detach() + sign * step * vector).requires_grad_()
        output = torch.func.functional_call(model, {"0.weight": weight}, X.double())
        gradients.append(torch.autograd.grad(squares(output, None), weight)[0])
    torch.testing.assert_close(hessian.product([vector])[0], (gradients[1] - gradients[0]) / (2 * step), rtol=1e-4, atol=1e-7)


def test_a_shared_parameter_is_differentiated_in_all_its_uses() -> None:
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second).double()
    found = [
        Hessian(LossSurface(model, [X.double()], squares), {"w": [name]}).product([torch.eye(4).double()])[0]
        for name in ("0.weight", "1.weight")
    ]
    assert torch.equal(*found)
    step, gradients = 1e-6, []
    for sign in (-1, 1):
        weight = (first.weight.detach() + sign * step * torch.eye(4)).requires_grad_()
        gradients.append(torch.autograd.grad(squares(X.double() @ weight.T @ weight.T, None), weight)[0])
    torch.testing.assert_close(found[0], (gradients[1] - gradients[0]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_a_module_that_is_called_twice_has_the_activations_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(2 * self.act(x))  # type: ignore[no-any-return]

    model = Twice()
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    flat = LossSurface(model, [X], squares)
    sizes = [Hessian(flat, {"a": [tap]}).elements()["a"] for tap in (Tap("act"), Tap("act", call=0), Tap("act", call=1))]
    assert sizes == [8, 4, 4]
    last = Hessian(flat, {"a": [Tap("act", call=1)]}).product([torch.ones(6, 4)])[0]
    torch.testing.assert_close(last, torch.full((6, 4), 2 / 24))
    with pytest.raises(LayerError, match="'act' is not called 3 times"):
        Hessian(flat, {"a": [Tap("act", call=2)]}).elements()


def test_a_quantized_network_is_refused_and_one_with_quantizers_off_is_not() -> None:
    quantized = lowbit.quantize(network(nn.ReLU()), method="round_to_nearest", calibration=X)
    with pytest.raises(LayerError, match="rounding has no curvature"):
        LossSurface(quantized, [X], squares)
    for module in quantized.modules():
        if hasattr(module, "enabled"):
            module.enabled = False  # type: ignore[assignment]
    path = next(name for name, parameter in quantized.named_parameters() if parameter is quantized_weights(quantized)["0"].original)
    vector = torch.ones(3, 4)
    found = Hessian(LossSurface(quantized, [X], squares), {"first": [path]}).product([vector])[0]
    plain = Hessian(LossSurface(network(nn.ReLU()), [X], squares), {"first": ["0.weight"]}).product([vector])[0]
    torch.testing.assert_close(found, plain)


def test_compiled_networks_are_unwrapped() -> None:
    model = network(nn.ReLU())
    found = Hessian(LossSurface(torch.compile(model), [X], squares), {"first": ["0.weight"]}).product([torch.ones(3, 4)])[0]  # type: ignore[arg-type]
    assert torch.equal(found, Hessian(LossSurface(model, [X], squares), {"first": ["0.weight"]}).product([torch.ones(3, 4)])[0])


def test_batches_are_taken_until_there_are_enough_samples() -> None:
    flat = LossSurface(network(nn.ReLU()), iter([X, X, X]), squares, samples=7)
    assert (len(flat.batches), flat.samples) == (2, 12)


def test_errors_say_what_is_wrong() -> None:
    model = network(nn.ReLU())
    with pytest.raises(DataError, match="the data hold none"):
        LossSurface(model, [], squares)
    with pytest.raises(DataError, match="batch 1: the loss is nan"):
        Hessian(LossSurface(model, [X, X * float("nan")], squares), {"a": ["0.weight"]}).product([torch.ones(3, 4)])
    with pytest.raises(UnknownNameError, match=r"unknown parameter '0.weigth'. Did you mean '0.weight'"):
        Hessian(LossSurface(model, [X], squares), {"a": ["0.weigth"]}).elements()
    with pytest.raises(UnknownNameError, match="unknown module 'relu'"):
        Hessian(LossSurface(model, [X], squares), {"a": [Tap("relu")]}).elements()
    with pytest.raises(LayerError, match="the loss has no gradient"):
        Hessian(LossSurface(model, [X], lambda output, batch: output.detach().sum()), {"a": ["0.weight"]}).elements()

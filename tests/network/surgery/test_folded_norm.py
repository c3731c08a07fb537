from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lowbit.network.graph.dataflow import capture
from lowbit.network.surgery.folded_norm import FoldedNorm, see_batches, take_norms

X = torch.randn(6, 4, 7, 7, generator=torch.Generator().manual_seed(0))


class Folding(nn.Module):
    """A layer that computes with the weight and the bias of itself and its norm, as the quantizers of weights make it do."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, folded: FoldedNorm) -> None:
        super().__init__()
        self.layer, self.folded = layer, folded

    def forward(self, x: Tensor) -> Tensor:
        if self.folded.uses_batch:
            self.folded.see(self.layer(x))
        weight, bias = self.folded.weight(self.layer.weight), self.folded.bias(self.layer.bias)
        y: Tensor = torch.func.functional_call(self.layer, {"weight": weight, "bias": bias}, (x,))
        self.folded.forget()
        return y


def pair(layer: nn.Module, *, affine: bool = True) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(layer, nn.BatchNorm2d(6, affine=affine), nn.ReLU())
        norm = model[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if affine:
            norm.weight.data.uniform_(-1, 2)
            norm.bias.data.normal_()
    return model


def folding(model: nn.Sequential) -> Folding:
    model = copy.deepcopy(model)
    return Folding(model[0], take_norms(model, capture(model, X), ["0"])["0"])


LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "with bias": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_norm_computes_learns_and_keeps_statistics_as_the_norm_does(kind: str, affine: bool) -> None:
    model = pair(LAYERS[kind](), affine=affine)
    twin = folding(model)
    for training in (True, True, False):
        model.train(training)
        twin.train(training)
        model.zero_grad()
        twin.zero_grad()
        expected, got = model[1](model[0](X)), twin(X)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        expected.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(twin.layer.weight.grad, model[0].weight.grad, rtol=1e-3, atol=1e-2)
        for mine, own in zip(twin.folded.norm.parameters(), model[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, own.grad, rtol=1e-3, atol=1e-2)
    assert torch.equal(twin.folded.norm.running_mean, model[1].running_mean)
    assert torch.equal(twin.folded.norm.running_var, model[1].running_var)
    assert twin.folded.norm.num_batches_tracked.item() == 2


def test_a_frozen_norm_uses_the_moving_statistics_in_training_and_leaves_them() -> None:
    model = pair(LAYERS["plain"]())
    twin = folding(model).eval()
    expected, before = twin(X), twin.folded.norm.running_mean.clone()
    twin.train()
    assert not torch.allclose(twin(X), expected)
    twin = folding(model).train()
    twin.folded.is_frozen = True
    assert torch.equal(twin(X), expected) and torch.equal(twin.folded.norm.running_mean, before)
    twin.folded.is_frozen = False
    twin.folded.norm.eval()  # the user froze it
    assert torch.equal(twin(X), expected) and not twin.folded.uses_batch


def test_norms_are_taken_out_of_the_layers_asked_for_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    dataflow = capture(model, X)
    norm = model[4].requires_grad_(False)
    assert list(take_norms(model, dataflow, ["0"])) == ["0"]
    assert isinstance(model[1], nn.Identity) and model[4] is norm
    assert model[0].bias is not None and model[0].bias.tolist() == [0] * 6
    taken = take_norms(model, dataflow, ["3"])["3"]
    assert isinstance(model[4], nn.Identity) and not any(p.requires_grad for p in taken.parameters())


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_norm_that_does_more_than_normalize_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Doubling(6)).eval()
    assert take_norms(model, capture(model, X), ["0"]) == {} and isinstance(model[1], Doubling)


def test_hooks_show_the_layer_alone_and_are_copied_with_it() -> None:
    model = pair(LAYERS["with bias"]()).train()
    layer, expected = model[0], model[0](X)
    folded = take_norms(model, capture(model, X), ["0"])["0"].train()
    holder = nn.ModuleDict({"layer": layer, "folded": folded})
    see_batches(layer, folded)
    for twin in (holder, copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        seen: list[Tensor] = []
        twin["folded"].norm.register_forward_pre_hook(lambda _norm, args, seen=seen: seen.append(args[0]))
        assert torch.equal(twin["layer"](X), expected)
        assert len(seen) == 1 and torch.equal(seen[0], expected)
        assert not twin["folded"].is_passing
        twin.eval()
        twin["layer"](X)
        assert len(seen) == 1

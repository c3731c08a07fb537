"""Layers called by keyword are quantized as those called by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.measure.diagnose import diagnose
from lowbit.network.calls import input_of, input_place, with_input
from lowbit.network.insert import activation_quantizers
from lowbit.network.taps import tapped

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (8, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (8, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (8, 4, 4, 4, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (8, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (8, 4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 6), (8, 3, 4)),
}


class Calls(nn.Module):
    """A layer, a norm and a second layer, called by keyword or by position."""

    def __init__(self, first: nn.Module, second: nn.Module, by_keyword: bool) -> None:
        super().__init__()
        self.first, self.act, self.second = first, nn.ReLU(), second
        self.by_keyword = by_keyword

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_keyword:
            return self.second(self.act(self.first(x)).flatten(1))  # type: ignore[no-any-return]
        x = self.act(input=self.first(input=x))
        return self.second(input=x.flatten(1))  # type: ignore[no-any-return]


def _pair(kind: str) -> tuple[Calls, Calls, Tensor]:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    x, first = torch.randn(shape), make()
    second = nn.Linear(first(x).flatten(1).shape[1], 3)
    return Calls(first, second, True).eval(), Calls(first, second, False).eval(), x


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["round_to_nearest", "lsq"])
def test_a_call_by_keyword_is_quantized_as_one_by_position(kind: str, method: str) -> None:
    named, plain, x = _pair(kind)
    if method == "lsq":
        a, b = (lowbit.prepare(net, method="lsq", weight_bits=3, activation_bits=4, sample=x) for net in (named, plain))
        a.eval(), b.eval()
    else:
        a, b = (lowbit.quantize(net, method=method, weight_bits=3, activation_bits=4, calibration=[x]) for net in (named, plain))
    assert torch.equal(a(x), b(x))
    assert not torch.equal(a(x), named(x))


@pytest.mark.parametrize("method", ["pact", "xnor_net", "dfq"])
def test_methods_that_read_inputs_and_outputs_take_keywords(method: str) -> None:
    named, plain, x = _pair("conv2d")
    settings: dict[str, Any] = (
        {"weight_bits": 1, "activation_bits": 1} if method == "xnor_net" else {"weight_bits": 4, "activation_bits": 8}
    )
    if lowbit.get_method(method).kind == "training":
        a, b = (lowbit.prepare(net, method=method, sample=x, **settings).eval() for net in (named, plain))
    else:
        a, b = (lowbit.quantize(net, method=method, calibration=[x], **settings) for net in (named, plain))
    assert torch.equal(a(x), b(x))


def test_embeddings_recurrent_layers_and_attention_take_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(9, 8), nn.LSTM(8, 8, batch_first=True)
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x, _ = self.lstm(input=self.embedding(input=ids))
            y, _ = self.attention(query=x, key=x, value=x)
            return self.head(input=y)  # type: ignore[no-any-return]

    ids = torch.arange(18).reshape(3, 6) % 9
    quantized = lowbit.quantize(Net().eval(), method="round_to_nearest", weight_bits=4, activation_bits=8, calibration=[ids])
    assert quantized.head.input_quantizer.bit_width == 8  # type: ignore[union-attr]
    bits = {layer.name: layer.weight_bits for layer in lowbit.summary(quantized).layers}
    assert bits["lstm.weight_ih_l0"] == bits["attention.in_proj_weight"] == 4


def test_a_diagnosis_names_who_reads_what_is_given_by_keyword() -> None:
    named, plain, x = _pair("conv2d")
    found = [
        diagnose(lowbit.quantize(net, method="round_to_nearest", weight_bits=4, activation_bits=4, calibration=[x]), calibration=[x])
        for net in (named, plain)
    ]
    assert found[0].suspects == found[1].suspects


def test_taps_read_keywords() -> None:
    named, _, x = _pair("conv2d")
    with tapped(named, ["first"], side="input") as features:
        named(x)
    assert torch.equal(features["first"], x)


def test_the_first_floating_point_tensor_is_the_input() -> None:
    x, ids, other = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.zeros(2)
    assert input_place((ids, x), {"mask": other}) == 1
    assert input_of((), {"ids": ids, "x": x}) is x
    assert with_input((ids,), {"x": x, "y": other}, 7) == ((ids,), {"x": 7, "y": other})
    assert with_input((3,), {}, 7) == ((3,), {})


def test_a_tensor_given_by_keyword_is_quantized_once_where_it_is_made() -> None:
    named, plain, x = _pair("conv2d")
    tables = [lowbit.quantize(net, method="white_paper", weight_bits=8, activation_bits=8, calibration=[x]) for net in (named, plain)]
    assert list(activation_quantizers(tables[0])) == list(activation_quantizers(tables[1]))

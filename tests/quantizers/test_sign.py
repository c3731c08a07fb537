from __future__ import annotations

import pytest
import torch
from tests.runtime.binary_cases import sign_layer
from torch import nn

from lowbit.quantizers import ScaledSignQuantizer, SignQuantizer
from lowbit.quantizers.codebook import nearest_level
from lowbit.quantizers.ops import mark_codebook
from lowbit.quantizers.qtensor import BinaryDecoder
from lowbit.runtime.arguments import Epilogue
from lowbit.runtime.layers.binary import binary_linear
from lowbit.spec import Granularity
from lowbit.surrogates import make_surrogate

X = torch.tensor([-2.0, -1.0, -(2.0**-149), -0.0, 0.0, 2.0**-149, 0.5, 1.0, 3.0])
SIGNS = [-1, -1, -1, 1, 1, 1, 1, 1, 1]


def test_signs_are_exact_and_zero_is_positive_in_codes_and_in_the_exported_operator() -> None:
    q = SignQuantizer()
    assert q(X).tolist() == SIGNS
    assert torch.equal(q.encode(X).decode(), q(X))
    assert q.encode(X).codes.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    program = torch.export.export(nn.Sequential(q), (X,))
    assert [node.target for node in program.graph.nodes].count(torch.ops.lowbit.fake_quantize_codebook.default) == 1
    assert torch.equal(program.module()(X), q(X))


@pytest.mark.parametrize(("is_closed", "expected"), [(False, [0, 0, 1, 1, 1, 1, 1, 0, 0]), (True, [0, 1, 1, 1, 1, 1, 1, 1, 0])])
def test_the_signs_gradient_window_is_open_or_closed(is_closed: bool, expected: list[int]) -> None:
    x = X.clone().requires_grad_()
    SignQuantizer(is_closed=is_closed)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == expected


def test_a_surrogate_replaces_the_signs_gradient_and_nothing_else() -> None:
    q, x = SignQuantizer(), X.clone().requires_grad_()
    q.surrogate = make_surrogate("ste")
    y = q(x)
    y.sum().backward()
    assert y.tolist() == SIGNS
    assert x.grad is not None and x.grad.tolist() == [1] * 9


def test_the_scaled_sign_passes_gradients_unchanged_and_follows_its_input() -> None:
    q = ScaledSignQuantizer(granularity=Granularity.channel(0))
    x = torch.tensor([[1.0, -3.0], [0.0, -5.0]], requires_grad=True)
    y = q(x)
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert y.tolist() == [[2.0, -2.0], [2.5, -2.5]]
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert q(2 * x).tolist() == [[4.0, -4.0], [5.0, -5.0]]
    assert torch.equal(q.encode(x).decode(), y)
    unscaled = ScaledSignQuantizer(granularity=Granularity.channel(0), has_scale=False)
    assert unscaled(x).tolist() == [[1.0, -1.0], [1.0, -1.0]]
    decoder = unscaled.encode(x).decoder
    assert isinstance(decoder, BinaryDecoder) and decoder.scale.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(1), Granularity.group(4)])
def test_the_scaled_sign_has_a_scale_for_each_of_its_granularity(granularity: Granularity) -> None:
    x = torch.randn(3, 2, 4)
    q = ScaledSignQuantizer(granularity=granularity)
    rows, signs = granularity.flatten(q(x)), granularity.flatten(x).sign()
    torch.testing.assert_close(rows, granularity.flatten(x).abs().mean(1, keepdim=True) * signs)
    assert torch.equal(q.encode(x).decode(), q(x))


def test_bfloat16_keeps_its_type_and_sums_in_float32() -> None:
    x = torch.full((1, 4000), 0.1).bfloat16()
    y = ScaledSignQuantizer()(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, x)
    assert SignQuantizer()(x).dtype == torch.bfloat16


def test_nan_counts_as_below_all_boundaries_everywhere() -> None:
    x = torch.tensor([float("nan"), -1.0, 0.0, 1.0, float("inf"), float("-inf")])
    boundary, levels = torch.tensor([-torch.finfo(torch.float32).tiny / 2]), torch.tensor([-1.0, 1.0])
    expected = [-1.0, -1.0, 1.0, 1.0, 1.0, -1.0]
    assert mark_codebook(x, boundary, levels).tolist() == SignQuantizer()(x).tolist() == expected
    three = mark_codebook(x, torch.tensor([-0.5, 0.5]), torch.tensor([-1.0, 0.0, 1.0]))
    assert three.tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0, -1.0]
    assert nearest_level(x[None], torch.tensor([[-1.0, 0.0, 1.0]])).tolist() == [[0, 0, 1, 2, 2, 0]]
    assert binary_linear(x[:, None], sign_layer(torch.ones(1, 1)), Epilogue(torch.ones(1))).flatten().tolist() == expected

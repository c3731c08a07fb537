from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers import (
    BinaryQuantizer,
    CodebookQuantizer,
    LearnedScaleQuantizer,
    PowerOfTwoQuantizer,
    QTensor,
    Quantizer,
    SignQuantizer,
    SumQuantizer,
    UniformQuantizer,
)
from lowbit.quantizers.base import disabled, replace_forward
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.spec import Granularity

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def uniform(bits: int) -> UniformQuantizer:
    return UniformQuantizer(bits, signed=True, symmetric=True, granularity=Granularity.channel(0))


MAKE: dict[str, Callable[[int], Quantizer]] = {
    "symmetric": uniform,
    "affine": lambda bits: UniformQuantizer(bits, signed=False, symmetric=False),
    "learned": lambda bits: LearnedScaleQuantizer(bits, signed=True, granularity=Granularity.channel(0)),
    "learned offset": lambda bits: LearnedScaleQuantizer(bits, signed=False, learn_offset=True),
    "codebook": lambda bits: CodebookQuantizer(bits, granularity=Granularity.over(0, 1)),
    "powers of two": lambda bits: PowerOfTwoQuantizer(bits),
    "sum": lambda bits: SumQuantizer([uniform(bits), uniform(bits)]),
}
each_kind = pytest.mark.parametrize("kind", MAKE)


def made(kind: str, bits: int) -> Quantizer:
    quantizer = MAKE[kind](bits)
    quantizer.initialize(X)
    return quantizer.eval()


# One switch


class Halving(Quantizer):
    """What a user writes: nothing but the contract."""

    def __init__(self) -> None:
        super().__init__(1, Granularity.tensor())

    def initialize(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 0.5, -0.5)

    def encode(self, x: Tensor) -> QTensor:
        raise NotImplementedError


CALLS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "itself": lambda q: q,
    "inside a module": lambda q: nn.Sequential(q),
    "deepcopy": copy.deepcopy,
    "pickle": lambda q: pickle.loads(pickle.dumps(q)),
    "compile": lambda q: torch.compile(q, backend="aot_eager", fullgraph=True),
    "compile inside": lambda q: torch.compile(nn.Sequential(q), backend="aot_eager", fullgraph=True),
    "export": lambda q: torch.export.export(nn.Sequential(q), (X,)).module(),
}


@pytest.mark.parametrize("call", CALLS)
def test_values_pass_a_quantizer_that_is_not_enabled_however_it_is_called(call: str) -> None:
    torch.compiler.reset()
    quantizer = Halving()
    quantizer.set_bit_width(None)
    assert quantizer.bits is None and quantizer.bit_width == 1
    assert torch.equal(CALLS[call](quantizer)(X), X)
    quantizer.set_bit_width(1)
    assert quantizer.bits == 1
    assert CALLS[call](quantizer)(X).unique().tolist() == [-0.5, 0.5]


def test_a_compiled_quantizer_follows_the_switch() -> None:
    torch.compiler.reset()
    quantizer = Halving()
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)
    for enabled in (True, False, True):
        quantizer.enabled = enabled
        assert torch.equal(compiled(X), quantizer(X)) and torch.equal(quantizer(X), X) is not enabled


def test_disabling_is_undone_and_leaves_alone_what_was_off() -> None:
    on, off = Halving(), Halving()
    off.set_bit_width(None)
    with pytest.raises(ZeroDivisionError), disabled([on, off, on]):
        assert on(X) is X and off(X) is X
        raise ZeroDivisionError
    assert on.enabled and not off.enabled


def test_a_replaced_forward_counts_where_the_quantizer_is_enabled_only() -> None:
    on, off = Halving(), Halving()
    off.set_bit_width(None)
    with replace_forward({on: lambda x: 2 * x, off: lambda x: 3 * x}):
        assert torch.equal(on(X), 2 * X) and off(X) is X
    assert on(X).unique().tolist() == [-0.5, 0.5]


# Widths


@each_kind
def test_there_and_back_changes_nothing(kind: str) -> None:
    quantizer = made(kind, 4)
    before, codes = quantizer(X).clone(), quantizer.encode(X).codes.clone()
    seen = {}
    for bits in (2, 8, 2, None, 3, 4):
        quantizer.set_bit_width(bits)
        y = quantizer(X).detach()
        assert torch.equal(seen.setdefault(bits, y), y)
        if bits is not None:
            assert torch.equal(quantizer.encode(X).decode(), y)
            assert quantizer.encode(X).bit_width == bits == quantizer.bit_width
    assert torch.equal(quantizer(X), before) and torch.equal(quantizer.encode(X).codes, codes)


@each_kind
def test_more_bits_come_closer_and_fewer_use_fewer_levels(kind: str) -> None:
    quantizer = made(kind, 4)
    errors = []
    for bits in (2, 4, 6):
        quantizer.set_bit_width(bits, X)
        y = quantizer(X).detach()
        errors.append(float((y - X).square().mean()))
        grids = 2 if kind == "sum" else 1
        assert max(row.unique().numel() for row in quantizer.granularity.flatten(y)) <= 2 ** (bits * grids)
    if kind == "powers of two":  # more bits add levels near 0 only
        assert errors == sorted(errors, reverse=True)
    elif kind != "codebook":  # which has one value for each of its scales, and fits it at any width
        assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_new_width_covers_the_same_range() -> None:
    quantizer = UniformQuantizer(8, signed=False, symmetric=False)
    quantizer.set_parameters(torch.tensor(0.1), torch.tensor(55.0))  # -5.5 to 20
    quantizer.set_bit_width(4)
    assert quantizer.scale.item() == pytest.approx(1.7) and quantizer.zero_point.item() == 3
    learned = LearnedScaleQuantizer(4, signed=True)
    learned.scale.data.fill_(2.0)  # up to 14
    learned.set_bit_width(2)
    assert learned.scale.item() == 14
    learned.set_bit_width(1)
    assert learned(torch.tensor([-1.0, 0.1])).tolist() == [-14, 14]


def test_a_new_width_is_fitted_to_values_that_are_given_once() -> None:
    quantizer = UniformQuantizer(8, signed=True, symmetric=True, observer=make_observer("mse"))
    quantizer.initialize(X)
    fitted = UniformQuantizer(2, signed=True, symmetric=True, observer=make_observer("mse"))
    fitted.initialize(X)
    quantizer.set_bit_width(2, X)
    assert torch.equal(quantizer.scale, fitted.scale)
    quantizer.set_bit_width(8)
    quantizer.set_bit_width(2, 100 * X)
    assert torch.equal(quantizer.scale, fitted.scale)


def test_a_new_width_is_what_the_observer_chooses_for_it() -> None:
    quantizer = UniformQuantizer(8, signed=False, symmetric=False, observer=make_observer("mse"))
    quantizer.observer.observe(X)
    quantizer.take_observed()
    quantizer.set_bit_width(2)
    assert torch.equal(quantizer.scale, quantizer.observer.parameters(0, 3, symmetric=False)[0].reshape(()))


def test_what_is_learned_at_a_width_comes_back_with_it() -> None:
    quantizer = made("learned", 4)
    scale = quantizer.get_parameter("scale")
    quantizer.set_bit_width(2)
    assert quantizer.get_parameter("scale") is scale  # optimizers hold it
    with torch.no_grad():
        scale.mul_(3)
    learned = scale.detach().clone()
    quantizer.set_bit_width(4)
    quantizer.set_bit_width(2)
    assert torch.equal(scale, learned)


@each_kind
def test_copies_and_state_dicts_hold_every_width(kind: str) -> None:
    quantizer = made(kind, 4)
    quantizer.set_bit_width(2, X)
    at_two = quantizer(X)
    quantizer.set_bit_width(4)
    fresh = MAKE[kind](4).eval()
    fresh.load_state_dict(quantizer.state_dict())
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
        assert torch.equal(twin(X), quantizer(X))
        twin.set_bit_width(2)
        assert torch.equal(twin(X), at_two)
    made(kind, 4).load_state_dict(fresh.state_dict())
    plain = made(kind, 4)
    quantizer.load_state_dict(plain.state_dict())
    assert torch.equal(quantizer(X), plain(X))


@each_kind
@pytest.mark.parametrize(
    "x", [torch.zeros(3, 1), torch.full((1, 5), -2.0), torch.randn(2, 3).bfloat16()], ids=["zeros", "equal", "bfloat16"]
)
def test_edges_stay_finite_at_every_width(kind: str, x: Tensor) -> None:
    quantizer = MAKE[kind](4)
    quantizer.initialize(x.float())
    quantizer.eval()
    for bits in (2, 8, 4):
        quantizer.set_bit_width(bits, x.float())
        y = quantizer(x)
        assert bool(torch.isfinite(y).all()) and y.dtype == x.dtype and y.shape == x.shape


def test_a_quantizer_that_was_never_set_may_change_its_width() -> None:
    quantizer = LearnedScaleQuantizer(8, signed=True)
    quantizer.set_bit_width(4)
    quantizer.initialize(X)
    assert quantizer(X).unique().numel() <= 16


def test_one_possible_width_is_said() -> None:
    for quantizer in (BinaryQuantizer(), SignQuantizer(), Halving()):
        with pytest.raises(SpecError, match=f"{type(quantizer).__name__} has bit-widths 1, got 2. Choose one of them, or None"):
            quantizer.set_bit_width(2)
        quantizer.set_bit_width(1)
    with pytest.raises(SpecError, match="UniformQuantizer has bit-widths 2, 3, 4, 5, 6, 7, 8, got 1"):
        uniform(4).set_bit_width(1)
    with pytest.raises(SpecError, match="got True"):
        made("affine", 4).set_bit_width(True)

from __future__ import annotations

from typing import Literal

import pytest
import torch
from tests.qat.recording import BATCHES, network

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.training.inq import FrozenShare, Inq, InqQuantizer, still_trainable
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.quantizers.qtensor import PowerOfTwoDecoder


def fitted(bits: int, w: torch.Tensor) -> InqQuantizer:
    quantizer = InqQuantizer(bits)
    quantizer.initialize(w)
    return quantizer


def weights(count: int = 1000, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def prepared(bits: int = 3, **options: object) -> torch.nn.Module:
    policy = lowbit.BitPolicy.uniform(bits, None, first_last=None)
    return lowbit.prepare(network(), method="inq", policy=policy, sample=BATCHES[0][0], **options).train()


def run_of(
    model: torch.nn.Module, epochs: int, kind: Literal["sgd", "adam"] = "sgd", *, nesterov: bool = False, decay: float = 0.01
) -> TrainRun:
    recipe = Recipe(epochs, optimizer=OptimizerSpec(kind, 0.05, nesterov=nesterov, weight_decay=decay))
    return TrainRun(model, model.lowbit_method, Classification(), recipe, len(BATCHES))  # type: ignore[arg-type]


def epoch(run: TrainRun) -> None:
    for batch in BATCHES:
        run.before_step()
        run.loss(batch).backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()


@pytest.mark.parametrize(("bits", "exponents"), [(2, [-1]), (3, [-1, -2]), (4, [-1, -2, -3, -4]), (5, list(range(-1, -9, -1)))])
def test_levels_are_zero_and_powers_of_two_below_the_largest_weight(bits: int, exponents: list[int]) -> None:
    w = torch.linspace(-0.7, 0.7, 4001)  # floor(log2(0.7 * 4/3)) = -1
    quantizer = fitted(bits, w)
    n1, n2 = quantizer.exponents
    assert (n1.item(), n2.item()) == (exponents[0], exponents[-1])
    expected = sorted({0.0, *(sign * 2.0**e for e in exponents for sign in (1, -1))})
    assert quantizer(w).unique().tolist() == expected


def test_each_weight_goes_to_the_nearest_level_and_large_ones_to_the_largest() -> None:
    w = torch.cat([weights(), torch.tensor([0.0, 7.0, -9.0])])
    quantizer = fitted(4, weights().clamp(-1, 1))
    q, levels = quantizer(w), quantizer(weights().clamp(-1, 1)).unique()
    nearest = levels[(w[:, None].clamp(levels.min(), levels.max()) - levels).abs().argmin(1)]
    assert torch.equal(q, nearest) and torch.equal(quantizer(q), q) and torch.equal(quantizer(-w), -q)
    doubled = fitted(4, 8 * weights().clamp(-1, 1))
    assert torch.equal(doubled(8 * w), 8 * q) and isinstance(quantizer.encode(w).decoder, PowerOfTwoDecoder)


@pytest.mark.parametrize("exponent", range(-20, 20))
def test_the_largest_exponent_is_exact_beside_powers_of_two(exponent: int) -> None:
    below = torch.nextafter(torch.tensor(0.75 * 2.0**exponent), torch.tensor(0.0))
    assert fitted(5, torch.tensor([0.75 * 2.0**exponent])).exponents[0].item() == exponent
    assert fitted(5, below[None]).exponents[0].item() == exponent - 1


@pytest.mark.parametrize("partition", ["quantile", "sorted_index", "random"])
@pytest.mark.parametrize("portion", [0.3, 0.5, 0.875, 1.0])
def test_as_many_weights_are_frozen_as_the_portion_says(partition: str, portion: float) -> None:
    w = weights(4000)
    free = still_trainable(w, portion, partition, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert (~free).float().mean().item() == pytest.approx(portion, abs=0.03 if partition == "random" else 2 / 4000)
    if partition != "random" and portion < 1:
        assert w[~free].abs().min() > w[free].abs().max()


def test_random_portions_keep_what_is_frozen() -> None:
    w, generator = weights(4000), torch.Generator().manual_seed(2)
    first = still_trainable(w, 0.5, "random", generator=generator)
    second = still_trainable(w, 0.75, "random", before=0.5, free=first, generator=generator)
    assert not bool((second & ~first).any()) and second.float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(("kind", "nesterov"), [("sgd", False), ("sgd", True), ("adam", False)])
def test_frozen_weights_are_bit_identical_and_the_others_move(kind: Literal["sgd", "adam"], nesterov: bool) -> None:
    model = prepared(portions="0.5,1", restart_schedule=False)
    run = run_of(model, 5, kind, nesterov=nesterov)
    sites = [site for site in insert.quantized_weights(model).values() if isinstance(site.quantizer, FrozenShare)]
    assert sites
    for index in run.each_epoch():
        before = [site.original.detach().clone() for site in sites]
        epoch(run)
        for site, start in zip(sites, before, strict=True):
            frozen = ~site.quantizer.trainable  # type: ignore[union-attr]
            assert torch.equal(site.original[frozen], start[frozen])
            assert bool(frozen.all()) if index == 4 else not torch.equal(site.original[~frozen], start[~frozen])


def test_when_everything_is_frozen_the_network_answers_as_in_evaluation() -> None:
    model = prepared(bits=3, portions="0.5,0.75,1")
    run = run_of(model, 4)
    assert [phase.name for phase in run.phases] == ["50 % frozen", "75 % frozen", "100 % frozen"]
    for _ in run.each_epoch():
        epoch(run)
    for site in insert.quantized_weights(model).values():
        quantizer = site.quantizer
        assert isinstance(quantizer, FrozenShare) and not bool(quantizer.trainable.any())
        assert torch.equal(quantizer.eval()(site.original), site.original)
        assert site.original.unique().numel() <= 5


def test_one_portion_is_rounding_after_training() -> None:
    model, original = prepared(bits=5, portions="1"), network()
    run = run_of(model, 1)
    run.start_phase()
    run.start_epoch()
    for name, site in insert.quantized_weights(model).items():
        w = original.get_submodule(name).weight.detach()
        assert torch.equal(site.original, fitted(5, w)(w))


def test_portions_follow_the_bits() -> None:
    assert len(prepared(bits=2).lowbit_method.shares) == 10  # type: ignore[union-attr, arg-type]
    assert list(prepared(bits=5).lowbit_method.shares) == ["50 % frozen", "75 % frozen", "87.5 % frozen", "100 % frozen"]  # type: ignore[union-attr, arg-type]
    assert len(prepared(bits=8).lowbit_method.shares) == 4  # type: ignore[union-attr, arg-type]


def test_grown_weights_can_become_free_again_unless_that_is_forbidden() -> None:
    for never, expected in ((False, True), (True, False)):
        share = FrozenShare(fitted(3, torch.tensor([1.0, 0.5, 0.4, 0.1])), (4,))
        method = Inq(never_release=never)
        w = torch.tensor([1.0, 0.5, 0.4, 0.1])
        share.freeze(w, still_trainable(w, 0.5))
        assert share.trainable.tolist() == [False, False, True, True]
        w[2:] = 3.0  # trained beyond those that are frozen
        free = still_trainable(w, 0.5)
        share.freeze(w, free & share.trainable if method.never_release else free)
        assert bool(share.trainable[:2].any()) is expected


@pytest.mark.parametrize("portions", ["0.5", "0.5,0.5,1", "0.7,0.5,1", "0,1"])
def test_portions_must_rise_to_one(portions: str) -> None:
    with pytest.raises(SpecError, match="portions must rise from above 0 to 1"):
        prepared(portions=portions)


def test_other_quantizers_are_frozen_share_by_share_too() -> None:
    policy = lowbit.BitPolicy.uniform(3, None, first_last=None)
    model = lowbit.prepare(network(), method="lsq", procedure="inq", policy=policy, sample=BATCHES[0][0]).train()
    run = run_of(model, 6)
    for _ in run.each_epoch():
        epoch(run)
    for site in insert.quantized_weights(model).values():
        assert isinstance(site.quantizer, FrozenShare) and torch.equal(site.quantizer.eval()(site.original), site.original)


def test_inputs_and_levels_that_move_are_refused_with_the_reason() -> None:
    with pytest.raises(SpecError, match="inputs are new with each sample"):
        lowbit.prepare(network(), method="lsq", procedure="inq", weight_bits=4, activation_bits=4, sample=BATCHES[0][0])
    with pytest.raises(SpecError, match="changes values that it has quantized itself"):
        lowbit.prepare(network(), method="dorefa", procedure="inq", weight_bits=5, activation_bits=None, sample=BATCHES[0][0])

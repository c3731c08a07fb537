from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.bit_planes import BitPlanes, group_lasso, planes_of, requantize, size_of, to_planes, trim, value_of


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(count: int, *shape: int, scale: float = 0.5, seed: int = 0, most: int | None = None) -> BitPlanes:
    """A quantizer in training whose planes lie anywhere from 0 to 2."""
    quantizer = BitPlanes(min(count, 7) + 1, most=most).train()
    planes = 2 * torch.rand(2, *shape, count, generator=torch.Generator().manual_seed(seed))
    quantizer.set_planes(planes, torch.tensor(scale))
    return quantizer


def of_codes(codes: list[float], count: int, scale: float = 1.0, most: int | None = None) -> BitPlanes:
    quantizer = BitPlanes(min(count, 7) + 1, most=most).train()
    quantizer.set_planes(planes_of(torch.tensor(codes), count), torch.tensor(scale))
    return quantizer


@pytest.mark.parametrize("count", range(1, 9))
def test_planes_hold_every_code_and_its_sign(count: int) -> None:
    codes = torch.arange(1 - 2**count, 2**count).float()
    planes = planes_of(codes, count)
    assert planes.shape == (2, 2 ** (count + 1) - 1, count)
    assert set(planes.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(value_of(planes), codes)
    assert not bool((planes[0] * planes[1]).any()) and not bool(planes[1, codes > 0].any()) and not bool(planes[0, codes < 0].any())
    assert torch.equal(planes[0, -1], torch.ones(count))


@pytest.mark.parametrize("count", range(1, 9))
def test_weights_of_exact_planes_are_rounded_evenly_to_the_largest_magnitude(count: int) -> None:
    w = weights(40, 25)
    planes, scale = to_planes(w, count)
    quantizer = BitPlanes(min(count, 7) + 1).train()
    quantizer.set_planes(planes, scale)
    q, step = quantizer(w).detach(), float(w.abs().max()) / (2**count - 1)
    assert float(scale) == float(w.abs().max())
    assert float((q - w).abs().max()) <= step / 2 * (1 + 1e-5)
    assert q.unique().numel() <= 2 ** (count + 1) - 1
    torch.testing.assert_close(q, torch.sign(w) * torch.floor(w.abs() / step + 0.5) * step)  # no ties in these weights


def test_a_weight_of_zeros_has_the_scale_one() -> None:
    planes, scale = to_planes(torch.zeros(2, 3), 4)
    assert scale.item() == 1.0 and not planes.any()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_plane_gets_its_power_of_two_of_the_gradient_where_weights_are_clamped_too(count: int) -> None:
    quantizer, g = trained(count, 6, 5), weights(6, 5, seed=1)
    assert bool((value_of(quantizer.planes).abs() > 2**count - 1).any())  # type: ignore[arg-type]
    w = quantizer(torch.zeros(6, 5))
    w.backward(g)
    powers = torch.tensor([2.0**b for b in reversed(range(count))])
    expected = 0.5 * g.unsqueeze(-1) * powers / (2**count - 1)
    positive, negative = quantizer.planes.grad  # type: ignore[union-attr]
    torch.testing.assert_close(positive, expected)
    assert torch.equal(negative, -positive)
    torch.testing.assert_close(quantizer.scale.grad, (g * w.detach() / 0.5).sum())


def test_weights_are_sums_of_planes_rounded_and_clamped_at_the_scale() -> None:
    quantizer = BitPlanes(3).train()  # planes worth 2 and 1, steps of scale / 3
    positive = torch.tensor([[1.0, 1.0], [0.3, 0.0], [2.0, 2.0], [0.0, 0.5], [0.0, 1.5], [1.0, 1.0]])
    negative = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    quantizer.set_planes(torch.stack([positive, negative]), torch.tensor(6.0))
    assert quantizer(torch.zeros(6)).tolist() == [6.0, 2.0, 6.0, 0.0, 4.0, 2.0]  # 3, 0.6, 6, 0.5, 1.5 and 1: ties go to even codes


def test_planes_stay_from_zero_to_two_and_the_scale_is_free() -> None:
    quantizer = trained(3, 4)
    with torch.no_grad():
        quantizer.planes.copy_(5 * weights(2, 4, 3))  # type: ignore[union-attr]
        quantizer.scale.fill_(-7.0)
        expected = quantizer.planes.clamp(0, 2)  # type: ignore[union-attr]
    quantizer.project()
    assert torch.equal(quantizer.planes, expected) and quantizer.scale.item() == -7.0  # type: ignore[arg-type]


@pytest.mark.parametrize("count", range(1, 9))
def test_requantizing_exact_planes_changes_nothing(count: int) -> None:
    planes, scale = to_planes(weights(50), count)
    again, same = requantize(planes, scale, 8)
    assert torch.equal(again, planes) and torch.equal(same, scale)


def test_a_code_that_does_not_fit_makes_room_for_one_plane_more() -> None:
    planes = torch.tensor([[[1.6, 1.0], [0.0, 0.4]], [[0.0, 0.0], [1.0, 0.0]]])  # 4.2 and -1.6
    grown, scale = requantize(planes, torch.tensor(3.0), 8)
    assert value_of(grown).tolist() == [4.0, -2.0] and grown.shape[-1] == 3 and scale.item() == 7.0  # steps of 1 as before
    full, same = requantize(planes, torch.tensor(3.0), 2)
    assert value_of(full).tolist() == [3.0, -2.0] and full.shape[-1] == 2 and same.item() == 3.0
    assert set(grown.unique().tolist()) == set(full.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("count", range(1, 9))
def test_planes_grow_only_where_a_code_is_out_of_range(count: int) -> None:
    for seed in range(20):
        quantizer = trained(count, 3, 2, seed=seed)
        assert quantizer.planes is not None
        needs = bool((value_of(quantizer.planes).round().abs() > 2**count - 1).any())
        again, _ = requantize(quantizer.planes.detach(), quantizer.scale.detach(), 8)
        assert again.shape[-1] == min(count + needs, 8)


@pytest.mark.parametrize(
    ("codes", "count", "kept", "scale"),
    [
        ([5.0, -2.0, 0.0], 5, [5.0, -2.0, 0.0], 31.0 * 7 / 31),  # empty above
        ([24.0, -8.0, 0.0], 5, [3.0, -1.0, 0.0], 31.0 * 8 * 3 / 31),  # empty below
        ([4.0, -12.0, 0.0], 5, [1.0, -3.0, 0.0], 31.0 * 4 * 3 / 31),  # at both ends
        ([17.0, -16.0, 1.0], 5, [17.0, -16.0, 1.0], 31.0),  # in the middle alone
        ([8.0, 0.0, -8.0], 5, [1.0, 0.0, -1.0], 31.0 * 8 / 31),
        ([0.0, 0.0, 0.0], 5, [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_empty_planes_at_either_end_are_dropped_and_weights_stay(codes: list[float], count: int, kept: list[float], scale: float) -> None:
    before = of_codes(codes, count, 31.0)
    after = of_codes(codes, count, 31.0)
    after.adjust()
    assert value_of(after.planes).tolist() == kept and after.scale.item() == scale  # type: ignore[arg-type]
    assert torch.equal(after(torch.zeros(3)), before(torch.zeros(3)))
    assert (after.found, after.is_zero) == ((0, True) if not any(codes) else (after.count, False))


@pytest.mark.parametrize("count", range(1, 9))
def test_trimming_never_adds_a_plane_and_moves_no_weight_by_more_than_rounding(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(30):
        shift = int(torch.randint(0, count, (), generator=generator))
        codes = torch.randint(-(2 ** (count - shift)) + 1, 2 ** (count - shift), (4,), generator=generator) * 2 ** int(
            torch.randint(0, shift + 1, (), generator=generator)
        )
        planes, scale = planes_of(codes.float(), count), torch.rand((), generator=generator) + 0.1
        kept, new = trim(planes, scale)
        assert 1 <= kept.shape[-1] <= count
        before, after = (value_of(p) * (s / (2 ** p.shape[-1] - 1)) for p, s in ((planes, scale), (kept, new)))
        torch.testing.assert_close(after, before, rtol=2.0**-22, atol=0.0)  # two roundings of the scale
        again, same = trim(kept, new)
        assert torch.equal(again, kept) and torch.equal(same, new)


def test_a_layer_of_zeros_stays_one_and_still_gives_gradients() -> None:
    quantizer = of_codes([0.0, 0.0], 4)
    quantizer.adjust()
    w = quantizer(torch.ones(2))
    w.sum().backward()
    assert w.tolist() == [0.0, 0.0] and not quantizer.planes.grad.any() and quantizer.scale.grad == 0  # type: ignore[union-attr]
    weight = torch.nn.Parameter(quantizer.finish())
    assert weight.tolist() == [0.0, 0.0] and quantizer.found == 0
    weight.data.fill_(3.0)
    assert quantizer(weight).tolist() == [0.0, 0.0] and quantizer.encode(weight).codes.tolist() == [0, 0]


def test_a_negative_scale_turns_the_signs_around() -> None:
    quantizer = of_codes([5.0, -2.0], 3, -7.0)
    before = quantizer(torch.zeros(2)).detach()
    assert before.tolist() == [-5.0, 2.0] and torch.equal(quantizer.encode(torch.zeros(2)).decode(), before)
    assert float(quantizer.encode(torch.zeros(2)).decoder.tensors()["scale"]) == 1.0
    quantizer.adjust()
    assert quantizer.scale.item() == 7.0 and torch.equal(quantizer(torch.zeros(2)), before)


def test_the_group_lasso_is_the_norm_of_both_planes_of_a_bit() -> None:
    planes = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]])
    assert group_lasso(planes).item() == pytest.approx(3.0 + 1e-4)  # sqrt(1 + 4 + 4) and the root of epsilon
    planes = 2 * torch.rand(2, 30, 5, generator=torch.Generator().manual_seed(0))
    assert group_lasso(2 * planes).item() == pytest.approx(2 * group_lasso(planes).item())
    zeros = torch.zeros(2, 3, 2, requires_grad=True)
    group_lasso(zeros).backward()
    assert not zeros.grad.any()  # type: ignore[union-attr]


def test_the_penalty_is_the_lasso_times_its_strength_while_there_are_planes() -> None:
    quantizer = of_codes([1.0], 1)
    quantizer.strength = 0.25
    assert quantizer.penalty().item() == pytest.approx(0.25)
    quantizer.finish()
    assert quantizer.penalty().item() == 0.0 and not quantizer.penalty().requires_grad


def test_eight_planes_are_seven_where_codes_are_stored() -> None:
    w = torch.linspace(-0.7, 0.7, 4001)
    quantizer = BitPlanes(8).train()
    quantizer.begin(w)
    assert (quantizer.count, quantizer.bit_width, quantizer(w).unique().numel() > 255) == (8, 8, True)
    quantizer.eval()
    with torch.no_grad():
        stored = quantizer(w)
    assert torch.equal(quantizer.encode(w).decode(), stored) and stored.unique().numel() <= 255
    half_steps = float(w.abs().max()) * (0.5 / 255 + 0.5 / 127)
    assert float((stored - w).abs().max()) <= half_steps * (1 + 1e-5)
    weight = quantizer.train().finish()
    assert (quantizer.count, quantizer.bit_width) == (7, 8)
    assert torch.equal(quantizer(weight).detach(), stored)


@pytest.mark.parametrize("count", range(1, 8))
def test_weights_take_the_place_of_planes_and_stay_the_same(count: int) -> None:
    quantizer = trained(count, 5, 4)
    quantizer.adjust()
    before = quantizer(torch.zeros(5, 4)).detach()
    weight = quantizer.finish()
    assert quantizer.planes is None and list(quantizer.state_dict()) == ["scale", "_extra_state"]
    assert torch.equal(quantizer(weight).detach(), before) and torch.equal(quantizer.encode(weight).decode(), before)


def test_sgd_on_a_finished_weight_takes_the_steps_of_weights_over_the_scale() -> None:
    quantizer = of_codes([3.0, -2.0, 1.0], 2, 0.5)
    weight = torch.nn.Parameter(quantizer.finish())
    normal, scale, n = torch.nn.Parameter(torch.tensor([1.0, -2 / 3, 1 / 3])), torch.nn.Parameter(torch.tensor(0.5)), 3
    own = torch.optim.SGD([weight, quantizer.scale], 0.3, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD([normal, scale], 0.3, momentum=0.9, weight_decay=0.01)
    for seed in range(6):
        g = 4 * weights(3, seed=seed)
        for optimizer in (own, theirs):
            optimizer.zero_grad()
        y = quantizer(weight)
        y.backward(g)
        rounded = (normal.detach().clamp(-1, 1) * n).round() / n
        z = scale * (normal + (rounded - normal).detach())
        torch.testing.assert_close(y, z)
        z.backward(g)
        own.step()
        theirs.step()
        quantizer.keep_inside(weight)
        normal.data.clamp_(-1, 1)
        torch.testing.assert_close(weight.detach() / 0.5, normal.detach())
        torch.testing.assert_close(quantizer.scale.detach(), scale.detach())


def test_states_bring_their_planes_along_or_take_them_away() -> None:
    x = torch.zeros(3, 4)
    six, three = trained(6, 3, 4), trained(3, 3, 4, scale=0.25, seed=1)
    finished = copy.deepcopy(three)
    weight = finished.finish()
    for state, values in ((three, x), (finished, weight), (six, x), (BitPlanes(5), x)):
        fresh = copy.deepcopy(six)
        if state.scale.isnan():
            state.initialize(weights(3, 4))
        fresh.load_state_dict(state.state_dict())
        assert torch.equal(fresh.eval()(values), state.eval()(values))
        assert (fresh.bit_width, fresh.count, fresh.unit) == (state.bit_width, state.count, state.unit)
    kept = copy.deepcopy(six)
    kept.load_state_dict({"scale": torch.tensor(2.0)}, strict=False)
    assert kept.planes is not None and torch.equal(kept.planes, six.planes)  # type: ignore[arg-type]


def test_weights_and_bits_in_planes_are_counted_without_signs() -> None:
    zeros = of_codes([0.0, 0.0], 3)
    zeros.adjust()
    assert size_of([trained(8, 4, 3), trained(2, 5), zeros, BitPlanes(4)]) == (12 + 5 + 2, 96 + 10)


def test_one_bit_is_no_width() -> None:
    with pytest.raises(SpecError, match="2 to 8, got 1"):
        BitPlanes(1)

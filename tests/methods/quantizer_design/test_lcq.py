from __future__ import annotations

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.quantizer_design.lcq import SMALLEST_CLIP, SMALLEST_SLOPE, CompandingQuantizer, Lcq, compress, curve, expand
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.quantizers.qtensor import CodebookDecoder


def random_logits(count: int = 16, size: float = 0.8, seed: int = 0) -> Tensor:
    return size * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def quantizer(bit_width: int, *, signed: bool, clip: float = 1.0, logits: Tensor | None = None, **options: object) -> CompandingQuantizer:
    options = {"outer_bits": None, "intervals": None if logits is None else len(logits), **options}
    q = CompandingQuantizer(bit_width, signed=signed, clip=clip, **options)  # type: ignore[arg-type]
    if logits is not None and q.logits is not None:
        q.logits.data.copy_(logits)
    return q


def gradients(q: CompandingQuantizer, x: Tensor, upstream: Tensor) -> tuple[Tensor, float, Tensor | None]:
    leaf = x.clone().requires_grad_()
    q.zero_grad()
    q.train()(leaf).backward(upstream)
    assert leaf.grad is not None and q.clip.grad is not None
    return leaf.grad, float(q.clip.grad), None if q.logits is None else q.logits.grad


X = torch.randn(400, generator=torch.Generator().manual_seed(5))
UPSTREAM = torch.randn(400, generator=torch.Generator().manual_seed(6))


# The curve


def test_the_curve_is_linear_on_equal_intervals_with_slopes_from_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0, 0.0]).log_softmax(0)
    slopes, heights = curve(logits)
    shares = logits.exp()
    torch.testing.assert_close(slopes, 4 * shares)
    torch.testing.assert_close(heights, torch.tensor([0.0, shares[0], shares[:2].sum(), shares[:3].sum()]))
    v = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])
    expected = torch.stack([v[0], shares[0] / 2, shares[0], shares[:2].sum(), torch.tensor(1.0)])
    torch.testing.assert_close(compress(v, slopes, heights), expected)


@pytest.mark.parametrize("count", [1, 4, 10, 16])
def test_expanding_undoes_compressing_and_both_rise_from_zero_to_one(count: int) -> None:
    v = torch.linspace(0, 1, 1001)
    slopes, heights = curve(random_logits(count))
    for function, other in ((compress, expand), (expand, compress)):
        u = function(v, slopes, heights)
        assert u[0] == 0 and u[-1].item() == pytest.approx(1, abs=1e-5) and (u.diff() > 0).all()
        torch.testing.assert_close(other(u, slopes, heights), v, rtol=0, atol=1e-5)


def test_equal_logits_of_any_size_are_the_identity() -> None:
    v = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for value in (0.0, 7.0):
        slopes, heights = curve(torch.full((16,), value))
        assert torch.equal(compress(v, slopes, heights), v) and torch.equal(expand(v, slopes, heights), v)


def test_slopes_stay_above_zero_and_the_curve_ends_at_one() -> None:
    slopes, heights = curve(torch.linspace(30, 0, 16))
    assert slopes.min() >= SMALLEST_SLOPE * 0.99
    assert compress(torch.ones(1), slopes, heights).item() == pytest.approx(1, abs=1e-6)
    assert expand(torch.ones(1), slopes, heights).item() == pytest.approx(1, abs=1e-3)


# Forward


def test_without_a_curve_values_round_uniformly_up_to_the_clip() -> None:
    q = quantizer(2, signed=False, clip=3.0)
    assert q(torch.tensor([-1.0, 0.0, 0.4, 0.6, 1.4, 1.6, 2.6, 3.0, 50.0])).tolist() == pytest.approx([0, 0, 0, 1, 1, 2, 3, 3, 3])
    q = quantizer(3, signed=True, clip=3.0)
    assert q(torch.tensor([-50.0, -1.6, -0.4, 0.0, 0.4, 1.6, 50.0])).tolist() == pytest.approx([-3, -2, 0, 0, 0, 2, 3])


@pytest.mark.parametrize(("bit_width", "signed"), [(2, False), (4, False), (3, True), (8, True)])
def test_equal_logits_give_the_uniform_quantizer_bit_for_bit_with_its_gradients(bit_width: int, signed: bool) -> None:
    flat, uniform = quantizer(bit_width, signed=signed, clip=1.3, logits=torch.zeros(16)), quantizer(bit_width, signed=signed, clip=1.3)
    x = X if signed else X.relu()
    assert torch.equal(flat(x), uniform(x)) and torch.equal(flat.eval()(x), uniform.eval()(x))
    by_x, by_clip, _ = gradients(flat, x, UPSTREAM)
    expected_x, expected_clip, _ = gradients(uniform, x, UPSTREAM)
    assert torch.equal(by_x, expected_x) and by_clip == pytest.approx(expected_clip, rel=1e-4)


@pytest.mark.parametrize(("bit_width", "signed"), [(1, False), (3, False), (3, True), (5, True)])
def test_values_are_compressed_rounded_and_expanded(bit_width: int, signed: bool) -> None:
    logits = random_logits()
    q = quantizer(bit_width, signed=signed, clip=1.5, logits=logits)
    x = X if signed else X.relu()
    slopes, heights = curve(logits.double())
    share = (x.double().abs() / 1.5).clamp(max=1)
    code = (compress(share, slopes, heights) * q.steps).round()
    expected = x.sign() * 1.5 * expand(code / q.steps, slopes, heights).clamp(max=1)
    torch.testing.assert_close(q(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(q(-x), -q(x)) or not signed


@pytest.mark.parametrize("logits", [random_logits(), torch.linspace(30, 0, 16), torch.linspace(0, 30, 16)], ids=["usual", "steep", "flat"])
@pytest.mark.parametrize("outer_bits", [None, 8])
def test_training_gives_the_very_values_of_evaluation(logits: Tensor, outer_bits: int | None) -> None:
    for bit_width, signed in ((1, False), (3, False), (4, True)):
        q = quantizer(bit_width, signed=signed, clip=1.7, logits=logits, outer_bits=outer_bits)
        x = torch.cat([X if signed else X.relu(), torch.tensor([0.0, 1.7, 99.0])])
        trained = q.train()(x.requires_grad_())
        assert torch.equal(trained, q.eval()(x)) and trained.max().item() == pytest.approx(1.7)


def test_the_quantizer_scales_with_data_and_clip() -> None:
    one, three = (quantizer(3, signed=True, clip=clip, logits=random_logits()) for clip in (0.8, 2.4))
    torch.testing.assert_close(three(3 * X), 3 * one(X))


def test_outer_bits_move_levels_by_at_most_half_a_step_of_the_table() -> None:
    for signed, steps in ((True, 127), (False, 255)):
        fine, outer = (quantizer(4, signed=signed, clip=2.0, logits=random_logits(), outer_bits=bits) for bits in (None, 8))
        difference = (fine(X) - outer(X)).abs().max().item()
        assert 0 < difference <= 2.0 / steps / 2 + 1e-6
        codes = outer(X).unique() / 2.0 * steps
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


# Backward


def test_the_gradient_stops_at_the_clip_and_the_clip_gets_that_of_what_lies_beyond() -> None:
    q = quantizer(2, signed=True, clip=1.0, logits=None)
    by_x, by_clip, _ = gradients(q, torch.tensor([-2.0, -1.0, -0.7, 0.2, 0.9, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert by_x.tolist() == [0, 0, 3, 4, 5, 0]
    # sign (g - v) inside, sign outside
    assert by_clip == pytest.approx(-1 - 2 - 3 * (1 - 0.7) + 4 * (0 - 0.2) + 5 * (1 - 0.9) + 6)


@pytest.mark.parametrize(("bit_width", "signed"), [(1, False), (3, False), (3, True)])
def test_however_the_curve_bends_inputs_get_the_gradient_as_it_is_and_the_clip_the_rounding_error(bit_width: int, signed: bool) -> None:
    q = quantizer(bit_width, signed=signed, clip=1.4, logits=random_logits(size=1.5))
    x = X if signed else X.relu()
    by_x, by_clip, _ = gradients(q, x, UPSTREAM)
    inside = x.abs() < 1.4
    torch.testing.assert_close(by_x, UPSTREAM * inside)
    error = (q.eval()(x) - x) / 1.4
    assert by_clip == pytest.approx(float((UPSTREAM * torch.where(inside, error, x.sign())).sum().detach()), rel=1e-4)


@pytest.mark.parametrize(("bit_width", "signed"), [(1, False), (3, False), (3, True)])
def test_the_gradient_of_the_curve_follows_the_chain_rule(bit_width: int, signed: bool) -> None:
    count, clip, logits = 5, 1.4, random_logits(5)
    q = quantizer(bit_width, signed=signed, clip=clip, logits=logits)
    x = X if signed else X.relu()
    _, _, by_logits = gradients(q, x, UPSTREAM)
    shares = logits.double().softmax(0)
    slopes, heights = count * shares, shares.cumsum(0) - shares
    by_slope, by_height = torch.zeros(count).double(), torch.zeros(count).double()
    for value, upstream in zip(x.double(), UPSTREAM.double(), strict=True):
        v, h = value.abs() / clip, upstream * value.sign() * clip
        if v >= 1:
            continue
        k = min(int(v * count), count - 1)
        u = ((slopes[k] * (v - k / count) + heights[k]) * q.steps).round() / q.steps
        j = int((u >= heights[1:]).sum())
        by_slope[k] += h * (v - k / count) / slopes[j]
        by_slope[j] -= h * (u - heights[j]) / slopes[j] ** 2
        by_height[k] += h / slopes[j]
        by_height[j] -= h / slopes[j]
    by_share = count * by_slope + (by_height.flip(0).cumsum(0).flip(0) - by_height)
    expected = shares * (by_share - (shares * by_share).sum())
    assert by_logits is not None
    torch.testing.assert_close(by_logits.double(), expected, rtol=1e-3, atol=1e-4)


def test_logits_that_all_grow_alike_change_nothing() -> None:
    q = quantizer(3, signed=True, logits=random_logits())
    _, _, by_logits = gradients(q, X, UPSTREAM)
    assert by_logits is not None and by_logits.abs().sum() > 0.1 and abs(float(by_logits.sum())) < 1e-4


def test_descending_the_error_over_the_curve_beats_the_uniform_quantizer() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 2000))
    q = quantizer(3, signed=True, clip=4.0, logits=torch.zeros(16))
    q.clip.requires_grad_(False)
    optimizer = torch.optim.Adam([q.logits], lr=0.05)  # type: ignore[list-item]
    start = float((q(x) - x).square().mean().detach())
    for _ in range(100):
        optimizer.zero_grad()
        (q(x) - x).square().mean().backward()
        optimizer.step()
    assert float((q(x) - x).square().mean().detach()) < 0.8 * start


# Weights


def test_normalized_weights_are_centred_and_keep_their_size() -> None:
    w = 0.03 * torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.02
    q = quantizer(8, signed=True, clip=5.0, normalizes=True)
    assert (q(w) - (w - w.mean())).abs().max() <= 5.0 / 127 / 2 * w.std() + 1e-6


@pytest.mark.parametrize("detaches", [False, True])
def test_mean_and_deviation_take_part_in_the_gradient_unless_detached(detaches: bool) -> None:
    w = torch.randn(50, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(50, generator=torch.Generator().manual_seed(1))
    q = quantizer(3, signed=True, clip=1.2, normalizes=True, detaches_statistics=detaches)
    by_w, _, _ = gradients(q, w, upstream)
    inner = quantizer(3, signed=True, clip=1.2)
    mean, std = w.mean(), w.std()
    z = (w - mean) / std
    by_z, _, _ = gradients(inner, z, upstream * std)
    expected = by_z / std
    if not detaches:
        by_std = (upstream * inner(z)).sum() - (by_z * z / std).sum()
        expected = expected - by_z.sum() / std / 50 + by_std * (w - mean) / (std * 49)
    torch.testing.assert_close(by_w, expected.detach(), rtol=1e-4, atol=1e-5)


def test_two_bit_weights_are_the_plain_ternary_quantizer() -> None:
    q = CompandingQuantizer(2, signed=True, clip=1.0, intervals=16)
    assert q.logits is None
    assert q(torch.tensor([-3.0, -0.6, -0.5, 0.0, 0.5, 0.6])).tolist() == [-1, -1, 0, 0, 0, 1]


def test_values_midway_between_levels_round_half_to_even_on_both_sides() -> None:
    x = torch.arange(-7, 8) / 2
    for clip in (3.0, 0.3, 1.7e4):
        q = quantizer(3, signed=True, clip=clip, logits=torch.zeros(16))
        assert (q(x * (clip / 3)) / clip * 3).round().tolist() == [-3, -3, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3, 3]
    q = quantizer(2, signed=False, clip=3.0)
    assert q(torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])).tolist() == [0, 1, 2, 2, 2]


def test_signed_one_bit_values_are_refused_by_the_curve() -> None:
    with pytest.raises(SpecError, match="signed values need 2 bits or more"):
        CompandingQuantizer(1, signed=True)


@pytest.mark.parametrize("w", [torch.zeros(3, 2, 3, 3), torch.full((3, 2, 3, 3), 0.1), torch.ones(1, 1, 1, 1)], ids=["0", "0.1", "one"])
@pytest.mark.parametrize("bit_width", [2, 4])
def test_constant_weights_become_zero_and_nothing_becomes_nan(w: Tensor, bit_width: int) -> None:
    q = CompandingQuantizer(bit_width, signed=True, normalizes=True)
    q.initialize(w)
    leaf = w.clone().requires_grad_()
    y = q.train()(leaf)
    y.sum().backward()
    assert leaf.grad is not None
    assert all(torch.isfinite(t).all() for t in (y, leaf.grad, *(p.grad for p in q.parameters() if p.grad is not None)))
    assert y.abs().max() < 1e-6


@pytest.mark.parametrize("bit_width", [2, 4])
def test_a_layer_that_starts_at_zero_learns(bit_width: int) -> None:
    w = nn.Parameter(torch.zeros(4, 3))
    q = CompandingQuantizer(bit_width, signed=True, normalizes=True)
    q.initialize(w)
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        ((q.train()(w) - target + target.mean()) ** 2).sum().backward()
        optimizer.step()
    assert ((q(w) - target + target.mean()) ** 2).sum() < 0.5 * ((target - target.mean()) ** 2).sum()


# The law


@pytest.mark.parametrize(("bit_width", "signed"), [(1, False), (2, False), (4, False), (8, False), (2, True), (5, True), (8, True)])
def test_codes_decode_to_the_forward_pass_on_two_to_the_b_levels(bit_width: int, signed: bool) -> None:
    x = torch.cat([torch.randn(9000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1e30, -1e30])])
    q = CompandingQuantizer(bit_width, signed=signed, normalizes=signed)
    q.initialize(x[:9000])
    if q.logits is not None:
        q.logits.data.copy_(random_logits(size=0.3))
    encoded = q.eval().encode(x[:9000])
    assert isinstance(encoded.decoder, CodebookDecoder) and encoded.decoder.levels.shape == (1, 2**bit_width)
    assert torch.equal(encoded.decode(), q(x[:9000]))
    assert q(x[:9000]).unique().numel() <= 2**bit_width - int(signed)
    assert torch.isfinite(q(x)).all()


def test_bfloat16_in_bfloat16_out() -> None:
    x = X.bfloat16()
    q = quantizer(3, signed=True, logits=random_logits())
    for y in (q.train()(x.requires_grad_()), q.eval()(x)):
        assert y.dtype == torch.bfloat16 and torch.equal(y, q.encode(x).decode().bfloat16())


@pytest.mark.parametrize("signed", [False, True])
def test_the_exported_operator_computes_the_same(signed: bool) -> None:
    q = quantizer(3, signed=signed, clip=1.3, logits=random_logits(), outer_bits=8).eval()
    x = torch.linspace(-2, 2, 801)
    program = torch.export.export(nn.Sequential(q), (x,))
    assert [node.target for node in program.graph.nodes].count(torch.ops.lowbit.fake_quantize_codebook.default) == 1
    assert torch.equal(program.module()(x), q(x))


# The method


def test_clips_start_at_the_least_error_or_at_the_usual_constants() -> None:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    usual = lowbit.prepare(TinyNet(), method="lcq", weight_bits=3, activation_bits=3, sample=x, weight_clip=3.0, activation_clip=8.0)
    assert insert.weight_quantizer(usual.conv1).clip.item() == 3.0 and insert.input_quantizer(usual.conv1).clip.item() == 8.0  # type: ignore[union-attr, arg-type]
    q = CompandingQuantizer(3, signed=True)
    q.initialize(X)

    def error(clip: float) -> float:
        return float((quantizer(3, signed=True, clip=clip).eval()(X) - X).square().mean())

    assert error(q.clip.item()) <= min(error(0.05 * k) for k in range(10, 80)) * 1.03


def test_the_clip_stays_positive() -> None:
    q = quantizer(3, signed=True)
    q.clip.data.fill_(-1.0)
    q.project()
    assert q.clip.item() == pytest.approx(SMALLEST_CLIP)


def test_signed_inputs_keep_their_sign_at_every_bit_width() -> None:
    method, layer = Lcq(), nn.Linear(3, 3)
    for bit_width in (1, 2, 4):
        q = method.activation_quantizer(Slot("layer", layer, bit_width, True, "inner"))
        q.initialize(X)
        assert isinstance(q, LearnedScaleQuantizer if bit_width == 1 else CompandingQuantizer)
        assert q.eval()(X).min() < 0 < q(X).max()


def test_learned_curves_survive_the_state_dict() -> None:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model, other = (lowbit.prepare(TinyNet(), method="lcq", weight_bits=3, activation_bits=3, sample=x) for _ in range(2))
    for module in model.modules():
        if isinstance(module, CompandingQuantizer) and module.logits is not None:
            module.logits.data.copy_(random_logits())
    with torch.no_grad():
        assert not torch.equal(other.eval()(x), model.eval()(x))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"intervals": 0}, "intervals must be 1 or more, got 0"), ({"outer_bits": 9}, "outer_bits must be from 2 to 8")],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Lcq(**options)

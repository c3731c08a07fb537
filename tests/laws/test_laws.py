"""Laws that every registered post-training method keeps, on one tiny network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.laws import checks, tiny
from tests.laws.odd import ODD, odd_network
from tests.networks import settled
from torch import nn

import lowbit
from lowbit.network.insert import activation_quantizers
from lowbit.registry import get_method

every_method = pytest.mark.parametrize("name", tiny.POST_TRAINING)


# 1. Codes say everything


@every_method
@pytest.mark.parametrize("weight_bits", [1, 2, 3, 4, 8])
def test_decoded_codes_are_the_forward_pass_on_at_most_two_to_the_b_levels(name: str, weight_bits: int) -> None:
    if weight_bits not in get_method(name).weight_bits:
        with pytest.raises(lowbit.errors.SpecError, match="weight bits"):
            tiny.quantized(name, weight_bits)
        return
    model = tiny.quantized(name, weight_bits)
    assert len(checks.grids(model)) >= 4 + 4
    checks.check_codes(model, weight_bits)


@every_method
def test_layers_compute_with_what_their_quantizer_encodes(name: str) -> None:
    checks.check_baked(tiny.quantized(name))


# 3. The result is an ordinary module


@every_method
def test_copies_pickles_and_state_dicts_compute_the_same(name: str, device: torch.device) -> None:
    model = tiny.quantized(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.7)
    checks.check_copies(model, other, device)


@every_method
def test_quantizing_leaves_the_given_network_alone(name: str) -> None:
    before = {key: value.clone() for key, value in tiny.trained().state_dict().items()}
    tiny.quantized(name)
    checks.check_untouched(tiny.trained(), before)


# 4. Odd layers and data


@every_method
@pytest.mark.parametrize("case", ODD)
def test_odd_layers_and_data_stay_finite_and_right(name: str, case: str) -> None:
    model, data = odd_network(case)
    result = tiny.quantize(name, model.eval(), data, weight_bits=8, iterations=5)
    expected, got = tiny.outputs(model, data), tiny.outputs(result, data)
    assert torch.isfinite(got).all()
    error = float((expected - got).norm() / (expected.norm()))
    assert error < 0.08, f"relative error {error:.3f} at 8 bits"


# 5. Lower precision and compilation


@every_method
def test_autocast_to_bfloat16_stays_near_float32(name: str) -> None:
    model, images = tiny.quantized(name, 8), tiny.held_out()[:64]
    expected = tiny.outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tiny.outputs(model, images)
    assert tiny.sqnr_db(expected, got.float()) > 20


@every_method
def test_the_compiled_network_computes_the_same(name: str) -> None:
    """Captured in one graph and run through autograd's tracing; no C++ compiler is needed for that."""
    torch.compiler.reset()
    model, images = tiny.quantized(name), tiny.held_out()[:16]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny.outputs(compiled, images), tiny.outputs(model, images), rtol=1e-4, atol=1e-4)


# 6. It is better than rounding


@every_method
def test_beats_rounding_to_nearest_by_the_margin_it_states(name: str) -> None:
    info = get_method(name)
    model, data, images = tiny.trained(), tiny.calibration(), tiny.held_out()
    expected = tiny.outputs(model, images)
    assert info.method is not None
    granularity = getattr(info.method, "weight_granularity", "per_channel")
    plain = lowbit.quantize(
        model, method="round_to_nearest", weight_bits=3, activation_bits=8, calibration=data, weight_granularity=granularity, seed=0
    )
    method = lowbit.quantize(model, method=name, weight_bits=3, activation_bits=8, calibration=data, seed=0, **tiny.budget(info, 600))
    gain = tiny.sqnr_db(expected, tiny.outputs(method, images)) - tiny.sqnr_db(expected, tiny.outputs(plain, images))
    assert gain >= info.margin_db, f"{name} gains {gain:.2f} dB over rounding to nearest, its file states {info.margin_db}"


def test_every_method_but_the_baseline_states_a_margin() -> None:
    assert [name for name in tiny.POST_TRAINING if get_method(name).margin_db <= 0] == ["round_to_nearest"]


# 7. The file is as small as the arithmetic says


@every_method
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_packed_bytes_match_the_arithmetic_and_decode_to_the_same_outputs(name: str, weight_bits: int, tmp_path: Path) -> None:
    if weight_bits not in get_method(name).weight_bits:
        pytest.skip(f"{name} does not support {weight_bits} weight bits")
    model = tiny.quantized(name, weight_bits)
    biases = sum(p.numel() * 4 for key, p in model.named_parameters() if key.endswith("bias"))
    tables = sum(t.numel() * 4 for q in activation_quantizers(model).values() for t in q.state_dict().values())
    checks.check_packed(model, tmp_path / "tiny.lowbit", rest=biases + tables)


# 8. The same seed, the same result


@every_method
def test_the_same_seed_gives_the_same_bits_and_leaves_global_randomness_alone(name: str) -> None:
    data = tiny.calibration()
    torch.manual_seed(11)
    first = tiny.quantize(name, tiny.trained(), data, weight_bits=4)
    after_first = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), after_first)
    torch.manual_seed(12)
    second = tiny.quantize(name, tiny.trained(), data, weight_bits=4)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@every_method
def test_odd_networks_with_batch_norm_settle(name: str) -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)), torch.randn(32, 3, 6, 6)
    )
    data = torch.randn(32, 3, 6, 6)
    result = tiny.quantize(name, model, data, weight_bits=8, iterations=5)
    assert tiny.sqnr_db(tiny.outputs(model, data), tiny.outputs(result, data)) > 25

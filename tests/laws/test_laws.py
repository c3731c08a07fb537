"""Laws that every registered post-training method keeps, on one tiny network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.networks import settled
from torch import nn

import lowbit
from lowbit.registry import get_method, list_methods
from lowbit.testing import checks, laws, post_training, tiny
from lowbit.testing.odd import ODD

POST_TRAINING = [info.name for info in list_methods(kind="post_training")]
every_method = pytest.mark.parametrize("name", POST_TRAINING)


# 1. Codes say everything


@every_method
def test_decoded_codes_are_the_forward_pass_on_at_most_two_to_the_b_levels(name: str, tmp_path: Path) -> None:
    laws.rounded_codes_are_the_forward_pass(name, tmp_path)
    model = post_training.quantized(name)
    layers = lowbit.summary(model).layers
    left = [layer for layer in layers if layer.activation_bits is None]
    assert len(checks.grids(model)) >= 4 + 4 - len(left)
    assert all("stays in float" in layer.reason for layer in left) and len(left) < len(layers)
    for weight_bits in set(range(1, 9)).difference(get_method(name, "post_training").weight_bits):
        with pytest.raises(lowbit.errors.SpecError, match="weight bits"):
            post_training.quantized(name, weight_bits)


@every_method
def test_layers_compute_with_what_their_quantizer_encodes(name: str) -> None:
    checks.check_baked(post_training.quantized(name))


# 3. The result is an ordinary module


@every_method
def test_copies_pickles_and_state_dicts_compute_the_same(name: str, device: torch.device, tmp_path: Path) -> None:
    laws.rounded_copies_compute_the_same(name, tmp_path, device)


@every_method
def test_quantizing_leaves_the_given_network_alone(name: str, tmp_path: Path) -> None:
    laws.rounding_leaves_the_given_network_alone(name, tmp_path)


# 4. Odd layers and data


@every_method
@pytest.mark.parametrize("case", ODD)
def test_odd_layers_and_data_stay_finite_and_right(name: str, case: str) -> None:
    laws.odd_layer_is_right(name, case)


# 5. Lower precision and compilation


@every_method
def test_autocast_to_bfloat16_stays_near_float32(name: str) -> None:
    model, images = post_training.quantized(name, 8), tiny.held_out()[:64]
    expected = tiny.outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tiny.outputs(model, images)
    assert tiny.sqnr_db(expected, got.float()) > 20


@pytest.mark.slow
@every_method
def test_the_compiled_network_computes_the_same(name: str) -> None:
    """Captured in one graph and run through autograd's tracing; no C++ compiler is needed for that."""
    torch.compiler.reset()
    model, images = post_training.quantized(name), tiny.held_out()[:16]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny.outputs(compiled, images), tiny.outputs(model, images), rtol=1e-4, atol=1e-4)


# 6. It is better than rounding


@every_method
def test_beats_rounding_to_nearest_by_the_margin_it_states(name: str, tmp_path: Path) -> None:
    laws.beats_rounding_by_the_margin_it_states(name, tmp_path)


def test_every_method_but_those_that_move_no_weight_states_a_margin() -> None:
    assert [name for name in POST_TRAINING if get_method(name, "post_training").margin_db <= 0] == [
        "integer_only",
        "round_to_nearest",
        "zeroq",
    ]


# 7. The file is as small as the arithmetic says


@every_method
def test_packed_bytes_match_the_arithmetic_and_decode_to_the_same_outputs(name: str, tmp_path: Path) -> None:
    laws.rounded_files_are_small_and_decode_to_the_same(name, tmp_path)


# 8. The same seed, the same result


@every_method
def test_the_same_seed_gives_the_same_bits_and_leaves_global_randomness_alone(name: str, tmp_path: Path) -> None:
    laws.the_same_seed_gives_the_same_codes(name, tmp_path)


@every_method
def test_odd_networks_with_batch_norm_settle(name: str) -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)), torch.randn(32, 3, 6, 6)
    )
    data = torch.randn(32, 3, 6, 6)
    result = post_training.quantize(name, model, data, weight_bits=8, iterations=5)
    assert tiny.sqnr_db(tiny.outputs(model, data), tiny.outputs(result, data)) > 25

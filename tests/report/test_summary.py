from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowbit
from lowbit.measure.layer_noise import LayerNoise
from lowbit.quantizers import UniformQuantizer
from lowbit.report.summary import layer_results, quantizer_word, summary

DATA = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))


def quantized(keep: str = "4") -> nn.Module:
    policy = lowbit.BitPolicy.uniform(3, 8).keep_float(keep)
    return lowbit.quantize(network(), method="round_to_nearest", policy=policy, calibration=DATA)


def test_a_float_network_takes_four_bytes_for_each_weight() -> None:
    found = summary(network())
    assert (found.model, found.method, found.notes) == ("Sequential", "", ())
    assert [(layer.name, layer.shape, layer.weight_bits, layer.activation_bits, layer.status) for layer in found.layers] == [
        ("0", (8, 4), None, None, "skipped"),
        ("2", (8, 8), None, None, "skipped"),
        ("4", (3, 8), None, None, "skipped"),
    ]
    assert [layer.float_bytes for layer in found.layers] == [4 * (32 + 8), 4 * 64, 4 * (24 + 3)]
    assert found.stored_bytes == found.float_bytes == 4 * (32 + 8 + 64 + 24 + 3)


def test_a_quantized_network_says_what_was_done_and_what_was_skipped_and_why() -> None:
    first, second, last = summary(quantized()).layers
    assert (first.weight_bits, first.activation_bits, first.status, first.reason) == (8, 8, "done", "")
    assert (second.weight_bits, second.activation_bits, second.status) == (3, 8, "done")
    assert (last.weight_bits, last.status) == (None, "skipped")
    assert "policy" in last.reason
    assert (second.quantizer, last.quantizer) == ("uniform symmetric", "")


def test_stored_bytes_are_packed_codes_tables_and_bias() -> None:
    second = summary(quantized()).layers[1]
    codes, scales = 64 * 3 // 8, 8 * 4
    assert second.granularity == "per_channel"
    assert codes + scales <= second.stored_bytes <= codes + scales + 8 * 4  # zero points, where they are stored
    assert second.float_bytes == 64 * 4


def test_a_sample_gives_multiply_accumulates_and_bit_operations() -> None:
    without, with_sample = layer_results(quantized()), layer_results(quantized(), sample=DATA[:1])
    assert [layer.macs for layer in without] == [None, None, None]
    assert [layer.macs for layer in with_sample] == [32, 64, 24]
    assert [layer.bops for layer in with_sample[:2]] == [32 * 8 * 8, 64 * 3 * 8]


def test_noise_is_shown_where_it_was_measured() -> None:
    noise = {"2": LayerNoise(12.5, 17.25, 0.1), "4": LayerNoise(None, math.inf, 0.0)}
    results = layer_results(quantized(), noise=noise)
    assert [layer.sqnr_db for layer in results] == [None, 17.25, math.inf]
    assert [layer.weight_sqnr_db for layer in results] == [None, 12.5, None]
    printed = str(summary(quantized(), noise=noise))
    assert "SQNR" in printed and "17.2 dB" in printed and "exact" in printed
    assert "SQNR" not in str(summary(quantized()))


def test_the_printed_table_has_a_line_for_each_layer_and_the_sizes() -> None:
    found = summary(quantized())
    lines = str(found).splitlines()
    assert lines[0].strip() == "Sequential, round_to_nearest"
    for layer in found.layers:
        assert any(line.split("│")[1:2] and line.split("│")[1].strip() == layer.name for line in lines)
    assert f"stored {found.stored_bytes} B, in float32 {found.float_bytes} B" in str(found)


def test_hostile_layer_names_are_printed_as_they_are() -> None:
    model = nn.Sequential()
    model.add_module("[bold red]x[/]", nn.Linear(4, 4))
    assert "[bold red]x[/]" in str(summary(model))


def test_a_network_without_layers_has_an_empty_table() -> None:
    found = summary(nn.ReLU())
    assert (found.layers, found.stored_bytes, found.float_bytes) == ((), 0, 0)


@pytest.mark.parametrize(("is_symmetric", "word"), [(True, "uniform symmetric"), (False, "uniform affine")])
def test_quantizers_are_called_by_their_grid(is_symmetric: bool, word: str) -> None:
    assert quantizer_word(UniformQuantizer(4, signed=is_symmetric, symmetric=is_symmetric)) == word


def test_in_a_notebook_it_is_text_and_one_table_and_shows_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *shown: pytest.fail(f"displayed {shown}"))
    found = summary(network())
    assert "Sequential" in str(found) and "Sequential" in found._repr_html_()

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import OutputError
from lowbit.report.facts import run_facts
from lowbit.report.histograms import ActivationHistogram, WeightHistogram
from lowbit.report.html import (
    Names,
    breakable,
    cards,
    computed_bars,
    computed_words,
    layer_table,
    learning_plots,
    noise_bars,
    render_html,
    run_words,
    size_bars,
    storage_bars,
    stored_parts,
    time_bars,
    write_html,
)
from lowbit.report.pictures import Disagreement, picture_png
from lowbit.report.results import ActivationResult, LayerResult, MetricResult, ParityResult, Report, StoredPart

HOSTILE = """</style><script>alert("x")</script><img src=x onerror='y'>&{{ 7 * 7 }}"""
VOID = {"meta", "link", "img", "br", "wbr", "input", "hr"}
REPORT = Report(
    method="brecq",
    weight_bits=4,
    activation_bits=8,
    seed=3,
    model="net",
    options={"iterations": 10},
    metric="accuracy",
    metrics={"accuracy": MetricResult(0.9, 0.89, "%"), "RMSE": MetricResult(0.25, 0.5)},
    samples=200,
    agreement=0.97,
    sqnr_db=21.5,
    max_abs_error=0.25,
    size_float=1000,
    size_packed=125,
    size_onnx=500,
    parity_onnx=ParityResult(1e-4, 0.995, True, 200, 44.2),
    parity_packed=ParityResult(0.0, 1.0, True),
    latency_float_onnx=10.0,
    latency_quantized_onnx=4.0,
    latency_setting="onnxruntime, 1 thread",
    layers=[
        LayerResult("conv1", "conv2d", 8, 8, 40.0, stored_bytes=100, float_bytes=400, macs=1000.0, bops=64_000.0),
        LayerResult("conv2", "conv2d", 4, 8, 5.0, stored_bytes=25, float_bytes=200, macs=3000.0, bops=96_000.0),
        LayerResult("head", "linear", None, None, math.inf, status="skipped", reason="kept by the policy"),
    ],
    notes=["a note"],
)


class Page(HTMLParser):
    """What a browser would make of a page: tags with their attributes, and text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def card(report: Report, title: str) -> tuple[str, str, str]:
    found = next(card for card in cards(report) if card.title == title)
    return found.value, found.detail, found.state


def test_the_cards_hold_the_figures_of_the_report() -> None:
    assert card(REPORT, "Accuracy") == ("89.00 %", "float 90.00 %, -1.00 points", "")
    assert card(REPORT, "RMSE") == ("0.5", "float 0.25, +0.25", "")
    assert card(REPORT, "Agreement")[0] == "97.00 %"
    assert card(REPORT, "Output SQNR")[:2] == ("21.5 dB", "largest difference 0.25")
    assert card(REPORT, "Stored")[:2] == ("125 B", "float 1 kB, 8.0x smaller")
    assert card(REPORT, "Measured time")[:2] == ("4.00 ms", "float 10.00 ms, 2.5x faster")
    assert card(REPORT, "File check") == (
        "passed",
        "packed: same answer 100.00 %, exact\nONNX: same answer 99.50 %, SQNR 44.2 dB, largest difference 0.0001 on 200 samples",
        "good",
    )


def test_a_slower_file_and_a_failed_check_are_not_glossed_over() -> None:
    slow = Report("a", 4, 8, 0, latency_float_onnx=1.0, latency_quantized_onnx=4.0, parity_onnx=ParityResult(0.5, 0.2, False))
    assert card(slow, "Measured time") == ("4.00 ms", "float 1.00 ms, 0.25x as fast: not a gain", "warn")
    assert card(REPORT, "Measured time")[2] == ""
    assert [(bar.name, bar.segments[0][:2]) for bar in time_bars(slow)] == [
        ("float ONNX file", ("muted", 25.0)),
        ("quantized ONNX file", ("warn", 100.0)),
    ]
    assert card(slow, "File check") == ("failed", "ONNX: same answer 20.00 %, largest difference 0.5", "bad")


def test_what_was_not_measured_is_a_dash_and_never_nan() -> None:
    nan = math.nan
    empty = Report("dfq", None, 8, 0)
    broken = Report("dfq", 4, 8, 0, agreement=nan, sqnr_db=nan, max_abs_error=nan, parity_packed=ParityResult(nan, None, False), layers=[
        LayerResult("a", "linear", 4, 8, nan, weight_sqnr_db=nan), LayerResult("b", "linear", 4, 8, None),
    ])  # fmt: skip
    for report in (empty, broken):
        assert [c.value for c in cards(report) if c.title != "File check"] == ["\N{EN DASH}"] * 5
        assert not re.search(r"\b(nan|None|inf)\b", Page(render_html(report)).words)


def test_bars_are_to_scale() -> None:
    assert [(bar.name, bar.segments[0][:2]) for bar in size_bars(REPORT)] == [
        ("float parameters", ("muted", 100.0)),
        ("packed file", ("main", 12.5)),
        ("ONNX file", ("main", 50.0)),
    ]
    assert [[segment[:2] for segment in bar.segments] for bar in storage_bars(stored_parts(REPORT))] == [
        [("main", 25.0), ("saved", 75.0)],
        [("main", 6.25), ("saved", 43.75)],
    ]
    assert [bar.segments[0][:2] for bar in noise_bars(REPORT.layers)] == [("main", 100.0), ("poor", 12.5), ("main", 100.0)]
    assert [bar.segments[0][:2] for bar in computed_bars(REPORT.layers)] == [("muted", 100.0), ("main", 100 * 160_000 / (4000 * 1024))]
    assert [bar.segments[0][:2] for bar in time_bars(REPORT)] == [("muted", 100.0), ("main", 40.0)]


def test_the_parts_of_a_file_are_drawn_by_what_they_hold_and_add_up() -> None:
    parts = [StoredPart("conv", 60, 20, 10, 0, 400), StoredPart("norm", 0, 0, 30, 0, 30), StoredPart("graph", header_bytes=80)]
    bars = storage_bars(parts)
    assert [(bar.name, bar.value) for bar in bars] == [("conv", "90 B of 400 B"), ("norm", "30 B of 30 B"), ("graph", "80 B")]
    assert [[segment[:2] for segment in bar.segments] for bar in bars] == [
        [("main", 15.0), ("second", 5.0), ("muted", 2.5), ("saved", 77.5)],
        [("muted", 7.5)],
        [("header", 20.0)],
    ]
    words = Page(render_html(dataclasses.replace(REPORT, size_packed=200, stored=parts))).words
    assert "Together 200 bytes: all of model.lowbit." in words


def test_columns_that_say_the_same_everywhere_are_told_once() -> None:
    layers = [
        LayerResult(f"block.{index}", "conv2d", 4, 8, 20.0 + index, shape=(2, 2), quantizer="uniform", granularity="per_channel")
        for index in range(3)
    ]
    table = layer_table(Report("a", 4, 8, 0, layers=layers))
    assert dict(table.same) == {
        "Kind": "conv2d", "Weight bits": "4", "Activation bits": "8", "Quantizer": "uniform per channel", "Status": "done",
    }  # fmt: skip
    assert [column.title for column in table.columns] == ["Weight", "Output SQNR"]
    mixed = layer_table(Report("a", 4, 8, 0, layers=[*layers, LayerResult("fc", "linear", 8, 8)]))
    assert [column.title for column in mixed.columns] == ["Kind", "Weight", "Weight bits", "Quantizer", "Output SQNR"]
    alone = layer_table(Report("a", 4, 8, 0, layers=layers[:1]))
    assert alone.same == () and "Kind" in [column.title for column in alone.columns]


def test_the_layer_table_has_outputs_and_merges_where_they_are_quantized() -> None:
    merge = ActivationResult("conv2.output", "merge", (), 6, -1, 1, -1, 1, 0.0, 30.0)
    layers = [LayerResult("conv1", "conv2d", 4, 8, output_bits=5), LayerResult("conv2", "conv2d", 4, 8), LayerResult("fc", "conv2d", 4, 8)]
    report = Report("a", 4, 8, 0, layers=layers, activations=[merge, dataclasses.replace(merge, name="relu.output", bit_width=7)])
    table = layer_table(report)
    assert table.names == ("conv1", "conv2", "fc", "relu.output")
    outputs = next(column for column in table.columns if column.title == "Output bits")
    assert [(cell.text, cell.detail) for cell in outputs.cells] == [("5", ""), ("6", "merge"), ("", ""), ("7", "")]
    assert "Output bits" not in [column.title for column in layer_table(Report("a", 4, 8, 0, layers=layers[1:])).columns]


def test_long_names_lose_what_all_of_them_begin_with_and_keep_it_in_their_title() -> None:
    prefix = "detector.backbone_network."
    layers = [LayerResult(f"{prefix}layer{index}.conv", "conv2d", 4, 8, 20.0) for index in range(2)]
    text = render_html(Report("a", 4, 8, 0, layers=layers))
    assert re.findall(r'<tr><th scope="row" title="(.*?)">(.*?)</th>', text) == [
        (f"{prefix}layer{index}.conv", f"layer{index}.<wbr>conv") for index in range(2)
    ]
    assert f"All layers lie in {prefix}" in Page(text).words
    assert Names.of(["a.b", "a.c"]) == Names.of([f"{prefix}conv"]) == Names.of([f"{prefix}conv", "head"]) == Names()


def test_training_curves_have_axes_percent_and_the_line_of_the_float_network() -> None:
    curve = [
        {
            "epoch": epoch,
            "phase": "all",
            "step": epoch,
            "loss": 1 / epoch,
            "metrics": {"accuracy": 0.8 + epoch / 100, "RMSE": 2.0},
            "seconds": 1.0,
        }
        for epoch in (1, 2, 3)
    ]
    measured = {"AIWQ": {"conv1": 0.25, "conv2": 0.5}}
    *plots, by_layer = learning_plots(dataclasses.replace(REPORT, training={"metric": "accuracy", "curve": curve, "measured": measured}))
    assert (by_layer.title, by_layer.caption) == ("AIWQ by layer", "largest at conv2: 0.5") and "conv1, AIWQ: 0.25" in by_layer.drawing
    assert [(plot.title, plot.caption) for plot in plots] == [
        ("Training loss", "last epoch 0.333"),
        ("Test accuracy", "last epoch 83.00 %; dashed: the float network, 90.00 %"),
        ("Test RMSE", "last epoch 2; dashed: the float network, 0.25"),
    ]
    texts = [[text.text for text in ElementTree.fromstring(str(plot.drawing)).iter("text")] for plot in plots]
    assert ["%" in words for words in texts] == [False, True, False]
    assert all(words[-4:] == ["1", "2", "3", "epoch"] for words in texts)
    accuracy = ElementTree.fromstring(str(plots[1].drawing))
    assert {"82", "84", "86", "88", "90"} <= {text.text for text in accuracy.iter("text")}
    (line,) = [found for found in accuracy.iter("line") if found.get("class") == "baseline"]
    dots = list(accuracy.iter("circle"))
    assert [dot[0].text for dot in dots] == [f"epoch {e} (all), test accuracy: {80 + e}.00 %" for e in (1, 2, 3)]
    per_point = (float(str(dots[0].get("cy"))) - float(str(dots[2].get("cy")))) / 2
    assert float(str(dots[2].get("cy"))) - float(str(line.get("y1"))) == pytest.approx(7 * per_point, abs=0.2)


def test_weights_of_many_bits_show_their_errors_and_levels_are_counted_per_scale() -> None:
    coarse = WeightHistogram("a", 3, "code", 0, 7, (1,) * 96, tuple(range(8)), (1,) * 8, used=(6, 8), per_scale=27)
    fine = WeightHistogram("b", 8, "scale", -9, 9, (1,) * 96, (0.0,), (1,), (9, 9), 9, (1,) * 96, 0.5)
    words = Page(render_html(REPORT, histograms=[coarse, fine])).words
    assert "a 3 bits, 6 to 8 of 8 levels per scale" in words
    assert "b 8 bits, 9 of 256 levels per scale of 9 weights; errors in steps" in words
    assert "levels lie too close to draw" in words
    assert "levels lie too close to draw" not in Page(render_html(REPORT, histograms=[coarse])).words


def test_activations_are_drawn_between_their_clips() -> None:
    found = ActivationResult("relu.output", "input", ("conv2", "conv3"), 8, 0.0, 9.0, 0.0, 6.0, 0.125, 30.0)
    text = render_html(dataclasses.replace(REPORT, activations=[found]), activations=[ActivationHistogram(found, 0, 9, (16, 0, 1))])
    words = Page(text).words
    assert "relu.output 8 bits, clips 0 to 6, 12.50 % beyond" in words
    assert "input of conv2, conv3" in words
    (drawing,) = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text) if "relu.output" in svg]
    low, high = (float(str(line.get("x1"))) for line in drawing.iter("line") if line.get("class") == "clip")
    assert (high - low) / 252 == pytest.approx(6 / 9, abs=1e-3)
    heights = [88 - float(point.split(",")[1]) for point in str(next(drawing.iter("polygon")).get("points")).split()[1:-1:2]]
    assert heights == pytest.approx([82, 0, 20.5], abs=0.1)  # square roots


def test_pictures_are_part_of_the_page() -> None:
    picture = Disagreement(17, 3, 5, 3, 1.5, picture_png(torch.rand(3, 8, 8)))
    text = render_html(REPORT, pictures=[picture])
    (image,) = [attributes for tag, attributes in Page(text).tags if tag == "img"]
    assert image == {"src": picture.data_uri, "alt": "sample 17: float 3, quantized 5, right 3"}
    assert picture.data_uri.startswith("data:image/png;base64,")


def test_the_page_says_what_noise_is_measured_against() -> None:
    words = Page(render_html(dataclasses.replace(REPORT, noise_reference="the trained network with its quantizers off"))).words
    assert "output against the trained network with its quantizers off on the same inputs" in words
    assert "SQNR against the trained network with its quantizers off." in words


def test_the_facts_of_the_run_are_told() -> None:
    run = {**run_facts(time.time(), {"calibration": "digits, 256 samples"}), "seconds": 75.0, "command": "lowbit quantize -w 4"}
    assert {"Command": "lowbit quantize -w 4", "Duration": "1 min 15 s", "Calibration data": "digits, 256 samples"}.items() <= run_words(
        run
    ).items()
    words = Page(render_html(dataclasses.replace(REPORT, run=run))).words
    assert "lowbit quantize -w 4" in words and f"torch {torch.__version__}" in words
    assert run_words({}) == {} and "This run" not in Page(render_html(REPORT)).words


def test_every_table_can_be_sorted_and_filtered_by_keyboard_and_keeps_its_names_in_sight() -> None:
    found = ActivationResult("relu.output", "merge", (), 8, 0.0, 9.0, 0.0, 6.0, 0.125, 30.0)
    text = render_html(dataclasses.replace(REPORT, activations=[found]))
    tags = Page(text).tags
    heads = [attributes for tag, attributes in tags if tag == "th" and attributes.get("scope") == "col"]
    buttons = [attributes for tag, attributes in tags if tag == "button"]
    assert len(heads) == len(buttons) > 10 and all(button.get("type") == "button" for button in buttons)
    labels = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    assert {attributes.get("id") for tag, attributes in tags if tag == "input"} == labels == {"layers-filter", "activations-filter"}
    filters = {attributes.get("data-table") for _, attributes in tags if attributes.get("class") == "filter"}
    assert filters == {attributes.get("id") for tag, attributes in tags if tag == "table"}
    assert re.search(r"\.named th:first-child \{[^}]*position: sticky", text)


def test_whatever_is_wider_than_a_phone_scrolls_by_itself() -> None:
    tags = Page(render_html(REPORT)).tags
    scrolling = [attributes for _, attributes in tags if str(attributes.get("class")).split()[0] == "scroll"]
    assert len(scrolling) == sum(tag == "table" for tag, _ in tags)
    assert all(attributes.get("tabindex") == "0" and attributes.get("aria-label") for attributes in scrolling)


def test_a_file_as_large_as_the_float_network_is_not_taken_for_it() -> None:
    bars = size_bars(Report("a", 8, 8, 0, size_float=100, size_onnx=100))
    assert [(bar.name, bar.segments[0][0], bar.value) for bar in bars] == [
        ("float parameters", "muted", "100 B"),
        ("ONNX file", "main", "100 B"),
    ]


def test_noise_without_a_number_has_no_bar_and_no_signal_has_an_empty_one() -> None:
    layers = [
        LayerResult(name, "linear", 4, 8, db) for name, db in (("a", math.nan), ("b", None), ("c", -math.inf), ("d", -3.0), ("e", 6.0))
    ]
    assert [(bar.name, bar.segments[0][1]) for bar in noise_bars(layers)] == [("c", 0.0), ("d", 0.0), ("e", 100.0)]
    assert [bar.segments[0][1] for bar in noise_bars(layers[2:4])] == [0.0, 0.0]


def test_bit_operations_are_compared_with_32_times_32() -> None:
    assert computed_words(REPORT.layers) == {"macs": "4 k", "bops": "160 k", "float_bops": "4.1 M", "ratio": "26x"}
    assert computed_words([LayerResult("a", "linear", 4, 8)]) is None


def test_the_page_is_whole_and_loads_nothing() -> None:
    histogram = WeightHistogram("conv1", 2, "scale", -1.0, 1.0, (1, 2, 3), (-1.0, 0.0, 1.0), (1, 2, 3))
    text = render_html(REPORT, histograms=[histogram])
    page = Page(text)
    assert page.open == []
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes), tag
    assert not re.search(r"url\(|@import|https?://|fetch\(|import\(", text)


def test_the_page_has_a_row_for_each_layer_and_says_why_one_was_skipped() -> None:
    words = Page(render_html(REPORT)).words
    assert "weights 4 bits, activations 8 bits, seed 3" in words
    assert "head stays in float: kept by the policy" in words
    assert "a note" in words
    assert "4.00 ms quantized, 10.00 ms float, median of one call: onnxruntime, 1 thread" in words
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>.*?</tr>', render_html(REPORT))
    assert rows == ["conv1", "conv2", "head"]


def test_hostile_names_are_text_wherever_they_appear() -> None:
    layers = [
        LayerResult(HOSTILE, HOSTILE, 4, 8, 3.0, "done", HOSTILE, 3.0, (2, 2), HOSTILE, HOSTILE, 1, 2, 3.0, 4.0),
        LayerResult(HOSTILE, "linear", None, None, status="skipped", reason=HOSTILE),
    ]
    histogram = WeightHistogram(HOSTILE, 2, HOSTILE, -1.0, 1.0, (1, 2), (0.0,), (3,))
    report = Report(
        HOSTILE, 4, 8, 0, model=HOSTILE, options={HOSTILE: HOSTILE}, layers=layers, notes=[HOSTILE], size_packed=1, size_float=2,
        latency_float_onnx=1.0, latency_quantized_onnx=1.0, latency_setting=HOSTILE,
    )  # fmt: skip
    page, plain = Page(render_html(report, histograms=[histogram])), Page(render_html(REPORT))
    assert page.open == []
    assert page.count("img") == 0
    assert page.count("script") == plain.count("script") == 1
    assert page.count("style") == plain.count("style") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.words.count("{{ 7 * 7 }}") >= 10


def test_long_names_may_break_behind_their_dots() -> None:
    assert breakable("a.b<c.d") == "a.<wbr>b&lt;c.<wbr>d"


def test_a_thousand_layers_are_all_there_and_the_page_stays_small() -> None:
    layers = [
        LayerResult(f"blocks.{i}.fc", "linear", 4, 8, 20.0, stored_bytes=10, float_bytes=80, macs=1e6, bops=3.2e7) for i in range(1000)
    ]
    histograms = [WeightHistogram(f"blocks.{i}.fc", 4, "scale", -8, 7, (3,) * 96, (0.0,) * 16, (1,) * 16) for i in range(1000)]
    text = render_html(Report("brecq", 4, 8, 0, layers=layers), histograms=histograms)
    page = Page(text)
    assert len(re.findall('<th scope="row">', text)) == 1000
    assert page.count("figure") == 1000
    assert "988 more layers" in page.words
    assert sum(attributes.get("class") == "bars tall" for _, attributes in page.tags) == 2
    assert len(text) < 6_000_000


def test_a_diagnosis_gets_a_section_with_every_suspect() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    data = torch.randn(32, 4, generator=generator)
    quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=3, calibration=data)
    found = lowbit.diagnose(quantized, calibration=data, reference=model, remedies=0)
    text = render_html(Report("round_to_nearest", 3, 8, 0), diagnosis=found)
    page = Page(text)
    assert page.open == []
    assert sum(attributes.get("scope") == "row" for _, attributes in page.tags) == len(found.suspects) > 3
    assert page.count("circle") == sum(
        math.isfinite(db) for suspect in found.suspects for db in (suspect.only_on_db, suspect.only_off_db) if db is not None
    )
    assert all(" ".join(str(finding).split()) in page.words for finding in found.findings)


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_html(REPORT, path)
    before = path.read_text()
    assert before == render_html(REPORT)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_html(Report("other", 4, 8, 0), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

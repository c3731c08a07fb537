"""The contact sheet pixel by pixel, rows, plots, and a page in which nothing of users is markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.data.images import Preprocessing
from lowbit.inputs import Inputs
from lowbit.report.facts import run_facts
from lowbit.report.formatting import NOTHING
from lowbit.report.synthesis import contact_sheet, loss_plot, match_heads, match_plot, match_rows, write_synthesis_page
from lowbit.synthesis.samples import NormMatch, SynthesizedData
from lowbit.synthesis.statistics import Match


def data_of(images: Tensor, *, real: bool = False) -> SynthesizedData:
    near, far = Match(0.01, 0.02, 0.5), Match(0.5, 0.25, None)
    statistics = tuple(NormMatch(name, 4, near, far, Match(0.1, 0.1, 0.1) if real else None) for name in ("<b>norm</b>", "second"))
    return SynthesizedData(Inputs((images,)), "zeroq", {"iterations": 3}, 0, (100.0, 10.0, 1.0), statistics, ("left out: <i>x</i>",))


def test_pictures_are_shown_in_the_networks_own_preprocessing() -> None:
    pixels = torch.tensor([0.0, 0.25, 0.5, 1.0]).view(1, 1, 2, 2).repeat(3, 1, 1, 1)
    pixels[2] = 2.0  # whiter than white
    preprocessing = Preprocessing(2, 1.0, (0.3,), (0.5,), grey=True)
    sheet = contact_sheet(data_of((pixels - 0.3) / 0.5), preprocessing)
    assert sheet is not None and sheet.mode == "L" and sheet.size == (2 * 50 + 2, 2 * 50 + 2)  # each pixel is 24 wide
    found = np.asarray(sheet)
    assert [int(found[2 + 24 * y, 2 + 24 * x]) for y in (0, 1) for x in (0, 1)] == [0, 64, 128, 255]
    assert (found[52:100, 2:50] == 255).all() and (found[:2] == 255).all()


def test_without_preprocessing_values_are_stretched_and_colours_stay_colours() -> None:
    images = torch.zeros(2, 3, 60, 50)
    images[0, 0], images[1, 2] = -1.0, 3.0
    sheet = contact_sheet(data_of(images), None)
    assert sheet is not None and sheet.mode == "RGB" and sheet.size == (2 * 52 + 2, 62 + 2)
    found = np.asarray(sheet)
    assert found[3, 3].tolist() == [0, 64, 64] and found[3, 55].tolist() == [64, 64, 255]


def test_other_inputs_are_no_pictures() -> None:
    assert contact_sheet(data_of(torch.zeros(2, 2, 6, 6)), None) is None
    assert contact_sheet(data_of(torch.zeros(2, 7)), None) is None


def test_rows_and_plots_show_those_sources_that_there_are(tmp_path: Path) -> None:
    alone, compared = data_of(torch.zeros(2, 1, 4, 4)), data_of(torch.zeros(2, 1, 4, 4), real=True)
    assert match_heads(alone)[2:4] == ("mean, samples", "mean, noise") and len(match_heads(compared)) == 2 + 9
    assert match_rows(alone)[0][:4] == ("<b>norm</b>", "4", "0.010", "0.500") and match_rows(alone)[0][-1] == NOTHING
    assert match_plot(alone, "mean").count("<circle") == 4 and match_plot(compared, "mean").count("<circle") == 6
    assert match_plot(alone, "spread").count("<circle") == 2  # noise has none here
    assert "second, noise: 0.5" in match_plot(alone, "mean")
    assert loss_plot(alone).count("<circle") == 3 and "iteration 2, loss: 1" in loss_plot(alone)
    assert loss_plot(replace(alone, losses=tuple(1 + 1 / n for n in range(1, 501)))).count("<circle") == 120
    assert loss_plot(replace(alone, losses=(0.0,))) == ""
    write_synthesis_page(alone, "<u>net</u>", None, run_facts(0.0, {}), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<b>norm</b>" not in page and "&lt;b&gt;norm" in page and "<u>" not in page and "<i>x</i>" not in page

"""Pictures of synthesis methods: samples that were made, the loss on the way, and how near they come to what norms keep."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.options import hyper_parameters_of
from lowbit.pages.specimen import digits
from lowbit.plotting import Curve, Panel, Picture
from lowbit.registry import MethodInfo
from lowbit.workflows.synthesize import synthesize

COUNT, SHOWN = 12, 8


def synthesized_picture(info: MethodInfo) -> Picture:
    """Samples for the digits network, with the method's settings for a first try."""
    specimen = digits()
    trial = {name: value for name, value in getattr(info.method, "trial", {}).items() if name in hyper_parameters_of(info)}
    shape = tuple(specimen.sample.shape[1:])
    data = synthesize(specimen.model, method=info.method, shape=shape, count=COUNT, progress=False, **trial)  # type: ignore[arg-type]
    made = data.inputs.tensors[0]
    names = tuple(match.norm for match in data.statistics)
    errors = [
        Curve(name, range(len(names)), tuple(getattr(match, source).mean_error for match in data.statistics), "bars", colour)
        for colour, (name, source) in enumerate((("samples", "samples"), ("noise", "noise")))
    ]
    panels = (
        Panel(f"{SHOWN} samples", (Curve("", (), _row(made[:SHOWN]), "image"),), is_wide=True),
        Panel(f"{SHOWN} digits, for comparison", (Curve("", (), _row(specimen.sample[:SHOWN]), "image"),), is_wide=True),
        Panel(
            "loss on the way", (Curve("", range(len(data.losses)), data.losses),), "iteration", "loss", is_logarithmic=min(data.losses) > 0, is_wide=True
        ),
        Panel("distance to the means that norms keep", tuple(errors), up="error", names=names, is_wide=True),
    )  # fmt: skip
    return Picture(
        f"{info.name}: samples without data", panels, (f"{COUNT} samples of {specimen.name}, {len(data.losses)} iterations.", *data.notes)
    )


def _row(images: Tensor) -> list[list[float]]:
    """Images ``[N, 1, H, W]`` side by side, each stretched from its least to its greatest value, with white between."""
    gap = images.new_ones(images.shape[2], 1)
    columns = []
    for image in images[:, 0]:
        columns += [(image - image.min()) / (image.max() - image.min()).clamp(min=1e-9), gap]
    rows: list[list[float]] = torch.cat(columns[:-1], 1).tolist()
    return rows

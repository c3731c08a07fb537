"""What one quantizer does to one value, and the gradient that comes back, read off from the quantizer itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.plotting import Curve, Panel, Picture

POINTS = 121
BETWEEN = 5  # more points where the value jumps, as surrogates may be sharp there


@dataclass(frozen=True)
class Staircase:
    """One element of a tensor moves, all others stay.

    Attributes:
        x: Values of the element, rising.
        y: What the quantizer makes of it in evaluation mode.
        trained: The same in training mode, where several quantizers do something else.
        up: ``dy/dx`` in training mode by autograd, for a loss that grows with ``y``: the surrogate's gradient.
        down: The same for a loss that falls with ``y``, which some surrogates treat differently.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    trained: tuple[float, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]

    @property
    def differs_in_training(self) -> bool:
        """Whether training computes with other values than evaluation."""
        return not torch.allclose(torch.tensor(self.trained), torch.tensor(self.y), rtol=1e-4, atol=1e-6)

    def is_like(self, other: Staircase) -> bool:
        """Whether the curves nearly coincide where both are drawn."""
        low, high = max(self.x[0], other.x[0]), min(self.x[-1], other.x[-1])
        grid = np.linspace(low, high, len(self.x))
        for mine, theirs in zip((self.y, self.trained, self.up), (other.y, other.trained, other.up), strict=True):
            first, second = np.interp(grid, self.x, mine), np.interp(grid, other.x, theirs)
            if np.abs(first - second).mean() > 0.01 * max(float(np.ptp(first)), float(np.abs(first).max()), 1e-9):
                return False
        return True

    @property
    def depends_on_direction(self) -> bool:
        """Whether the gradient depends on the sign of what comes from above."""
        return not torch.allclose(torch.tensor(self.up), torch.tensor(self.down), rtol=1e-4, atol=1e-6)


def staircase(quantizer: nn.Module, values: Tensor, *, place: int | None = None, points: int = POINTS, span: float = 1.0) -> Staircase:
    """Sweep one element of ``values`` over the range of its neighbours, and ask ``quantizer`` and autograd at each point.

    So quantizers that look at a whole tensor (means, maxima, norms) are shown as they act in a network. The quantizer is not changed: each
    point has a copy of its own, as counters and moving averages would run on.

    Args:
        quantizer: Any module that maps a tensor to one of its shape.
        values: A real tensor, such as a weight.
        place: Index of the element in the flattened tensor. Default: the middle of those that share a scale with the most extreme value.
        points: How many values at even distances; there are more where the result jumps.
        span: Width of the sweep, as a multiple of the range of the elements that share its scale.

    Raises:
        SpecError: A tensor that is empty or not finite.
    """
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise SpecError(f"a staircase needs finite values, got a tensor of shape {tuple(values.shape)}. Pass a weight, or activations.")
    values, start = values.detach().cpu().float(), copy.deepcopy(quantizer).cpu()
    index, row = _element(quantizer, values) if place is None else (place, values.flatten())
    low, high = float(row.min()), float(row.max())
    if low == high:
        low, high = low - 1, high + 1
    middle, half = (low + high) / 2, span * (high - low) / 2

    def ask(value: float) -> tuple[float, float, float, float, float]:
        x = values.clone()
        x.view(-1)[index] = value
        with torch.no_grad():
            y = float(copy.deepcopy(start).eval()(x).reshape(-1)[index])
        return (value, y, *_in_training(copy.deepcopy(start), x, index))

    coarse = [ask(value) for value in torch.linspace(middle - half, middle + half, points).tolist()]
    jumps = [(first[0], second[0]) for first, second in pairwise(coarse) if first[1] != second[1]]
    if len(jumps) < points / 3:  # else it is no staircase at this resolution
        coarse += [ask(value) for low, high in jumps for value in torch.linspace(low, high, BETWEEN + 2)[1:-1].tolist()]
    xs, ys, trained, ups, downs = zip(*sorted(coarse), strict=True)
    return Staircase(xs, ys, trained, ups, downs)


def _in_training(quantizer: nn.Module, x: Tensor, index: int) -> tuple[float, float, float]:
    """The value in training mode, and its derivative by the same element for a gradient of 1 and of -1 from above."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = quantizer.train()(x).reshape(-1)[index]
    gradients = []
    for sign in (1.0, -1.0) if y.requires_grad else ():
        (gradient,) = torch.autograd.grad(y, x, y.new_tensor(sign), retain_graph=True, allow_unused=True)
        gradients.append(0.0 if gradient is None else sign * float(gradient.reshape(-1)[index]))
    up, down = gradients or (0.0, 0.0)
    return float(y.detach()), up, down


def _element(quantizer: nn.Module, values: Tensor) -> tuple[int, Tensor]:
    """An element of median size among those that share a scale with the largest magnitude, and all of these."""
    granularity = getattr(quantizer, "granularity", None)
    rows = values.reshape(1, -1) if granularity is None else granularity.flatten(values)
    places = torch.arange(values.numel()).reshape(values.shape)
    indices = places.reshape(1, -1) if granularity is None else granularity.flatten(places)
    row = int(rows.abs().amax(1).argmax())
    order = rows[row].argsort()
    return int(indices[row][order[len(order) // 2]]), rows[row]


def staircase_panels(found: Sequence[tuple[str, Staircase]], what: str) -> tuple[Panel, Panel]:
    """Two panels: values, and gradients, of several staircases by name."""
    low, high = min(one.x[0] for _, one in found), max(one.x[-1] for _, one in found)
    curves: list[Curve] = [Curve("", [low, high], [low, high], "identity")]
    gradients: list[Curve] = []
    for colour, (name, one) in enumerate(found):
        curves.append(Curve(name, one.x, one.y, "step", colour))
        if one.differs_in_training:
            curves.append(Curve("", one.x, one.trained, "step", colour, is_dashed=True))
        gradients.append(Curve(name, one.x, one.up, "line", colour))
        if one.depends_on_direction:
            gradients.append(Curve("", one.x, one.down, "line", colour, is_dashed=True))
    return Panel(what, tuple(curves), "x", "q(x)"), Panel(
        f"{what.partition(' ')[0]}: gradient", tuple(gradients), "x", "dq/dx", has_zero=True
    )


def remarks_on(found: Iterable[Staircase]) -> tuple[str, ...]:
    """What readers of ``staircase_panels`` should know: dashed lines, flat ones."""
    found = list(found)
    said = []
    if any(one.differs_in_training for one in found):
        said.append("Dashed staircases: what training computes, where it is not what evaluation computes.")
    if any(len(set(one.y)) == 1 for one in found):
        said.append("Where a staircase is flat, the quantizer computes from parameters of its own, not from this value.")
    if any(one.depends_on_direction for one in found):
        said.append("Gradients depend on the sign of the gradient from above: dashed where that is negative.")
    return tuple(said)


def quantizer_picture(quantizer: nn.Module, values: Tensor, title: str) -> Picture:
    """The staircase of one quantizer at the elements of ``values``."""
    one = staircase(quantizer, values)
    panels = staircase_panels([("", one)], title)
    return Picture(title, panels, remarks_on([one]))

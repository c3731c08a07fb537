"""The scale of least squared error for a symmetric grid: ``min over alpha of |T - alpha q|**2`` with integer codes ``q``.

Paper: Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference", section 3 (MMSE quantization).
Symbols: T -> a row, alpha -> scale, q -> codes.

For one ``alpha`` the best codes are ``clamp(round(T / alpha), qmin, qmax)``, for fixed codes the best scale is ``<T, q> / <q, q>``.
With the row sorted once, both products follow from prefix sums at the ``qmax - qmin`` places where the code changes, so a candidate
costs a few binary searches however long the row is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CANDIDATES = 512
FEWER = 96  # candidates for grids of more than 16 levels, whose error is smoother and more expensive to evaluate
SPAN = 1e-3  # the smallest candidate relative to the largest
STARTS = 8  # candidates from which codes and scale are improved in turn
ALTERNATIONS = 20
LOOKUPS = 1 << 18  # binary searches done together; bounds the memory
SMALLEST_SCALE = 1e-35  # a row with a smaller one counts as zeros; values of 1e-30 have larger ones at 8 bits


class SortedRows:
    """Rows ``[rows, elements]`` prepared for sums over their codes; ``weights`` (``[elements]``) say how often each element counts."""

    def __init__(self, rows: Tensor, weights: Tensor | None = None) -> None:
        self.values, order = rows.double().sort(dim=1)
        counts = torch.ones_like(self.values) if weights is None else weights.double()[order]
        start = self.values.new_zeros(len(rows), 1)
        self.counts = torch.cat([start, counts.cumsum(1)], 1)
        self.sums = torch.cat([start, (counts * self.values).cumsum(1)], 1)
        self.energy = (counts * self.values.square()).sum(1, keepdim=True)

    def products(self, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """``<T, q>`` and ``<q, q>`` for the codes that each candidate of ``scale`` (``[rows, candidates]``) gives, shaped like it."""
        # the code steps from k - 1 to k at (k - 1/2) alpha
        rises = torch.arange(qmin + 1, qmax + 1, dtype=torch.float64, device=scale.device)
        places = (scale.unsqueeze(2) * (rises - 0.5)).flatten(1)
        index = torch.searchsorted(self.values, places)
        shape = (*scale.shape, len(rises))
        counts_above = (self.counts[:, -1:] - self.counts.gather(1, index)).reshape(shape)
        sums_above = (self.sums[:, -1:] - self.sums.gather(1, index)).reshape(shape)
        with_codes = qmin * self.sums[:, -1:] + sums_above.sum(2)
        squares = qmin**2 * self.counts[:, -1:] + (counts_above * (2 * rises - 1)).sum(2)  # k**2 - (k - 1)**2 = 2 k - 1
        return with_codes, squares


def mmse_scale(rows: Tensor, qmin: int, qmax: int, *, weights: Tensor | None = None, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """The scale ``alpha > 0`` that minimises ``|T - alpha clamp(round(T / alpha), qmin, qmax)|**2`` for each row.

    Short rows are solved exactly: between two neighbours of the breakpoints ``t / (k - 1/2)`` the codes are constant, so one
    candidate from each interval finds the optimum. Longer rows are searched on a geometric grid up to ``1.05 max|T| / qmax``; from
    the best few candidates scale and codes are improved in turn, which never raises the error, until nothing changes.

    Args:
        rows: ``[rows, elements]``, each with its own scale.
        qmin, qmax: Integer range of the codes, ``qmin <= 0 < qmax``.
        weights: How often each element counts, ``[elements]`` (a histogram's counts).
        candidates: Points of the grid.

    Returns:
        ``(scale, error)``: float32 ``[rows]``, scale 1 for rows of zeros; the squared error summed over the row, float64 ``[rows]``.

    Source: Choukroun et al. 2019, section 3.
    """
    steps = qmax - qmin
    is_short = rows.shape[1] * steps <= candidates and weights is None
    candidates = min(candidates, FEWER) if steps > 15 else candidates
    lookups = steps * (rows.shape[1] * steps + 1 if is_short else candidates)
    chunks = torch.split(rows, max(1, LOOKUPS // max(lookups, rows.shape[1])))
    found = [_search(chunk, qmin, qmax, weights, candidates, is_short) for chunk in chunks]
    return torch.cat([scale for scale, _ in found]), torch.cat([error for _, error in found])


def _search(rows: Tensor, qmin: int, qmax: int, weights: Tensor | None, candidates: int, is_short: bool) -> tuple[Tensor, Tensor]:
    table = SortedRows(rows, weights)
    largest = table.values.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    if is_short:
        scale = _one_per_interval(table.values, largest, qmin, qmax)
    else:
        shrink = torch.logspace(0, math.log10(SPAN), candidates, dtype=torch.float64, device=rows.device)
        scale = 1.05 * largest / qmax * shrink
    scale, error = _improve(table, scale, qmin, qmax)
    if not is_short:
        best = scale.gather(1, error.argmin(1, keepdim=True))
        fine = best * torch.linspace(0.9, 1.1, FEWER // 2, dtype=torch.float64, device=rows.device)
        fine, fine_error = _improve(table, fine, qmin, qmax)
        scale, error = torch.cat([scale, fine], 1), torch.cat([error, fine_error], 1)
    error, order = error.topk(min(STARTS, scale.shape[1]), dim=1, largest=False)
    scale = scale.gather(1, order)
    for _ in range(ALTERNATIONS):
        new_scale, new_error = _improve(table, scale, qmin, qmax)
        if not bool((new_error < error * (1 - 1e-12)).any()):
            break
        scale, error = torch.where(new_error < error, new_scale, scale), torch.minimum(new_error, error)
    best = error.argmin(1, keepdim=True)
    scale = scale.gather(1, best).squeeze(1).float()
    is_dead = (table.energy[:, 0] == 0) | (scale < SMALLEST_SCALE)
    return torch.where(is_dead, torch.ones_like(scale), scale), error.gather(1, best).squeeze(1)


def _improve(table: SortedRows, scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """The best scales for the codes that ``scale`` gives, and their squared error."""
    with_codes, squares = table.products(scale, qmin, qmax)
    is_used = (with_codes > 0) & (squares > 0)
    safe = torch.where(is_used, squares, 1.0)
    better = torch.where(is_used, with_codes / safe, scale)
    error = table.energy - torch.where(is_used, with_codes.square() / safe, 0.0)
    return better, error.clamp(min=0)


def _one_per_interval(values: Tensor, largest: Tensor, qmin: int, qmax: int) -> Tensor:
    """A scale from every interval on which the codes do not change."""
    rises = torch.arange(qmin + 1, qmax + 1, dtype=torch.float64, device=values.device) - 0.5
    breaks = (values.unsqueeze(2) / rises).flatten(1)
    breaks = torch.where(breaks > 0, breaks, 4 * largest).sort(dim=1).values
    edges = torch.cat([torch.zeros_like(largest), breaks], 1)
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    return torch.cat([middle, 4 * largest], 1)

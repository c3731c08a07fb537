"""Statistics of what norms read, beside those that they keep from training, whatever the network's structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowbit.errors import LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.network.calls import on_input
from lowbit.network.layers import BATCH_NORMS

EPSILON = 1e-6  # added to variances before their square root is taken


@dataclass(frozen=True)
class KeptStatistics:
    """What a norm keeps from training: mean and deviation ``sqrt(variance + 1e-6)`` of each channel."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class ChannelStatistics:
    """What a norm reads in one of its calls.

    Attributes:
        name: The norm; with ``#2`` and so on from its second call in a pass on.
        mean, std: ``[rows, channels]``, a row for each sample; one row for all of them where a norm reads one value per channel and sample.
        kept: What the norm keeps from training.
    """

    name: str
    mean: Tensor
    std: Tensor
    kept: KeptStatistics


def channel_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and ``sqrt(variance + 1e-6)`` of each channel over space, sample by sample; the variance is the unbiased one.

    Where there is no space, or one position, they are taken over the samples.

    Args:
        values: ``[samples, channels, ...]``.

    Returns:
        Two tensors ``[samples, channels]``, or ``[1, channels]``; at least float32.

    Example:
        >>> mean, std = channel_statistics(torch.tensor([[[1.0, 3.0]], [[4.0, 4.0]]]))
        >>> mean.tolist(), [[round(float(value), 3) for value in row] for row in std]
        ([[2.0], [4.0]], [[1.414], [0.001]])
        >>> channel_statistics(torch.tensor([[1.0], [3.0]]))[0].tolist()
        [[2.0]]
    """
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    values = values.flatten(2) if values.dim() > 2 else values[..., None]
    if values.shape[2] == 1:
        values = values.transpose(0, 2)
    if values.shape[2] == 1:
        raise SpecError("one sample has no deviation where there is one value per channel: pass count=2 or more.")
    mean, std = _MeanStd.apply(values)
    return mean, std


class _MeanStd(torch.autograd.Function):
    """Mean and ``sqrt(variance + 1e-6)`` over the last of three dimensions.

    Several times as fast on processors as torch's variance and its gradient, which take most of a step otherwise: two passes forward, one back.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(2)
        deviation = torch.linalg.vector_norm(values - mean[..., None], dim=2)
        std = (deviation.square() / (values.shape[2] - 1) + EPSILON).sqrt()
        ctx.save_for_backward(values, mean, std)
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_gradient: Tensor, std_gradient: Tensor) -> Tensor:
        """``d mean / d x = 1 / n``, ``d std / d x = (x - mean) / ((n - 1) std)``."""
        values, mean, std = ctx.saved_tensors
        count = values.shape[2]
        slope = std_gradient / (std * (count - 1))
        return torch.addcmul((mean_gradient / count - mean * slope)[..., None], values, slope[..., None])


def kept_statistics(model: nn.Module) -> tuple[dict[str, KeptStatistics], tuple[str, ...]]:
    """What each norm of ``model`` keeps, by name, and notes on norms that are left out.

    A norm is any module with running statistics: batch norms, frozen ones of other packages, instance norms that track them.

    Raises:
        LayerError: None has statistics from training, or some are not finite.
    """
    found: dict[str, KeptStatistics] = {}
    without, unused = [], []
    for name, module in model.named_modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            without += [name] * isinstance(module, BATCH_NORMS)
            continue
        if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()) or bool((variance < 0).any()):
            raise LayerError(f"norm {name!r} ({type(module).__name__}): its running statistics hold NaN, infinity or a negative variance.")
        if bool((mean == 0).all() and (variance == 1).all()):
            unused.append(name)
            continue
        found[name] = KeptStatistics(_wide(mean), (_wide(variance) + EPSILON).sqrt())
    if not found:
        raise LayerError(f"{type(model).__name__}: {_nothing_kept(without, unused)} {INSTEAD}")
    notes = [f"{_listed(without)}: no running statistics (track_running_stats=False)"] if without else []
    notes += [f"{_listed(unused)}: mean 0 and variance 1, as of a norm that has never seen data"] if unused else []
    return found, tuple(f"left out: {note}" for note in notes)


INSTEAD = "Pass calibration data instead (calibration=, a few hundred unlabelled samples): all methods that need samples take them."


def _nothing_kept(without: list[str], unused: list[str]) -> str:
    if not without and not unused:
        return "samples are made to match the statistics of batch norms, and it has none."
    if unused:
        return (
            f"no batch norm has statistics from training; mean 0 and variance 1, as of a norm that has never seen data: {_listed(unused)}. "
            "Load trained weights, their buffers included."
        )
    return f"no batch norm keeps running statistics (track_running_stats=False): {_listed(without)}."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _wide(values: Tensor) -> Tensor:
    return values.detach().clone() if values.dtype == torch.float64 else values.detach().float()


@contextmanager
def watching(model: nn.Module, kept: Mapping[str, KeptStatistics]) -> Iterator[list[ChannelStatistics]]:
    """Within the context every pass of ``model`` leaves, in the list, statistics of what each norm read, in the order of the calls.

    They are computed as a norm is called, so that operations in place behind it do not matter, and hold their graph.
    """
    found: list[ChannelStatistics] = []
    calls: Counter[str] = Counter()

    def begin(_module: nn.Module, _args: object) -> None:
        found.clear()
        calls.clear()

    def note(name: str, values: Tensor) -> None:
        calls[name] += 1
        try:
            mean, std = channel_statistics(values)
        except SpecError as error:
            raise SpecError(f"norm {name!r}: {error}") from error
        found.append(ChannelStatistics(name if calls[name] == 1 else f"{name}#{calls[name]}", mean, std, kept[name]))

    handles = [model.register_forward_pre_hook(begin, prepend=True)]
    handles += [on_input(model.get_submodule(name), partial(note, name)) for name in kept]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Match:
    """How near samples come to what a norm keeps; in units of its deviations, over all channels together.

    Attributes:
        mean_error: ``sqrt(mean_n sum_c (m_nc - mu_c)^2 / sum_c sigma_c^2)`` for the mean ``m_nc`` of channel ``c`` in sample ``n``.
        std_error: The same for deviations.
        spread: How much samples differ: ``sqrt(sum_c var_n(m_nc) / sum_c sigma_c^2)``; ``None`` where there is one row for all samples.
    """

    mean_error: float
    std_error: float
    spread: float | None

    @staticmethod
    def of(mean: Tensor, std: Tensor, kept: KeptStatistics) -> Match:
        """The match of rows of statistics.

        >>> kept = KeptStatistics(torch.tensor([1.0]), torch.tensor([2.0]))
        >>> Match.of(torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0], [5.0]]), kept)
        Match(mean_error=1.4..., std_error=1.1..., spread=1.4...)
        """
        mean, std, kept_mean, kept_std = (values.detach().double().cpu() for values in (mean, std, kept.mean, kept.std))
        unit = kept_std.square().sum()

        def distance(values: Tensor, target: Tensor) -> float:
            return float(((values - target).square().sum(1).mean() / unit).sqrt())

        spread = float((mean.var(0).sum() / unit).sqrt()) if len(mean) > 1 else None
        return Match(distance(mean, kept_mean), distance(std, kept_std), spread)


@torch.no_grad()
def measure_match(model: nn.Module, kept: Mapping[str, KeptStatistics], batches: Iterable[Inputs]) -> dict[str, Match]:
    """How near the samples of ``batches`` come to what each norm keeps, by the norm and its call.

    Raises:
        LayerError: A norm's input is not finite.
    """
    rows: dict[str, list[ChannelStatistics]] = {}
    with watching(model, kept) as statistics:
        for inputs in batches:
            model(*inputs.args, **inputs.kwargs)
            for one in statistics:
                rows.setdefault(one.name, []).append(one)
    found = {}
    for name, parts in rows.items():
        mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise LayerError(f"norm {name!r}: what it reads holds NaN or infinity.")
        found[name] = Match.of(mean, std, parts[0].kept)
    return found

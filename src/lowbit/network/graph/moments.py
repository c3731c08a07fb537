"""Mean, deviation and range of every tensor of a network without data, from what its batch norms say.

Paper: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV.
    Section 4.2.1 and appendix C (clipped normal distributions), section 5 (activation ranges).

The output of a layer with a folded batch norm is normal with the norm's mean and deviation. Everything else follows by rules that
take channels, and the operands of adds and products, as independent. All maths is in float64: float32 differences cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from lowbit.network.graph.channels import (
    MOVING,
    Channels,
    block_read,
    by_output_channel,
    channels_made,
    clip_limits,
    follow,
    groups_of,
    response,
)
from lowbit.network.graph.dataflow import Dataflow, Node
from lowbit.network.insert import float_weight
from lowbit.network.layers import TRANSPOSED
from lowbit.network.surgery.fold import EXACT_NORMS

POINTWISE = frozenset({
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "elu", "silu", "hardswish", "gelu", "sigmoid", "hardsigmoid",
    "tanh", "softplus", "mish", "neg", "abs", "add", "sub", "rsub", "mul", "div",
})  # fmt: skip
# channels are lost, values are not changed
REGROUPING = MOVING | {"chunk", "split", "split_with_sizes", "unbind", "getitem", "slice", "select", "narrow", "expand",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle",
}  # fmt: skip
NODES, REACH = 401, 8.0  # points and reach, in deviations, of the quadrature over a normal distribution


@dataclass(frozen=True)
class Moments:
    """What is known about a tensor without data.

    Attributes:
        mean, std: Mean and deviation of each channel, float64 ``[channels]``.
        lo, hi: The range of each channel.
        channels: Where the channels are; ``None`` when one distribution, shape ``[1]``, stands for all of them.
    """

    mean: Tensor
    std: Tensor
    lo: Tensor
    hi: Tensor
    channels: Channels | None = None

    @staticmethod
    def normal(mean: Tensor, std: Tensor, n_sigma: float, channels: Channels | None = None) -> Moments:
        """Normal channels that reach ``n_sigma`` deviations to either side."""
        mean, std = mean.detach().cpu().double(), std.detach().cpu().double().abs()
        return Moments(mean, std, mean - n_sigma * std, mean + n_sigma * std, channels)

    @staticmethod
    def uniform(lo: float, hi: float) -> Moments:
        """All values from ``lo`` to ``hi`` equally likely."""
        low, high = (torch.tensor([end], dtype=torch.float64) for end in (lo, hi))
        return Moments((low + high) / 2, (high - low) / math.sqrt(12), low, high)

    def range(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end over all channels, scalars."""
        return self.lo.min(), self.hi.max()

    def pooled(self) -> Moments:
        """One distribution for all channels together."""
        mean = self.mean.mean(0, keepdim=True)
        variance = self.std.square().mean(0, keepdim=True) + (self.mean - mean).square().mean(0, keepdim=True)
        return Moments(mean, variance.sqrt(), self.lo.amin(0, keepdim=True), self.hi.amax(0, keepdim=True))


def clipped_normal_moments(mean: Tensor, std: Tensor, low: float = 0.0, high: float = math.inf) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``clip(x, low, high)`` for normal ``x``, in float64; a ReLU by default.

    With ``al = (a - mu) / sg``, ``be = (b - mu) / sg``, ``Z = Phi(be) - Phi(al)``:
    ``m = sg (phi(al) - phi(be)) + mu Z + a Phi(al) + b (1 - Phi(be))``,
    ``var = Z (mu^2 + sg^2 + m^2 - 2 m mu) + sg (a phi(al) - b phi(be)) + sg (mu - 2 m) (phi(al) - phi(be)) + (a - m)^2 Phi(al)
    + (b - m)^2 (1 - Phi(be))``; terms of an infinite end are 0. Without deviation the mean itself is clipped.

    Args:
        mean, std: Equal shapes; the sign of ``std`` does not count.
        low, high: Limits of the clip; infinite for no limit.

    Source: appendix C.
    """
    mu, sg = mean.double(), std.double().abs()
    is_fixed = sg == 0
    safe = torch.where(is_fixed, 1.0, sg)
    al, be = (low - mu) / safe, (high - mu) / safe
    below, above = torch.special.ndtr(al), torch.special.ndtr(-be)
    inside = torch.where(al > 0, torch.special.ndtr(-al) - above, torch.special.ndtr(be) - below)  # in the tail that is the smaller
    at_low, at_high = _density(al), _density(be)
    a, b = (end if math.isfinite(end) else 0.0 for end in (low, high))
    m = safe * (at_low - at_high) + mu * inside + a * below + b * above
    variance = (
        inside * (mu.square() + safe.square() + m.square() - 2 * m * mu)
        + safe * (a * at_low - b * at_high)
        + safe * (mu - 2 * m) * (at_low - at_high)
        + (a - m).square() * below
        + (b - m).square() * above
    )
    return torch.where(is_fixed, mu.clamp(low, high), m), torch.where(is_fixed, 0.0, variance.clamp(min=0))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def mapped(x: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of ``function(x)``, by quadrature over the normal distribution of that mean and deviation."""
    points = torch.linspace(-REACH, REACH, NODES, dtype=torch.float64)
    weights = _density(points) / _density(points).sum()
    values = function(x.mean[:, None] + x.std[:, None] * points)
    mean = values @ weights
    variance = (values - mean[:, None]).square() @ weights
    span = function(x.lo[:, None] + (x.hi - x.lo)[:, None] * torch.linspace(0, 1, NODES, dtype=torch.float64))
    return Moments(mean, variance.sqrt(), span.amin(1), span.amax(1), x.channels)


def clipped(x: Moments, low: float, high: float) -> Moments:
    """Moments of ``clip(x, low, high)``; what lies within already stays as it is."""
    if bool((x.lo >= low).all()) and bool((x.hi <= high).all()):
        return x
    mean, variance = clipped_normal_moments(x.mean, x.std, low, high)
    return Moments(mean, variance.sqrt(), x.lo.clamp(low, high), x.hi.clamp(low, high), x.channels)


def limited(x: Moments, limit: Tensor) -> Moments:
    """Moments of ``min(max(x, 0), limit)`` for a limit of each channel; a channel whose limit is not above 0 is 0."""
    limit = limit.clamp(min=1e-12)
    unit = clipped(Moments(x.mean / limit, x.std / limit, x.lo / limit, x.hi / limit, x.channels), 0.0, 1.0)
    return Moments(unit.mean * limit, unit.std * limit, unit.lo * limit, unit.hi * limit, x.channels)


def added(x: Moments, y: Moments, n_sigma: float) -> Moments:
    """Moments of ``x + y`` for independent operands: means and variances add; the range is that of ``n_sigma`` deviations, within the sum of ranges."""
    mean, std = x.mean + y.mean, (x.std.square() + y.std.square()).sqrt()
    lo, hi = torch.maximum(x.lo + y.lo, mean - n_sigma * std), torch.minimum(x.hi + y.hi, mean + n_sigma * std)
    return Moments(mean, std, lo, hi, x.channels or y.channels)


def multiplied(x: Moments, y: Moments) -> Moments:
    """Moments of ``x y`` for independent operands."""
    variance = x.std.square() * y.std.square() + x.std.square() * y.mean.square() + y.std.square() * x.mean.square()
    ends = torch.stack(torch.broadcast_tensors(x.lo * y.lo, x.lo * y.hi, x.hi * y.lo, x.hi * y.hi))
    return Moments(x.mean * y.mean, variance.sqrt(), ends.amin(0), ends.amax(0), x.channels or y.channels)


def layer_moments(layer: nn.Module, x: Moments, n_sigma: float, made: Channels | None) -> Moments | None:
    """Moments of a layer's output from those of its input: ``E[y] = W E[x] + b``, ``Var[y] = W^2 Var[x]``.

    ``None`` where the input's channels are not those that the layer reads.
    """
    weight, groups = by_output_channel(layer, float_weight(layer).detach()).cpu().double(), groups_of(layer)
    inputs = weight.shape[1] * groups
    if x.mean.numel() not in (1, inputs):
        return None
    # a strided transposed convolution spreads each input over that many outputs
    shared = math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else 1
    mean = response(weight, x.mean.expand(inputs), groups) / shared
    variance = response(weight.square(), x.std.square().expand(inputs), groups) / shared
    if layer.bias is not None:
        mean = mean + layer.bias.detach().cpu().double()  # type: ignore[operator]
    return Moments.normal(mean, variance.sqrt(), n_sigma, made)


AtLayer = Callable[[str, Moments], None]


class MomentsWalk:
    """Moments of every tensor of a network, in execution order.

    Args:
        model: The network, batch norms folded; quantized weights count as their float ones.
        dataflow: Dataflow of the network.
        statistics: Mean and deviation of layers' outputs before the activation.
        inputs: Moments of the network's inputs.
        n_sigma: Width of ranges, in deviations.
        at_layer: Called with each layer and the moments of its inputs, one per input channel, before the moments of its output are
            computed; it may change ``statistics``.
    """

    def __init__(
        self, model: nn.Module, dataflow: Dataflow, statistics: Mapping[str, tuple[Tensor, Tensor]], inputs: Moments, *, n_sigma: float = 6.0,
        at_layer: AtLayer | None = None,
    ) -> None:  # fmt: skip
        self.model, self.dataflow, self.statistics, self.n_sigma, self.at_layer = model, dataflow, statistics, n_sigma, at_layer
        self.known: dict[str, Moments] = {}
        for node in dataflow.nodes:
            found = replace(inputs, channels=None) if node.op == "input" else self._of(node) if node.is_activation else None
            if found is not None and bool(torch.isfinite(torch.cat([found.mean, found.std, found.lo, found.hi])).all()):
                self.known[node.name] = found

    def blocking(self, name: str) -> Node:
        """The operation because of which the moments of the tensor ``name`` are not known."""
        node = self.dataflow[name]
        while unknown := [before for before in self.dataflow.producers(node) if before.name not in self.known]:
            node = unknown[0]
        return node

    def _of(self, node: Node) -> Moments | None:
        before = self.dataflow.producers(node)
        if any(other.name not in self.known for other in before):
            # a batch norm knows its output's moments, whatever it reads
            return (
                self._of_layer(node, None, None)
                if node.layer in self.statistics
                else self._of_norm(node)
                if node.op == "batch_norm"
                else None
            )
        found = [self.known[other.name] for other in before]
        if node.layer is not None:
            return self._of_layer(node, before[0], found[0])
        if node.op == "batch_norm":
            return self._of_norm(node)
        if node.op == "cat":
            return self._of_cat(node, before, found)
        if len(before) == 2 and node.op != "silu":  # whose gate follows from its input
            return self._of_two(node, before, found)
        return self._of_one(node, before[0], found[0]) if len(before) in (1, 2) else None

    def _of_layer(self, node: Node, before: Node | None, x: Moments | None) -> Moments | None:
        layer = self.model.get_submodule(str(node.layer))
        made = channels_made(layer, node)
        if before is not None and x is not None:
            x = self._as_read(layer, before, x)
            if self.at_layer is not None:
                self.at_layer(str(node.layer), x)
        if node.layer is not None and node.layer in self.statistics and made is not None:
            return Moments.normal(*self.statistics[node.layer], self.n_sigma, made)
        return None if x is None else layer_moments(layer, x, self.n_sigma, made)

    @staticmethod
    def _as_read(layer: nn.Module, before: Node, x: Moments) -> Moments:
        """The moments with one entry for each input of the layer, or pooled."""
        block = None if x.channels is None else block_read(layer, before, x.channels)
        if block is None or x.channels is None:
            return x.pooled()
        mean, std, lo, hi = (value.repeat_interleave(block) for value in (x.mean, x.std, x.lo, x.hi))
        return Moments(mean, std, lo, hi, replace(x.channels, count=x.channels.count * block, block=1))

    def _of_norm(self, node: Node) -> Moments | None:
        norm = self.model.get_submodule(node.owner)
        if not isinstance(norm, EXACT_NORMS) or len(node.shape) < 2:
            return None
        mean, std = (torch.full((norm.num_features,), value) for value in (0.0, 1.0))
        if norm.affine:
            mean, std = norm.bias, norm.weight
        return Moments.normal(mean, std, self.n_sigma, Channels(1, norm.num_features))

    def _of_cat(self, node: Node, before: Sequence[Node], found: Sequence[Moments]) -> Moments | None:
        axis = int(node.arguments[1]) % len(node.shape) if len(node.arguments) > 1 else 0  # type: ignore[call-overload]
        parts = [x.channels for x in found]
        if all(c is not None and c.axis == axis and c.block == 1 for c in parts) and sum(x.mean.numel() for x in found) == node.shape[axis]:
            mean, std, lo, hi = (torch.cat(values) for values in zip(*((x.mean, x.std, x.lo, x.hi) for x in found), strict=True))
            return Moments(mean, std, lo, hi, Channels(axis, node.shape[axis]))
        pooled = [x.pooled() for x in found]
        mean, std, lo, hi = (torch.cat(values) for values in zip(*((x.mean, x.std, x.lo, x.hi) for x in pooled), strict=True))
        return Moments(mean, std, lo, hi).pooled()

    def _of_two(self, node: Node, before: Sequence[Node], found: Sequence[Moments]) -> Moments | None:
        x, y = found
        if node.arguments[:2] != tuple(other.name for other in before):
            return None
        if (x.channels != y.channels and None not in (x.channels, y.channels)) or len(before[0].shape) != len(before[1].shape):
            x, y = x.pooled(), y.pooled()
        if node.op == "mul":
            return multiplied(x, y)
        if node.op == "sub":
            y = replace(y, mean=-y.mean, lo=-y.hi, hi=-y.lo)
        return added(x, y, self.n_sigma) if node.op in ("add", "sub") else None

    def _of_one(self, node: Node, before: Node, x: Moments) -> Moments | None:
        if node.op in REGROUPING:
            channels = None if x.channels is None or node.op not in MOVING else follow(node, before, x.channels)
            return x.pooled() if channels is None else replace(x, channels=channels)
        if node.op == "channel_clip":
            limit = self.model.get_submodule(node.owner).limit
            assert isinstance(limit, Tensor)
            return limited(x, limit.detach().cpu().double().flatten())
        if node.op == "prelu":
            slope = getattr(self.model.get_submodule(node.owner), "weight", None)
            if not isinstance(slope, Tensor) or slope.numel() not in (1, x.mean.numel()):
                return None
            slopes = slope.detach().cpu().double().reshape(-1, 1)
            return mapped(x, lambda v: torch.where(v > 0, v, v * slopes))
        rest = node.arguments[1:]
        if node.op not in POINTWISE or node.arguments[0] != before.name or not all(v is None or isinstance(v, Real) for v in rest):
            return None  # where it is no number, a parameter is read, or the tensor itself once more
        limits = clip_limits(node)
        if limits is not None:
            return clipped(x, *limits)
        operator = getattr(torch.ops.aten, node.op)
        return mapped(x, lambda v: operator(v, *rest))

"""Distance between two tensors: signal-to-quantization-noise ratio, mean squared and largest error, streamed over batches."""

from __future__ import annotations

import math

from torch import Tensor


class Noise:
    """Error statistics of a tensor that arrives in pieces; sums are kept in double precision.

    The reported ratio is ``sqnr_db = 10 log10(var(reference) / mean((quantized - reference)**2))`` with the variance over all
    elements seen. A constant offset of the reference carries no information, so it is not counted as signal;
    ``signal_sqnr_db`` has the mean square in place of the variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.max_abs_error = 0.0
        self._mean = self._spread = self._power = self._error = 0.0

    def add(self, reference: Tensor, quantized: Tensor) -> None:
        """Add one more piece; both tensors have the same shape."""
        if reference.shape != quantized.shape:
            raise ValueError(f"cannot compare shapes {tuple(reference.shape)} and {tuple(quantized.shape)}")
        if reference.numel() == 0:
            return
        x, error = reference.detach().double(), quantized.detach().double() - reference.detach().double()
        count, mean = x.numel(), x.mean().item()
        total, step = self.count + count, mean - self._mean
        # Chan's update: the variance of all pieces without keeping them and without cancellation
        self._spread += (x - mean).square().sum().item() + step * step * self.count * count / total
        self._mean += step * count / total
        self._power += x.square().sum().item()
        self._error += error.square().sum().item()
        worst = error.abs().amax().item()
        self.max_abs_error = math.nan if math.isnan(worst) or math.isnan(self.max_abs_error) else max(self.max_abs_error, worst)
        self.count = total

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self._error / self.count if self.count else math.nan

    @property
    def sqnr_db(self) -> float:
        """``10 log10(variance / mean squared error)``; infinite for equal tensors, NaN for nothing seen or values that are not finite."""
        return decibels(self._spread, self._error) if self.count else math.nan

    @property
    def signal_sqnr_db(self) -> float:
        """``10 log10(mean square / mean squared error)``."""
        return decibels(self._power, self._error) if self.count else math.nan


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise, minus infinite without signal, NaN where either is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def noise_between(reference: Tensor, quantized: Tensor) -> Noise:
    """Error statistics of two whole tensors."""
    noise = Noise()
    noise.add(reference, quantized)
    return noise


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """``10 log10(var(reference) / mean((quantized - reference)**2))`` over all elements."""
    return noise_between(reference, quantized).sqnr_db

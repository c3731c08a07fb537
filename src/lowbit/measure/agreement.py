"""How closely a quantized network follows the float one on the same inputs; no labels needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.inputs import Inputs
from lowbit.measure.noise import Noise
from lowbit.measure.outputs import batch_count, class_dimension, device_of, output_tensor
from lowbit.network.batch import calibration_for
from lowbit.network.layers import evaluating
from lowbit.progress import Progress


def has_classes(logits: Tensor) -> bool:
    """Whether there are two classes or more to choose from."""
    return logits.dim() >= 2 and logits.shape[class_dimension(logits)] >= 2


def kl_divergence(reference: Tensor, quantized: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(quantized))`` of each prediction, in nats and float64.

    >>> import torch
    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([0.1201], dtype=torch.float64)
    """
    dim = class_dimension(reference)
    wanted, got = (functional.log_softmax(x.double(), dim) for x in (reference, quantized))
    return (wanted.exp() * (wanted - got)).sum(dim)


@dataclass(frozen=True)
class Agreement:
    """Result of ``measure_agreement``.

    Attributes:
        samples: Samples compared.
        sqnr_db: ``10 log10(var(float logits) / mean squared error)``; infinite when the outputs are equal.
        signal_sqnr_db: The same with the mean square of the float logits in place of their variance.
        max_abs_error: Largest difference of a logit.
        kl: Mean Kullback-Leibler divergence of the softmax outputs in nats, ``KL(float || quantized)``; ``None`` for outputs
            with fewer than two classes.
        top1: Fraction of predictions whose largest logit is the same class; ``None`` for outputs with fewer than two classes.
    """

    samples: int
    sqnr_db: float
    signal_sqnr_db: float
    max_abs_error: float
    kl: float | None
    top1: float | None


class AgreementMeter:
    """Adds up the agreement of pairs of outputs."""

    def __init__(self) -> None:
        self.noise = Noise()
        self.samples = 0
        self._divergence, self._same, self._predictions = 0.0, 0, 0

    def add(self, reference: Tensor, quantized: Tensor, samples: int) -> None:
        """Count the outputs of one batch of ``samples``."""
        if reference.shape != quantized.shape:
            raise DataError(f"the networks' outputs differ in shape: {tuple(reference.shape)} and {tuple(quantized.shape)}")
        self.noise.add(reference, quantized)
        self.samples += samples
        if not has_classes(reference):
            return
        dim = class_dimension(reference)
        self._divergence += kl_divergence(reference, quantized).sum().item()
        same = reference.argmax(dim) == quantized.argmax(dim)
        self._same += int(same.sum())
        self._predictions += same.numel()

    def result(self) -> Agreement:
        """The figures over everything added so far."""
        n = self._predictions
        kl, top1 = (self._divergence / n, self._same / n) if n else (None, None)
        return Agreement(self.samples, self.noise.sqnr_db, self.noise.signal_sqnr_db, self.noise.max_abs_error, kl, top1)


def measure_agreement(
    reference: nn.Module,
    model: nn.Module,
    data: object,
    *,
    output: str | int | None = None,
    watch: Callable[[Inputs, Tensor, Tensor], None] | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """Run both networks over the same batches and compare their outputs.

    Both are run in evaluation mode without gradients; their training flags are restored.

    Args:
        reference: The float network.
        model: The quantized network.
        data: Batches as for calibration; labels are dropped.
        output: Entry of the output to compare; default: the first floating-point tensor.
        watch: Called with the inputs and both outputs of each batch.
        progress: Progress display; default: silent.

    Raises:
        CalibrationError: No batch, or inputs that are not finite.
        DataError: The outputs hold no such entry or differ in shape.
    """
    calibration = calibration_for(reference, data)
    meter = AgreementMeter()
    with (
        evaluating(reference),
        evaluating(model),
        (progress or Progress.silent()).stage("agreement", total=batch_count(data, calibration)) as stage,
    ):
        for inputs in calibration:
            wanted = run_output(reference, inputs, output)
            got = run_output(model, inputs, output).to(wanted.device)
            meter.add(wanted, got, inputs.batch_size)
            if watch is not None:
                watch(inputs, wanted, got)
            stage.advance()
    return meter.result()


def run_output(model: nn.Module, inputs: Inputs, output: str | int | None = None) -> Tensor:
    """The output tensor to measure of one call, on the model's device."""
    inputs = inputs.to(device_of(model))
    return output_tensor(model(*inputs.args, **inputs.kwargs), output)

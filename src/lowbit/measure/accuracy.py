"""Top-1 and top-5 accuracy of a classifier on labelled data."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass

from torch import nn

from lowbit.errors import DataError
from lowbit.measure.outputs import class_dimension, device_of, labelled, output_tensor
from lowbit.network.layers import evaluating
from lowbit.progress import Progress


@dataclass(frozen=True)
class Accuracy:
    """Fractions from 0 to 1; ``top5`` is ``None`` where there are five classes or fewer."""

    top1: float
    top5: float | None
    samples: int


def measure_accuracy(
    model: nn.Module, data: Iterable[object], *, output: str | int | None = None, progress: Progress | None = None
) -> Accuracy:
    """Run ``model`` over labelled batches and count how often the label is the first, or among the first five, of its logits.

    The model is run in evaluation mode without gradients; its training flags are restored. Dense predictions
    ``[n, classes, h, w]`` are counted per position against labels ``[n, h, w]``. Ties go to the lower class number.

    Args:
        model: The network.
        data: Batches of ``(inputs, labels)``, or mappings with a ``labels`` entry.
        output: Which entry of the output holds the logits; the first floating-point tensor when left out.
        progress: Where to show progress; silent when left out.

    Raises:
        DataError: No batch, no labels, labels that are not class numbers of this network, or labels of another shape than the predictions.
    """
    device = device_of(model)
    top1 = top5 = count = 0
    classes = 0
    total = len(data) if isinstance(data, Sized) else 0
    with evaluating(model), (progress or Progress.silent()).stage("accuracy", total=total) as stage:
        for batch in data:
            inputs, labels = labelled(batch)
            inputs, labels = inputs.to(device), labels.to(device)
            logits = output_tensor(model(*inputs.args, **inputs.kwargs), output)
            dim = class_dimension(logits)
            classes = logits.shape[dim]
            if labels.dim() == logits.dim() and labels.shape[dim] == 1:
                labels = labels.squeeze(dim)
            predicted = logits.argmax(dim)
            if predicted.shape != labels.shape:
                wrong, right = tuple(labels.shape), tuple(predicted.shape)
                raise DataError(f"labels of shape {wrong} do not fit logits of shape {tuple(logits.shape)}; expected {right}")
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                span = f"from {int(labels.min())} to {int(labels.max())}"
                raise DataError(f"labels run {span}, but the network has {classes} classes (0 to {classes - 1})")
            top1 += int((predicted == labels).sum())
            top5 += int((logits.topk(min(5, classes), dim).indices == labels.unsqueeze(dim)).sum())
            count += labels.numel()
            stage.advance(note=f"{top1 / max(count, 1):.1%}")
    if count == 0:
        raise DataError("accuracy: the data holds no sample. Pass a loader with at least one labelled batch.")
    return Accuracy(top1 / count, top5 / count if classes > 5 else None, count)

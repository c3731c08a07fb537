"""``lowbit.evaluate``: the metrics of a network on its task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from lowbit.inputs import known_length, map_tensors
from lowbit.measure.outputs import device_of
from lowbit.network.layers import evaluating
from lowbit.progress import Progress
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.qat.task import Batch, Criterion, Meter, Scores, Task
from lowbit.qat.tasks import as_task


def evaluate(
    model: nn.Module,
    data: object,
    *,
    task: Task | Criterion | str | None = None,
    batch_size: int = 128,
    progress: bool | Progress | None = None,
) -> Scores:
    """The metrics of a task on labelled data.

    The network is run in evaluation mode without gradients; its training flags are restored.

    Args:
        model: Any network: float, quantized, or one from ``lowbit.load``.
        data: Labelled data of the kinds that ``lowbit.train`` takes.
        task: What the network is for; default: classification.
        batch_size: Samples of a call where ``data`` are no batches yet.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.

    Returns:
        The metrics by name: ``evaluate(model, data)["accuracy"]``; ``.value`` is the one that selects.

    Raises:
        DataError: No sample, or targets that do not fit the network.

    Example:
        >>> import torch
        >>> evaluate(torch.nn.Identity(), (torch.eye(4), torch.tensor([0, 1, 2, 0])))["accuracy"]
        0.75
    """
    meter = Meter(as_task(task))
    for part in measured_batches(model, evaluation_batches(data, batch_size), meter.task, Progress.of(progress)):
        meter.merge(part.sums, part.samples)
    return meter.scores()


def measured_batches(model: nn.Module, batches: Iterable[Batch], task: Task, progress: Progress) -> Iterator[Meter]:
    """The metrics of each batch, in order; errors as ``evaluate``."""
    device = device_of(model)
    with evaluating(model), progress.stage("evaluation", total=known_length(batches) or 0) as stage:
        for batch in batches:
            batch, meter = map_tensors(batch, lambda tensor: tensor.to(device)), Meter(task)
            meter.add(task.predict(model, batch), batch)
            yield meter
            stage.advance()

"""Checks that data, preprocessing and classes fit a network; a misfit is an error or a note."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lowbit.errors import CalibrationError, LowbitError
from lowbit.inputs import Inputs
from lowbit.measure.norm_shift import first_norm_shift
from lowbit.measure.outputs import class_dimension, output_tensor
from lowbit.network.layers import evaluating
from lowbit.provenance import Provenance
from lowbit.qat.task import Scores, Task


def fit_notes(model: nn.Module, name: str, sample: Inputs, facts: Provenance) -> tuple[str, ...]:
    """What the user should know of how the inputs and the classes fit the network.

    Raises:
        CalibrationError: The network cannot take these inputs; says their shape and what made them.
    """
    try:
        try:
            outputs = count_outputs(model, sample.take(0, 1))
        except Exception:  # it may need more than one sample
            outputs = count_outputs(model, sample)
    except LowbitError:
        raise
    except Exception as error:  # whatever the network raises
        made = "" if facts.preprocessing is None else f" They are made by the preprocessing {facts.preprocessing}."
        advice = "Change it with preprocess=, or name data that fits the network with data= or calibration=."
        raise misfit(name, sample, error, advice, made) from error
    notes = []
    if outputs is not None and 0 < len(facts.classes) < outputs:  # labels beyond the outputs are an error where they are met
        notes.append(
            f"the network has {outputs} outputs, {facts.data or 'the list of names'} has {len(facts.classes)} classes: class k is taken to be "
            "output k, so that metrics mean nothing if the network counts them in another way"
        )
    is_noise = facts.data is None and facts.calibration is None
    shift = None if is_noise else first_norm_shift(model, sample)
    if shift is not None and shift.is_large:
        notes.append(
            f"the inputs look unlike those that the network was trained on: at its first batch norm, {shift.name}, their variance is "
            f"{shift.variance_ratio:.3g} times that of the training, their mean {shift.mean_shift:.2g} standard deviations away. Check the "
            f"preprocessing: {facts.preprocessing or 'that of the data'}"
        )
    return tuple(notes)


def misfit(name: str, sample: Inputs, error: Exception, advice: str, made: str = "") -> CalibrationError:
    """The error for inputs with which a network raises ``error``."""
    if isinstance(error, LowbitError):
        raise error
    shapes = ", ".join(" x ".join(map(str, tensor.shape[1:])) for tensor in sample.tensors)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CalibrationError(f"the network {name} cannot take inputs of shape {shapes} ({reason}).{made} {advice}")


def count_outputs(model: nn.Module, sample: Inputs) -> int | None:
    """The number of classes that the network distinguishes; ``None`` where its output has no such dimension."""
    with evaluating(model):
        output = model(*sample.args, **sample.kwargs)
    try:
        logits = output_tensor(output)
    except LowbitError:
        return None
    return logits.shape[class_dimension(logits)] if logits.dim() > 1 else None


def doubtful(task: Task, scores: Mapping[str, Scores | None], outputs: int | None) -> tuple[str, ...]:
    """A sentence for each network, by name, whose metrics are no better than guessing among that many outputs."""
    found = {} if outputs is None else {name: task.doubt(score, outputs) for name, score in scores.items() if score is not None}
    return tuple(f"{name}: {doubt}" for name, doubt in found.items() if doubt)

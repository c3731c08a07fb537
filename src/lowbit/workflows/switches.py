"""What a network with several widths gives and costs at each of them, and which layers give up bits first where each has its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from lowbit.inputs import Inputs
from lowbit.measure import measure_latency
from lowbit.measure.cost import compute_cost
from lowbit.measure.selection import select_bits
from lowbit.network.bits import bits_restored, set_bits, switches_of, switching_layers
from lowbit.network.record import record_of
from lowbit.progress import Progress
from lowbit.qat.task import Task
from lowbit.report.results import SelectionResult, SwitchResult
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.load import load

SELECTION_SAMPLES = 512  # labelled samples that a move on the greedy path is measured on
SELECTION_SECONDS = 60.0  # the longest time that a report's greedy path may take


def measure_switches(
    model: nn.Module,
    sample: Inputs,
    test_data: Iterable[object] | None,
    task: Task,
    packed: Path | None,
    single_bytes: Sequence[int],
    progress: Progress,
) -> list[SwitchResult]:
    """The selecting metric, bit operations of one sample and time of one call at each switch; the network's bits stay as they are.

    Args:
        packed: The file that holds all widths, which is timed on low-bit kernels where it can run on them.
        single_bytes: What a file for each switch takes; empty where that is not known.
    """
    network, one, found = None if packed is None else load(packed, kernels=True), sample.take(0, 1), []
    with bits_restored(model):
        for place, switch in enumerate(switches_of(model)):
            set_bits(model, switch)
            score = None if test_data is None else evaluate(model, test_data, task=task, progress=progress).value
            bops = sum(cost.bops for cost in compute_cost(model, sample).values())
            if network is not None:
                set_bits(network, switch)
            latency = None if network is None else measure_latency(network, one).median_ms
            size = single_bytes[place] if single_bytes else None
            found.append(SwitchResult(switch.weight, switch.activation, score, bops, latency, size))
    return found


def measure_selection(model: nn.Module, test_data: Iterable[object], task: Task, progress: Progress) -> SelectionResult | str | None:
    """The greedy path of a network whose layers have widths of their own, from the highest ones to the lowest; its bits stay as they are.

    Returns:
        The path; the reason why it was left out; ``None`` for a network that switches as a whole.
    """
    record, layers = record_of(model), switching_layers(model)
    if record is None or record.switching != "layer" or not layers:
        return None
    samples, batches = 0, []
    for batch in test_data:
        batches.append(batch)
        samples += Inputs.of(batch, model).batch_size
        if samples >= SELECTION_SAMPLES:
            break

    def measure(network: nn.Module) -> float:
        return evaluate(network, batches, task=task, progress=Progress.silent()).value

    widths = [switch.weight for switch in record.switches if switch.weight is not None]
    moves, started = len(layers) * (len(widths) - 1), time.perf_counter()
    measure(model)
    seconds = (time.perf_counter() - started) * moves * (len(layers) + 1) / 2
    if seconds > SELECTION_SECONDS:
        return (
            f"the path of layers to fewer bits was left out, as it would take about {seconds / 60:.0f} minutes: lowbit.select_bits finds it"
        )
    with bits_restored(model):
        path = select_bits(model, measure, budget_average_bits=min(widths), progress=progress)
    averages = tuple(sum(bits) / len(bits) for bits in path.trace)
    return SelectionResult(layers, path.trace, averages, path.accuracies, samples)

"""What a cell of a comparison runs with: the bits of each layer, those of the row or searched at their cost, and the samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch

from lowbit.assignment.budget import Budget, CostKind
from lowbit.assignment.problem import make_problem
from lowbit.comparison.cells import FLOAT, Cell
from lowbit.inputs import Calibration, Inputs
from lowbit.options import choose_policy
from lowbit.post_training.pipeline import PostTrainingMethod
from lowbit.progress import Progress
from lowbit.qat.method import TrainingMethod
from lowbit.qat.tasks import as_task
from lowbit.spec import BitPolicy, LayerBits, parse_switches, widest
from lowbit.workflows.latency_table import open_latency_table
from lowbit.workflows.requests import SearchRequest
from lowbit.workflows.samples import CACHE, Making, batches_of
from lowbit.workflows.search import search
from lowbit.workflows.subjects import Subject
from lowbit.workflows.suite import Suite


def policy_of_cell(
    suite: Suite, cell: Cell, subject: Subject, method: TrainingMethod | PostTrainingMethod, work: Path, progress: Progress
) -> BitPolicy:
    """Bits of each layer in one cell; those that are searched are found first, and kept in ``work`` for a run that is killed."""
    bits = widest(parse_switches(cell.widths)) if cell.widths else LayerBits(cell.weight_bits, cell.activation_bits)
    policy = suite.policy(bits) if suite.track == "aligned" else choose_policy(method, "paper", bits)
    return _searched(suite, cell, subject, policy, work, progress) if cell.search else policy


def calibration_of_cell(suite: Suite, cell: Cell, subject: Subject, work: Path, progress: Progress) -> Calibration:
    """The samples that a cell calibrates on: those of its network's data, or as many that are made."""
    if cell.calibration is None:
        return subject.draw_calibration(suite.calibration_samples, suite.batch_size_calibration, cell.seed)
    made = samples_of_cell(cell, subject, suite.calibration_samples, work, progress)
    return batches_of(made, suite.batch_size_calibration, torch.device("cpu"))


def samples_of_cell(cell: Cell, subject: Subject, count: int, work: Path, progress: Progress) -> Inputs:
    """``count`` samples that are made for the network of a cell; kept beside ``work`` for the other cells that take the same."""
    making = Making(cell.calibration, cell.calibration_options, count, cell.seed)
    return making.make(subject.model, subject.one_input(), progress=progress, cache=work.parent / CACHE)


def _searched(suite: Suite, cell: Cell, subject: Subject, uniform: BitPolicy, work: Path, progress: Progress) -> BitPolicy:
    """Bits of each layer by the search of the cell, at the cost of the network with the bits of ``uniform``; all else as in ``uniform``."""
    asked: dict[str, Any] = dict(cell.search)
    kind = cast(CostKind, asked.pop("cost", "size"))
    method, candidates = asked.pop("method"), asked.pop("candidates", "2,4,8")
    activations, table = asked.pop("activation_bits", uniform.default.activation or FLOAT), asked.pop("latency_table", None)
    calibration = calibration_of_cell(suite, cell, subject, work, progress)
    widths = SearchRequest(candidates=str(candidates), activation_bits=str(activations))
    opened = None if table is None else open_latency_table(str(table), subject.model, calibration.sample)
    first_last = uniform.first_last.weight if uniform.first_last is not None else None
    same = make_problem(
        subject.model, calibration.sample, budget=Budget(), candidates=(cast(int, cell.weight_bits),),
        activation_bits=(cell.activation_bits,), first_last=first_last, task=as_task(subject.task), latency_table=opened,
    )  # fmt: skip
    (network,) = same.uniform().values()
    found = search(
        subject.model,
        method=cast(str, method),
        budget=Budget(**{kind: same.costs[kind].of(network)}),
        data=None if cell.calibration else subject.draw_labelled(suite.calibration_samples, suite.batch_size_calibration, cell.seed),
        calibration=calibration,
        candidates=widths.candidate_bits(),
        activation_bits=widths.input_bits(),
        first_last_bits=first_last,
        latency_table=opened,
        task=subject.task,
        seed=cell.seed,
        progress=progress,
        work_dir=work / "search",
        **asked,
    )
    return dataclasses.replace(found.policy, merges=uniform.merges, before_functions=uniform.before_functions)

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.qat import Classification
from lowbit.qat.task import Meter
from lowbit.qat.tasks import Regression, SoftTargets

BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_the_loss_is_the_divergence_from_the_teacher_in_evaluation_mode() -> None:
    network, teacher = networks()
    task = SoftTargets(Classification(temperature=2.0), teacher.train())
    output = task.predict(network, BATCH)
    loss = task.loss(output, BATCH)
    with torch.no_grad():
        wanted = functional.softmax(teacher.eval()(BATCH) / 2, 1)
    expected = (wanted * (wanted.log() - functional.log_softmax(output / 2, 1))).sum(1).mean() * 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert network.weight.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert not teacher.training and int(teacher[1].num_batches_tracked) == 0  # type: ignore[index,arg-type]


def test_metrics_are_those_of_the_task_on_targets() -> None:
    network, teacher = networks()
    task = SoftTargets(Classification(), teacher)
    meter = Meter(task)
    labels = network(BATCH).argmax(1)
    meter.add(task.predict(network, (BATCH, labels)), (BATCH, labels))
    assert meter.scores().metrics == {"accuracy": 1.0}
    assert (task.metric_name, task.units["accuracy"], task.describe("accuracy", 0.5)) == ("accuracy", "%", "50.00 %")
    with pytest.raises(DataError, match="the data has the label"):
        meter.add(network(BATCH), (BATCH, labels + 7))
    assert task.facts()["targets"] == "the teacher's outputs" and task.facts()["name"] == "Classification"


def test_other_temperatures_and_outputs_of_other_forms() -> None:
    network, teacher = networks()
    warmer = SoftTargets(Classification(temperature=1.0), teacher).with_temperature(5.0)
    output = network(BATCH)
    assert torch.equal(warmer.loss(output, BATCH), SoftTargets(Classification(temperature=5.0), teacher).loss(output, BATCH))
    regression = SoftTargets(Regression(), teacher)
    expected = (output - teacher(BATCH)).square().mean()
    assert regression.loss(output, BATCH).item() == pytest.approx(expected.item(), rel=1e-5)
    assert not regression.higher_is_better

"""The engine: units one after the other, carried samples, bounded caches, and the same bits after a kill."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.networks import settled
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, SpecError
from lowbit.inputs import Calibration
from lowbit.methods.post_training.adaround import Adaround
from lowbit.models.resnet import resnet8
from lowbit.network.insert import activation_quantizers, bake_weights, float_weight, weight_quantizer
from lowbit.network.record import record_of
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.engine import Reconstruction
from lowbit.post_training.reconstruction.objective import Objective
from lowbit.post_training.reconstruction.phases import LearnScales, RoundWeights
from lowbit.post_training.reconstruction.rounding import BetaSchedule
from lowbit.post_training.reconstruction.units import PlannedUnit, block_units, layer_units, plan_units
from lowbit.progress import Progress, Stage
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import BitPolicy
from lowbit.workflows.quantize import quantize

ITERATIONS = 30
OBJECTIVE = Objective(ITERATIONS, 0.02, 8, schedule=BetaSchedule("cosine", ITERATIONS))


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return settled(resnet8(num_classes=4, width=8), images())


def job_of(
    *, batch: int = 8, model: nn.Module | None = None, data: Tensor | None = None, bits: int = 3, work_dir: Path | None = None
) -> PtqJob:
    """A network whose weights are rounded to nearest."""
    data = images() if data is None else data
    calibration = Calibration.of(list(data.split(batch)))
    job = PtqJob(
        model or network(), BitPolicy.uniform(bits, 4, first_last=None), calibration.sample, calibration=calibration, work_dir=work_dir
    )
    job.fold()
    job.insert_weights(Adaround().weight_quantizer)
    return job


def codes(job: PtqJob) -> dict[str, Tensor]:
    return {name: code.codes for name, code in bake_weights(job.model)[1].items()}


def learned(
    job: PtqJob, units: list[PlannedUnit] | None = None, objective: Objective = OBJECTIVE, **options: object
) -> tuple[dict[str, Tensor], Reconstruction]:
    """Codes after the roundings of all units have been learned."""
    engine = Reconstruction(job, units or plan_units(job, layer_units(job)), {}, **options)
    engine.run(RoundWeights(job, objective, is_symmetric=False))
    engine.close()
    return codes(job), engine


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_every_unit_ends_better_than_rounding_to_nearest_on_the_calibration_data() -> None:
    job = job_of()
    before = codes(job)
    engine = Reconstruction(job, plan_units(job, layer_units(job)), {})
    reports = engine.run(RoundWeights(job, Objective(200, 0.02, 8, schedule=BetaSchedule("cosine", 200)), is_symmetric=False))
    assert [report.unit for report in reports] == list(job.layers)
    shares = [report.after / report.before for report in reports]
    assert max(shares) <= 1
    assert sum(shares) / len(shares) < 0.9
    changed = [name for name, code in codes(job).items() if not torch.equal(code, before[name])]
    assert changed == [f"{report.unit}.weight" for report in reports if not report.is_kept]


def test_without_iterations_everything_stays_and_is_reported_as_kept() -> None:
    job = job_of()
    before = codes(job)
    engine = Reconstruction(job, plan_units(job, layer_units(job)), {})
    reports = engine.run(RoundWeights(job, replace(OBJECTIVE, iterations=0, schedule=BetaSchedule("cosine", 0)), is_symmetric=False))
    assert same(codes(job), before)
    assert all(report.before == report.after for report in reports if report.is_kept)
    assert any(report.is_kept for report in reports)
    assert "kept as it was" in str(next(report for report in reports if report.is_kept))


def test_the_reported_loss_is_that_of_the_codes_in_place() -> None:
    job = job_of()
    units = plan_units(job, layer_units(job))
    reports = Reconstruction(job, units, {}).run(RoundWeights(job, OBJECTIVE, is_symmetric=False))
    data = images()
    outputs: dict[str, list[Tensor]] = {}
    for model in (job.model, job.reference):
        for unit in units:
            hook = lambda _m, _a, y, unit=unit: outputs.setdefault(unit.name, []).append(unit.finish(y))  # noqa: E731
            model.get_submodule(unit.name).register_forward_hook(hook)
        with torch.no_grad():
            model(data)
    for unit, report in zip(units, reports, strict=True):
        got, expected = outputs[unit.name]
        loss = (got - expected).square().sum(unit.channel_axis).mean()
        assert report.after == pytest.approx(loss.item(), rel=1e-4), unit.name


@pytest.mark.parametrize("as_blocks", [False, True])
def test_carried_samples_are_those_of_a_pass_through_the_network(as_blocks: bool) -> None:
    results = []
    for is_carried in (True, False):
        job = job_of()
        units = plan_units(job, block_units(job, ()) if as_blocks else layer_units(job))
        assert any(unit.is_carried for unit in units)
        results.append(learned(job, units if is_carried else [replace(unit, is_carried=False) for unit in units])[0])
    assert same(*results)


def test_caches_on_disk_give_the_codes_of_caches_in_memory(tmp_path: Path) -> None:
    in_memory, first = learned(job_of(), cache="ram")
    on_disk, second = learned(job_of(work_dir=tmp_path), cache="disk")
    assert same(in_memory, on_disk)
    assert first.space.peak == second.space.peak > 0
    assert first.space.held == second.space.held == 0
    assert not list(tmp_path.rglob("*.bin"))


def test_caches_do_not_grow_with_the_depth_of_the_network() -> None:
    def deep(layers: int) -> int:
        model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())))
        job = job_of(model=model.eval())
        return learned(job, objective=replace(OBJECTIVE, iterations=1))[1].space.peak

    sample = 24 * 3 * 64 * 4  # bytes of all samples at one place of the network
    assert deep(3) == deep(9) == 4 * sample  # inputs and targets of two units while samples are carried


def test_progress_says_how_much_was_cached_and_the_table_does_not() -> None:
    job, output = job_of(), io.StringIO()
    job.progress = Progress(console=Console(file=output, width=200))
    _, engine = learned(job)
    assert f"reconstruction cached at most {engine.space.peak / 1e6:.1f} MB of activations in memory" in output.getvalue()
    assert job.table.notes == []  # a resumed run caches less and must write the same file


def test_the_batch_of_the_calibration_data_does_not_matter() -> None:
    by_eight, by_one = learned(job_of(batch=8))[0], learned(job_of(batch=1))[0]
    differing = sum(int((by_eight[name] != by_one[name]).sum()) for name in by_eight)
    assert differing <= 0.01 * sum(code.numel() for code in by_eight.values())  # convolutions of one image sum in another order


def test_progress_adds_up_to_its_total() -> None:
    stages: list[Stage] = []

    class Watching(Progress):
        @contextmanager
        def stage(self, name: str, total: float) -> Iterator[Stage]:
            with super().stage(name, total) as stage:
                stages.append(stage)
                yield stage

    job = job_of()
    job.progress = Watching(quiet=True)
    learned(job)
    (stage,) = stages
    assert stage.name == "reconstructing weights"
    assert stage.total == pytest.approx(ITERATIONS * len(job.layers))
    assert stage.done == pytest.approx(stage.total)


# Killed and resumed

OPTIONS = {"iterations": 20, "batch_size": 8, "learning_rate": 0.02, "save_every": 7}
METHODS = {
    "adaround": OPTIONS,
    "brecq": {**OPTIONS, "activation_iterations": 20, "activation_learning_rate": 1e-2, "loss": "fisher_diag"},
}


class Killed(Exception):
    """Stands for the end of the process."""


def killing(after: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let step ``after`` of all descents fail; returns how many steps were taken."""
    taken, step = 0, ResumableAdam.step

    def counted(self: ResumableAdam, loss: Callable[[Tensor], Tensor]) -> None:
        nonlocal taken
        if taken == after:
            raise Killed
        taken += 1
        step(self, loss)

    monkeypatch.setattr(ResumableAdam, "step", counted)
    return lambda: taken


def run(method: str, work_dir: Path | None = None, **changes: object) -> nn.Module:
    return quantize(
        network(),
        method=method,
        weight_bits=3,
        activation_bits=4,
        calibration=images(),
        seed=1,
        work_dir=work_dir,
        **{**METHODS[method], **changes},
    )


@functools.cache
def finished(method: str) -> tuple[nn.Module, int]:
    """The result of a run that nothing stopped, and the steps it took."""
    with pytest.MonkeyPatch.context() as patch:
        taken = killing(10**9, patch)
        return run(method), taken()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize(
    ("method", "after"),
    [("adaround", 0), ("adaround", 33), ("adaround", 60), ("adaround", 199), ("brecq", 47), ("brecq", 101), ("brecq", 150)],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    method: str, after: int, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, total = finished(method)
    with monkeypatch.context() as patch:
        killing(after, patch)
        with pytest.raises(Killed):
            run(method, tmp_path, cache=cache)
    with monkeypatch.context() as patch:
        taken = killing(10**9, patch)
        resumed = run(method, tmp_path, cache=cache)
    assert total - after <= taken() <= total - after + 6  # the steps since the last save are taken again, no others
    assert same_state(whole, resumed)
    notes = [note for note in record_of(whole).table.notes if "cached" not in note]
    assert [note for note in record_of(resumed).table.notes if "cached" not in note] == notes
    assert not list(tmp_path.rglob("*.bin"))


def test_a_finished_run_is_taken_from_its_state_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("brecq", tmp_path)
    taken = killing(0, monkeypatch)
    assert same_state(run("brecq", tmp_path), first)
    assert taken() == 0


@pytest.mark.parametrize("change", ["seed", "data", "network", "option"])
def test_the_state_of_another_run_is_not_used(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("adaround", tmp_path)
    arguments: dict[str, object] = {"calibration": images(), "seed": 1, "work_dir": tmp_path, **OPTIONS}
    model = network()
    if change == "seed":
        arguments["seed"] = 2
    if change == "data":
        arguments["calibration"] = images().add(1e-4)
    if change == "network":
        model.fc.bias.data[0] += 1e-3
    if change == "option":
        arguments["regularization"] = 0.02
    taken = killing(10**9, monkeypatch)
    again = quantize(model, method="adaround", weight_bits=3, activation_bits=4, **arguments)
    assert taken() == 20 * 10
    fresh = quantize(model, method="adaround", weight_bits=3, activation_bits=4, **{**arguments, "work_dir": None})
    assert same_state(again, fresh)


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
from tests.post_training.reconstruction.test_engine import run
model = run("brecq", Path(sys.argv[1]), iterations=150, save_every=1)
torch.save(model.state_dict(), sys.argv[2])
"""


def test_a_process_killed_for_good_resumes_to_the_same_bits(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / folder), str(tmp_path / f"{folder}.pt"), root])

    process = start("killed")
    part = tmp_path / "killed" / "reconstruction" / "weights"
    until = time.monotonic() + 120
    while not list(part.glob("weights-001-part*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (part / "weights-000.safetensors").exists()
    assert not (tmp_path / "killed.pt").exists()
    assert start("killed").wait(timeout=200) == 0
    assert start("whole").wait(timeout=200) == 0
    resumed, whole = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("killed", "whole"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


# Wrong inputs and odd shapes of data


class Masked(nn.Module):
    """The block gets a constant whose first dimension is the batch size; samples of the batch must not be drawn from it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(5, 6), Mixing(), nn.Linear(6, 3)
        self.mask = nn.Buffer(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x), mask=self.mask).mean(1))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(mask @ x))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_constant_as_long_as_the_batch_is_not_taken_for_samples(batch: int) -> None:
    data = torch.randn(24, 8, 5)
    job = job_of(model=Masked().eval(), data=data, batch=batch)
    units = plan_units(job, block_units(job, ("block",)))
    engine = Reconstruction(job, units, {})
    reports = engine.run(RoundWeights(job, replace(OBJECTIVE, batch_size=5), is_symmetric=True))
    with torch.no_grad():
        inputs, mask = job.reference.stem(data), job.reference.mask
        expected, got = job.reference.block(inputs, mask), job.model.block(inputs, mask)
    assert reports[1].after == pytest.approx((got - expected).square().sum(-1).mean().item(), rel=1e-4)


def test_images_of_several_sizes_are_refused() -> None:
    job = job_of()
    job.calibration = Calibration.of([torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 12)])
    with pytest.raises(CalibrationError, match="one size"):
        learned(job)


def test_data_that_overflows_in_the_network_names_the_unit() -> None:
    with pytest.raises(CalibrationError, match=r"unit 'layer1\.0\.conv1': its error .* is inf: the network overflows"):
        quantize(network(), method="adaround", weight_bits=3, calibration=images() * 1e20, **OPTIONS)


def test_other_grids_are_refused() -> None:
    job = job_of()
    job.insert_weights(lambda slot: Adaround().weight_quantizer(dataclasses.replace(slot, bit_width=1)))
    with pytest.raises(LayerError, match="layer 'conv': learned rounding needs a uniform grid, got BinaryQuantizer"):
        learned(job)


def test_saving_never_is_refused() -> None:
    job = job_of()
    with pytest.raises(SpecError, match="save_every must be at least 1, got 0"):
        Reconstruction(job, [], {}, save_every=0)


def test_a_failed_unit_keeps_its_fixed_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    before = codes(job)
    killing(3, monkeypatch)
    with pytest.raises(Killed):
        learned(job)
    assert all(isinstance(weight_quantizer(layer), UniformQuantizer) for layer in job.layers.values())
    assert same(codes(job), before)


# Activation scales


def with_activations() -> PtqJob:
    job = job_of()
    job.insert_activations(Adaround())
    job.calibrate_activations()
    return job


def test_activation_scales_are_learned_and_nothing_else_moves() -> None:
    job = with_activations()
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    units = plan_units(job, block_units(job, ()))
    objective = Objective(40, 2e-2, 8, power=2.4, is_annealed=True)
    reports = Reconstruction(job, units, {}).run(LearnScales(job, objective, units))
    after = job.model.state_dict()
    assert after.keys() == before.keys()  # buffers again, not parameters
    moved = [key for key in before if not torch.equal(after[key], before[key])]
    assert moved
    assert all(key.endswith("quantizer.scale") for key in moved)
    assert all(report.after < report.before or report.is_kept for report in reports)
    assert sum(not report.is_kept for report in reports) >= 2
    for quantizer in activation_quantizers(job.model).values():
        assert quantizer.scale > 0
        assert not quantizer.scale.requires_grad


def test_scales_stay_positive_whatever_the_learning_rate() -> None:
    job = with_activations()
    start = {name: q.scale.clone() for name, q in activation_quantizers(job.model).items()}
    units = plan_units(job, block_units(job, ()))
    engine = Reconstruction(job, units, {})
    engine.run(LearnScales(job, Objective(15, 5.0, 8, power=2.4), units))
    assert all((q.scale >= 1e-3 * start[name] * 0.999).all() for name, q in activation_quantizers(job.model).items())


def test_a_weight_shared_by_two_layers_is_taken_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    job = job_of(model=model.eval(), data=torch.randn(32, 6))
    result, _ = learned(job, objective=replace(OBJECTIVE, iterations=100, schedule=BetaSchedule("cosine", 100)))
    assert float_weight(model[0]) is not float_weight(model[2])
    assert not torch.equal(result["0.weight"], result["2.weight"])

"""The trainer: drives a run's hooks over the data in one or more processes, evaluates, saves, and resumes after a kill."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast, get_args

import torch
from torch import Tensor

from lowbit.errors import DivergedError, SpecError, missing_extra
from lowbit.inputs import sample_count
from lowbit.network.layers import evaluating
from lowbit.progress import Progress, Stage
from lowbit.qat.engine.averaging import WeightAverage
from lowbit.qat.engine.batches import BatchSource
from lowbit.qat.engine.checkpoint import BEST, LAST, Checkpoints, RunState
from lowbit.qat.engine.curve import Curve, EpochResult, TrainingLog
from lowbit.qat.engine.finite import first_not_finite, gradient_is_finite, gradient_not_finite, names_not_finite, values_not_finite
from lowbit.qat.engine.processes import (
    any_process,
    average_buffers,
    average_gradients,
    close_at_exit,
    gathered,
    gathered_objects,
    mean_over_processes,
    process_count,
)
from lowbit.qat.engine.snapshot import Restoration, Snapshot
from lowbit.qat.engine.stopping import SaveEvery, StopSignals, Terminated
from lowbit.qat.recipe import PrecisionName, Selection
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Batch, Meter, Scores

LOG_STEPS = 10  # steps between two points of TensorBoard's curves
SMALLEST_SCALE = 2.0**-30  # a gradient scaler that has fallen to this sees nothing but infinities
_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass
class Trainer:
    """Trains a ``TrainRun``. It knows nothing of methods but the hooks of the run.

    With several processes each takes ``batch_size`` samples of every step; gradients, and running statistics of norms and
    quantizers, are averaged over them after each step, whatever a method does in its loss. Norms over batches see the samples of one
    process only, so that results differ a little from one process with a larger batch where a network has them.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto``: a GPU of CUDA where there is one, else the CPU.
        devices: Processes on this machine, one for each device. Under ``torchrun`` its processes are used.
        nodes: Machines; each runs the same command.
        strategy: How processes are started, by its name in Lightning Fabric; ``auto`` runs the current command again for each.
        precision: ``32``, or ``bf16`` / ``fp16``: mixed precision of the forward pass, weights and quantizers' steps stay float32.
        save_every: Interval between saves of the state within an epoch: ``300s``, ``10m``, or a number of steps.
        select: Network to keep: that of the ``last`` epoch, or the ``best`` on the test data in the last phase.
        progress: Progress display; default: silent.

    Example:
        >>> import lowbit
        >>> trainer = lowbit.Trainer(device="cpu", select="best", save_every="10m")
        >>> trainer.saves.seconds
        600.0
    """

    device: str = "cpu"
    devices: int | None = None
    nodes: int | None = None
    strategy: str = "auto"
    precision: str | int = "32"
    save_every: str | float = "5m"
    select: Selection = "last"
    progress: Progress = field(default_factory=Progress.silent)

    def __post_init__(self) -> None:
        self.precision = str(self.precision)
        if self.precision not in get_args(PrecisionName):
            raise SpecError(f"precision must be one of {', '.join(get_args(PrecisionName))}, got {self.precision!r}")
        if self.select not in get_args(Selection):
            raise SpecError(f"select must be one of {', '.join(get_args(Selection))}, got {self.select!r}")
        for name, value in (("devices", self.devices), ("nodes", self.nodes)):
            if value is not None and value < 1:
                raise SpecError(f"{name} must be 1 or more, got {value}")
        self.saves = SaveEvery.parse(self.save_every)
        self._fabric: Any = None

    @property
    def fabric(self) -> Any:
        """Lightning's ``Fabric``, launched."""
        if self._fabric is None:
            self.launch()
        return self._fabric

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return bool(self.fabric.global_rank == 0)

    def launch(self) -> None:
        """Start the other processes, if there are to be any. They run the current command from its start up to here.

        Raises:
            MissingExtraError: Lightning Fabric is not installed.
            SpecError: This machine lacks the devices.
        """
        try:
            from lightning_fabric import Fabric
        except ImportError as error:
            raise missing_extra("lightning-fabric", "train", "training") from error
        kind, _, index = self._device().partition(":")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun sets both
        devices = self.devices or local
        nodes = self.nodes or max(int(os.environ.get("WORLD_SIZE", 1)) // local if "LOCAL_WORLD_SIZE" in os.environ else 1, 1)
        if index and devices > 1:
            raise SpecError(f"device {self.device} is one device; leave the number out to use {devices}")
        if self.precision == "fp16" and kind == "cpu":
            raise SpecError("precision fp16 needs a GPU. Use bf16 or 32 on the CPU.")
        strategy = self.strategy if self.strategy != "auto" else "ddp" if devices * nodes > 1 else "auto"
        try:
            with _quiet_fabric():
                self._fabric = Fabric(
                    accelerator=kind,
                    devices=[int(index)] if index else devices,
                    num_nodes=nodes,
                    strategy=strategy,
                    precision=_PRECISIONS[str(self.precision)],  # type: ignore[arg-type]
                )
                self._fabric.launch()
        except (RuntimeError, ValueError, TypeError) as error:
            if type(error).__module__.startswith("torch"):
                raise
            raise SpecError(f"cannot train on {devices} x {kind} on {nodes} machine(s) by {strategy!r}: {error}") from error
        close_at_exit()
        if not self.is_main:
            self.progress = Progress.silent()

    def fit(
        self,
        run: TrainRun,
        source: BatchSource,
        test: Iterable[Batch] | None = None,
        *,
        checkpoints: Checkpoints | None = None,
        log: TrainingLog | None = None,
    ) -> Curve:
        """Train ``run.model`` in place; it ends with the weights asked for.

        Args:
            run: A new run, on the CPU or the trainer's device.
            source: Training batches.
            test: Batches to measure the task's metric on after every epoch.
            checkpoints: Checkpoints to save to; a run that is there is resumed.
            log: Log that the curve is written to.

        Raises:
            DivergedError: The loss, a gradient or a weight became NaN or infinite; checkpoints before that are kept.
            DataError: Targets that do not fit the network.
            StateError: The run holds something that checkpoints cannot save.
            OutputError: A checkpoint or a log cannot be written; the checkpoint before it is kept.
            Terminated: SIGTERM came and the state is saved.
            KeyboardInterrupt: Ctrl-C came and the state is saved.
        """
        device = self.fabric.device
        run.to(device)
        run.reduce_mean = mean_over_processes
        with _own_random_numbers(run.recipe.seed + 1_000_003 * self.fabric.global_rank, device):
            session = _Session(self, run, source, test, checkpoints, log if self.is_main else None)
            return session.train()

    def _device(self) -> str:
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class _Stopped(Exception):
    """A signal came while the network was being measured."""


class _Session:
    """One call of ``Trainer.fit``."""

    def __init__(
        self,
        trainer: Trainer,
        run: TrainRun,
        source: BatchSource,
        test: Iterable[Batch] | None,
        checkpoints: Checkpoints | None,
        log: TrainingLog | None,
    ) -> None:
        self.trainer, self.run, self.source, self.test, self.checkpoints, self.log = trainer, run, source, test, checkpoints, log
        self.fabric, self.device = trainer.fabric, trainer.fabric.device
        decay = run.recipe.average_weights
        self.average = None if decay is None else WeightAverage(run.model, decay)
        self.scaler = torch.amp.GradScaler(self.device.type) if trainer.precision == "fp16" else None
        self.state = RunState([])
        self.expected = frozenset(names_not_finite(run.model))
        self.kept = {name: companion.network for name, companion in run.companions.items() if companion.is_saved}
        self.best: tuple[Any, dict[str, Tensor]] | None = None  # the best network, where there are no checkpoints
        self.output: object = None  # an output of the network, to check targets against
        self.stop = StopSignals()

    def train(self) -> Curve:
        run, store = self.run, self.checkpoints
        run.set_training_mode()
        if store is not None:
            store.check(run)
            if store.has(LAST):
                self._resume(store)
        if self.state.is_done:
            self._end()
            return self.state.curve
        if self.log is not None:
            self.log.start(run.step)
        self._started = self._saved = time.monotonic()
        self._seconds_before = self.state.seconds
        total = run.epochs * run.steps_per_epoch
        try:
            with self.stop, self.trainer.progress.stage("train", total=total, done=run.step) as stage:
                for epoch in run.each_epoch():
                    self._epoch(epoch, stage)
                self.state.is_done = True
                self._save()
                if self.stop.number is not None:
                    self._leave(self.stop.number == signal.SIGTERM)
        finally:
            if self.log is not None:
                self.log.close()
        self._end()
        if self.log is not None:
            self.log.epoch(self.state.curve, run.task, is_done=True)
        return self.state.curve

    def _resume(self, store: Checkpoints) -> None:
        self.state = store.load(self.run, self.fabric.global_rank)
        if self.average is not None and self.state.average is not None:
            self.average.resume(self.run.model, {name: tensor.to(self.device) for name, tensor in self.state.average.items()})
        if self.scaler is not None and self.state.scaler is not None:
            self.scaler.load_state_dict(self.state.scaler)

    def _epoch(self, epoch: int, stage: Stage) -> None:
        run, state = self.run, self.state
        if len(state.curve) > epoch:
            return  # saved behind its evaluation
        start = run.step - epoch * run.steps_per_epoch
        if start == 0:
            state.loss_sum, state.loss_count = 0.0, 0
        began, trained = time.monotonic(), 0
        batches = self.source.epoch(epoch, start)
        for _ in range(start, run.steps_per_epoch):
            trained += self._step(batches)
            rate = trained * process_count() / max(time.monotonic() - began, 1e-9)
            stage.advance(note=self._note(epoch, rate))
            if self.log is not None and (run.step % LOG_STEPS == 0 or run.step == 1):
                self.log.step(run.step, {"loss": self.last_loss, "learning_rate": run.learning_rate, "samples_per_second": rate})
            self._between_steps()
        rate = trained * process_count() / max(time.monotonic() - began, 1e-9)
        learning_rate = max((group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups), default=0.0)
        scores = self._evaluate(epoch)
        state.seconds = self._seconds_before + time.monotonic() - self._started
        loss = self._mean(state.loss_sum / max(state.loss_count, 1))
        state.curve.append(
            EpochResult(
                epoch + 1, run.phase.name, run.step, loss, {} if scores is None else scores.metrics, learning_rate,
                round(state.seconds, 3), round(rate, 1),
            )
        )  # fmt: skip
        self._keep_best(epoch, None if scores is None else scores.value)
        if self.average is not None and epoch + 1 == run.epochs:
            self.average.apply(run.model)  # now, so that phases without an epoch, which end a training, work on these weights
        self._save()
        if self.log is not None:
            self.log.epoch(state.curve, run.task)
        self.trainer.progress.say(f"{self._place(epoch)}: loss {loss:.4g}{self._metric_word()}, {rate:,.0f} samples/s")

    def _step(self, batches: Iterator[tuple[Batch, float]]) -> int:
        """One training step; gives the number of samples of this process."""
        run, accumulate = self.run, self.run.recipe.accumulate
        parts = [next(batches) for _ in range(accumulate)]
        losses = [self._turn(parts) for _ in run.phase.turns]
        if self.average is not None:
            self.average.update(run.model)
        self.last_loss = losses[0]
        self.state.loss_sum += self.last_loss
        self.state.loss_count += 1
        return sum(sample_count(batch) for batch, _ in parts)

    def _turn(self, parts: list[tuple[Batch, float]]) -> float:
        """One turn of a step: its backward passes over all batches, and its optimizer step; gives its mean loss."""
        run, total = self.run, 0.0
        run.before_step()
        run.gradient_scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        for batch, weight in parts:
            batch = self.fabric.to_device(batch)
            self._check_targets(batch)
            for loss in self._losses(batch):
                value = float(loss.detach())
                if not math.isfinite(value):
                    self._diverged(batch, f"the loss is {value}")
                scaled = loss * (weight / len(parts))
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
                total += value * weight
        average_gradients(run.parameters())
        stepped = run.optimizers
        if self.scaler is not None:
            stepped = [optimizer for optimizer in run.optimizers if _has_gradient(optimizer)]  # a scaler takes no others
            for optimizer in stepped:
                self.scaler.unscale_(optimizer)
        run.after_backward()
        if self.scaler is None:
            if not gradient_is_finite(run.parameters()):
                self._diverged(batch, "a gradient is not finite")
            run.optimizer_step()
        else:
            for optimizer in stepped:
                self.scaler.step(optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < SMALLEST_SCALE:
                self._diverged(batch, "gradients are infinite however small the loss is scaled")
        run.after_step()
        for network in (run.model, *(network for network in self.kept.values() if network.training)):
            average_buffers(network)
        return total / len(parts)

    def _losses(self, batch: Batch) -> Iterator[Tensor]:
        """The losses of a batch, each computed, with its precision, when it is asked for."""
        losses = self.run.losses(batch)
        while True:
            with self.fabric.autocast():
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def _between_steps(self) -> None:
        """Save when it is time, and leave when a signal asks for it."""
        saves, run = self.trainer.saves, self.run
        is_time = saves.seconds is not None and time.monotonic() - self._saved >= saves.seconds
        if process_count() > 1 or is_time or self.stop.number is not None:
            wants = any_process([self.stop.number == signal.SIGTERM, self.stop.number == signal.SIGINT, is_time], self.device)
        else:
            wants = [False, False, False]
        terminated, interrupted, is_time = wants
        if terminated or interrupted:
            self._leave(terminated)
        if is_time or (saves.steps is not None and run.step % saves.steps == 0):
            self._save()

    def _leave(self, terminated: bool) -> NoReturn:
        self._save()
        if process_count() > 1:
            torch.distributed.barrier()  # nobody leaves before the state is written
        where = "nothing was saved: there is no folder" if self.checkpoints is None else f"its state is saved in {self.checkpoints.folder}"
        if terminated:
            raise Terminated(f"stopped by SIGTERM after step {self.run.step} of {self.run.epochs * self.run.steps_per_epoch}; {where}")
        raise KeyboardInterrupt

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.checkpoints is None:
            return
        problem = values_not_finite(self.run.model, self.expected) or self._companion_not_finite()
        if problem is not None:
            raise DivergedError(f"training diverged before step {self.run.step + 1}: {problem}. {self._advice()}")
        self.state.seconds = self._seconds_before + self._saved - self._started
        random_states = gathered(torch.get_rng_state(), self.device)
        self.state.loss_sum = self._mean(self.state.loss_sum)  # what is loaded again is the same in every process
        if self.trainer.is_main:
            average = None if self.average is None else self.average.tensors
            scaler = None if self.scaler is None else self.scaler.state_dict()
            self.checkpoints.save(self.run, replace(self.state, average=average, scaler=scaler), random_states)

    @property
    def _may_be_best(self) -> bool:
        """Whether the current phase is the last one: in earlier ones a method may not have come down to the bits asked for."""
        return self.run.phase_index == len(self.run.phases) - 1

    def _keep_best(self, epoch: int, metric: float | None) -> None:
        if metric is None or not math.isfinite(metric) or not self._may_be_best:
            return
        sign = 1 if self.run.task.higher_is_better else -1
        if self.state.best is not None and sign * metric <= sign * self.state.best[1]:
            return
        self.state.best = (epoch + 1, metric)
        if not self.trainer.is_main and self.trainer.select != "best":
            return
        with self.average.applied(self.run.model) if self.average is not None else contextlib.nullcontext():
            if self.checkpoints is None:
                if self.trainer.select == "best":
                    snapshot = Snapshot()
                    tree = snapshot.take(self.run.model, "model")
                    self.best = (tree, snapshot.owned())
            elif self.trainer.is_main:
                self.checkpoints.save_model(BEST, self.run.model, {"epoch": epoch + 1, "metric": metric})

    def _end(self) -> None:
        """Leave the network with the weights asked for, in evaluation mode."""
        model, store = self.run.model, self.checkpoints
        if self.trainer.select == "best" and self.state.best is not None:
            if process_count() > 1:
                torch.distributed.barrier()
            if store is not None and store.has(BEST):
                store.load_model(BEST, model)
            elif self.best is not None:
                Restoration(self.best[1]).put(self.best[0], model, "model")
        model.eval()

    def _evaluate(self, epoch: int) -> Scores | None:
        """The task's metrics on the test data, as the method measures them."""
        if self.test is None:
            return None
        run = self.run
        applied = self.average.applied(run.model) if self.average is not None else contextlib.nullcontext()
        try:
            with applied, run.evaluating():
                return run.method.evaluate(run, lambda: self._measure(cast(Iterable[Batch], self.test)))
        except _Stopped:  # the evaluation is done again; the state to save is that of training
            self._leave(self.stop.number == signal.SIGTERM)

    def _measure(self, test: Iterable[Batch]) -> Scores:
        """The task's metrics of the network as it is."""
        run, meter = self.run, Meter(self.run.task)
        rank, processes = self.fabric.global_rank, process_count()
        for index, batch in enumerate(test):
            if index % processes != rank:
                continue
            batch = self.fabric.to_device(batch)
            meter.add(run.task.predict(run.model, batch), batch)
            if self.stop.number is not None and processes == 1:
                raise _Stopped
        together = Meter(run.task)
        for sums, samples in gathered_objects((meter.sums, meter.samples)):
            together.merge(sums, samples)
        return together.scores()

    def _mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if process_count() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        mean_over_processes(tensor)
        return float(tensor)

    def _check_targets(self, batch: Batch) -> None:
        if self.source.is_empty:
            return
        if self.output is None:
            with evaluating(self.run.model), torch.random.fork_rng(devices=[]):
                self.output = self.run.task.predict(self.run.model, batch)
            if self.source.targets is not None:
                self.run.task.check(self.output, (batch[0], self.source.targets))
        if self.source.targets is None:
            self.run.task.check(self.output, batch)

    def _diverged(self, batch: Batch, what: str) -> NoReturn:
        where = self._companion_not_finite(with_gradients=True) or first_not_finite(
            self.run.model, batch, lambda: None if self.source.is_empty else self.run.task.predict(self.run.model, batch), self.expected
        )
        raise DivergedError(f"training diverged at step {self.run.step + 1}: {what}; {where}. {self._advice()}")

    def _companion_not_finite(self, *, with_gradients: bool = False) -> str | None:
        for name, network in self.kept.items():
            problem = values_not_finite(network) or (gradient_not_finite(network) if with_gradients else None)
            if problem is not None:
                return f"companion {name!r}: {problem}"
        return None

    def _advice(self) -> str:
        store = self.checkpoints
        kept = f"The last good checkpoint is {store.folder / LAST}.safetensors. " if store is not None and store.has(LAST) else ""
        return f"{kept}Try a lower learning rate, a warm-up, or clipped gradients (clip_norm)."

    def _place(self, epoch: int) -> str:
        phase = f" ({self.run.phase.name})" if len(self.run.phases) > 1 else ""
        return f"epoch {epoch + 1}/{self.run.epochs}{phase}"

    def _metric_word(self) -> str:
        task = self.run.task
        metric = self.state.curve[-1].metrics.get(task.metric_name) if self.state.curve else None
        return "" if metric is None else f", {task.metric_name} {task.describe(task.metric_name, metric)}"

    def _note(self, epoch: int, rate: float) -> str:
        mean = self.state.loss_sum / max(self.state.loss_count, 1)
        return f"{self._place(epoch)}, loss {mean:.4g}{self._metric_word()}, {rate:,.0f} samples/s"


def _has_gradient(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


@contextlib.contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Within the context the generators of torch and Python start at ``seed``; the caller's continue afterwards as before."""
    before = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


@contextlib.contextmanager
def _quiet_fabric() -> Iterator[None]:
    """Without the lines that Fabric logs about its choices."""
    import logging
    import warnings

    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning_fabric.*")
            yield
    finally:
        logger.setLevel(level)

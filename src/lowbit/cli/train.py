"""``lowbit train``: a network and data in; a trained low-bit network as quantized files, checked and timed, and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import yaml

from lowbit.cli import options as shared
from lowbit.cli.console import say, say_how_to_go_on
from lowbit.cli.options import TEACHER, TRAINING, key_values
from lowbit.cli.output import prepare_folder
from lowbit.cli.request import make_settings
from lowbit.cli.train_recipe import TrainRecipe
from lowbit.cli.train_start import Start, open_start
from lowbit.cli.workflow import Comparison, Plan, deliver, report_outcome, show_layers
from lowbit.measure import tensor_bytes
from lowbit.network.record import record_of
from lowbit.options import build_method
from lowbit.progress import Progress
from lowbit.qat import TrainingMethod
from lowbit.qat.engine.stopping import Terminated
from lowbit.qat.engine.trainer import Trainer
from lowbit.spec import BitPolicy
from lowbit.surrogates import SURROGATES, make_surrogate
from lowbit.workflows.train import Trained, train_network


def option(panel: str, help: str, *names: str) -> object:
    """An option that overrides an entry of the recipe, so that it has no default of its own."""
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False)


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A YAML file with any of these settings; options override it. See --print-config.", show_default=False),
    ] = None,
    model: shared.Model = None,
    model_option: shared.ModelOption = None,
    init: Annotated[
        Path | None,
        option(
            shared.NETWORK,
            "Weights to start from, .safetensors or a .pt/.pth state dict. Default: what the factory returns; the embedded network has its own.",
            "--init",
            "--weights",
        ),
    ] = None,
    data: Annotated[
        str | None,
        option(
            shared.NETWORK,
            "Labelled data to train on: a name from 'lowbit data list', or a folder with one sub-folder per class "
            "(inside train/ and test/ or val/). Default: the embedded digits with the embedded network.",
            "--data",
        ),
    ] = None,
    test_data: Annotated[
        str | None, option(shared.NETWORK, "Other data to measure on. Default: the test part of --data.", "--test-data")
    ] = None,
    preprocess: shared.Preprocess = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", rich_help_panel=shared.NETWORK, help="A picture that cannot be decoded is an error. Default: left out, and counted."
        ),
    ] = False,
    method: Annotated[
        str | None,
        option(shared.METHOD, "How to train: a name from 'lowbit methods list --kind training'. Default: lsq.", "--method", "-m"),
    ] = None,
    surrogate: Annotated[
        str | None,
        option(shared.METHOD, f"Gradient of rounding in place of the method's own: {', '.join(SURROGATES)}.", "--surrogate"),
    ] = None,
    method_option: shared.MethodOption = None,
    weight_bits: Annotated[
        str | None, option(shared.BITS, "Bits of a weight, 1 to 8, or 'float'. Default: 4, or the method's nearest.", "--weight-bits", "-w")
    ] = None,
    activation_bits: Annotated[
        str | None,
        option(shared.BITS, "Bits of an activation, 1 to 8, or 'float'. Default: 4, or the method's nearest.", "--activation-bits", "-a"),
    ] = None,
    first_last_bits: shared.FirstLastBits = None,
    policy: shared.Policy = None,
    merge_bits: shared.MergeBits = None,
    keep: shared.Keep = None,
    only: shared.Only = None,
    teacher: Annotated[
        str | None,
        option(
            TEACHER,
            "A float network whose outputs are soft targets: 'self' (the network that training starts from), a weights file for the same "
            "network, or a network as for --model. Default: none.",
            "--teacher",
        ),
    ] = None,
    teacher_weights: Annotated[Path | None, option(TEACHER, "Weights of the network that --teacher names.", "--teacher-weights")] = None,
    teacher_option: Annotated[
        list[str] | None, option(TEACHER, "An argument for the teacher's factory as NAME=VALUE. Repeatable.", "--teacher-option")
    ] = None,
    distillation: Annotated[
        float | None, option(TEACHER, "The teacher's part of the loss, 0 to 1. Default: 0.5.", "--distillation")
    ] = None,
    temperature: Annotated[float | None, option(TEACHER, "Softness of the teacher's targets. Default: 4.", "--temperature")] = None,
    epochs: Annotated[int | None, option(TRAINING, "Passes over the training data. Default: 10.", "--epochs")] = None,
    batch_size: Annotated[int | None, option(TRAINING, "Samples of one step in each process. Default: 128.", "--batch-size")] = None,
    accumulate: Annotated[
        int | None, option(TRAINING, "Batches whose gradients are added up before a step. Default: 1.", "--accumulate")
    ] = None,
    learning_rate: Annotated[float | None, option(TRAINING, "Of the weights. Default: 0.02.", "--learning-rate", "--lr")] = None,
    optimizer: Annotated[str | None, option(TRAINING, "sgd, adam or adamw. Default: sgd.", "--optimizer")] = None,
    momentum: Annotated[float | None, option(TRAINING, "Of sgd. Default: 0.9.", "--momentum")] = None,
    weight_decay: Annotated[float | None, option(TRAINING, "L2 penalty on weights. Default: 0.0001.", "--weight-decay")] = None,
    schedule: Annotated[
        str | None, option(TRAINING, "Of the learning rate: cosine, linear, step or constant. Default: cosine.", "--schedule")
    ] = None,
    warmup: Annotated[
        float | None, option(TRAINING, "Part of the training in which the learning rate rises from 0. Default: 0.", "--warmup")
    ] = None,
    clip_norm: Annotated[float | None, option(TRAINING, "Largest norm of all gradients together. Default: none.", "--clip-norm")] = None,
    label_smoothing: Annotated[float | None, option(TRAINING, "0 to below 1. Default: 0.", "--label-smoothing")] = None,
    average_weights: Annotated[
        float | None,
        option(TRAINING, "Decay of a moving average of the weights to end with, for example 0.999. Default: none.", "--average-weights"),
    ] = None,
    augment: Annotated[
        str | None,
        option(TRAINING, "none, crop (shifts), crop_flip (mirrors too), or auto: crop_flip from 28 pixels on. Default: auto.", "--augment"),
    ] = None,
    select: Annotated[
        str | None,
        option(TRAINING, "The network to end with: of the last epoch, or the best on the test data. Default: last.", "--select"),
    ] = None,
    seed: Annotated[int | None, option(TRAINING, "Makes the result reproducible. Default: 0.", "--seed")] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            rich_help_panel=shared.OUTPUT,
            help="Folder for report.html, report.json, policy.yaml, train.json, train.csv, tensorboard/, model.lowbit and model.onnx.",
        ),
    ] = Path("lowbit-trained"),
    resume: shared.Resume = True,
    save_every: Annotated[
        str,
        typer.Option(
            "--save-every",
            rich_help_panel=shared.OUTPUT,
            help="How often the state is saved besides the end of each epoch: a time such as 300s or 10m, or a number of steps.",
        ),
    ] = "5m",
    packed: shared.Packed = True,
    onnx: shared.Onnx = True,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard/--no-tensorboard",
            rich_help_panel=shared.OUTPUT,
            help="Write files for TensorBoard. Default: if it is installed.",
        ),
    ] = None,
    dry_run: shared.DryRun = False,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", rich_help_panel=shared.OUTPUT, help="Print the effective recipe as YAML, which can be given back, and stop."
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device", rich_help_panel=shared.RUN, help="Where torch computes: cpu, cuda, cuda:1, mps, or auto (cuda if there is one)."
        ),
    ] = "auto",
    devices: Annotated[
        int | None,
        typer.Option(
            "--devices",
            min=1,
            rich_help_panel=shared.RUN,
            help="Processes on this machine, one for each device. Default: 1.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", min=1, rich_help_panel=shared.RUN, help="Machines; each runs this command. Default: 1.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None, option(shared.RUN, "32, or bf16 / fp16 for mixed precision of the forward pass. Default: 32.", "--precision")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, rich_help_panel=shared.RUN, help="Processes that decode pictures.")] = 0,
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Train a low-bit network, check the result, and write files and a report.

    The embedded example: lowbit train

    A method and bits: lowbit train --data fashion-mnist --model resnet20 --init float.safetensors --method ewgs -w 2 -a 2 --epochs 10

    From a file: lowbit train --method lsq -w 3 -a 3 --print-config > recipe.yaml; lowbit train recipe.yaml
    """
    shared.set_threads(threads)
    asked = TrainRecipe() if recipe is None else TrainRecipe.from_yaml(recipe)
    given: dict[str, object] = {
        "model": model, "model_options": _parsed(model_option, "--model-option"), "init": _text(init), "data": data, "test_data": test_data,
        "preprocess": dict(key_values(preprocess or [], "--preprocess")) or None, "method": method, "surrogate": surrogate,
        "options": dict(key_values(method_option or [], "--option")) or None,
        "weight_bits": weight_bits, "activation_bits": activation_bits, "first_last_bits": first_last_bits,
        "merge_bits": merge_bits,
        "policy": None if policy is None else BitPolicy.from_yaml(policy).to_dict(), "keep": keep or None, "only": only or None,
        "teacher": teacher, "teacher_options": _parsed(teacher_option, "--teacher-option"), "teacher_weights": _text(teacher_weights),
        "distillation": distillation, "temperature": temperature, "epochs": epochs, "batch_size": batch_size, "accumulate": accumulate,
        "clip_norm": clip_norm, "label_smoothing": label_smoothing, "average_weights": average_weights, "augment": augment,
        "select": select, "seed": seed, "precision": precision,
    }  # fmt: skip
    rates = {
        "kind": optimizer, "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay, "schedule": schedule,
        "warmup": warmup,
    }  # fmt: skip
    given["optimizer"] = {name: value for name, value in rates.items() if value is not None} or None
    asked = asked.changed({name: value for name, value in given.items() if value is not None}, "the options")
    if print_config:
        typer.echo(asked.resolved().to_yaml(), nl=False)
        return
    progress = Progress(quiet=quiet)
    with _told_of_termination():
        _run(
            asked,
            Trainer(
                device=device,
                devices=devices,
                nodes=nodes,
                precision=asked.precision,
                save_every=save_every,
                select=asked.select,
                progress=progress,
            ),
            out,
            resume=resume,
            packed=packed,
            onnx=onnx,
            tensorboard=tensorboard,
            dry_run=dry_run,
            strict=strict,
            workers=workers,
            quiet=quiet,
        )


def _run(
    asked: TrainRecipe,
    trainer: Trainer,
    out: Path,
    *,
    resume: bool,
    packed: bool,
    onnx: bool,
    tensorboard: bool | None,
    dry_run: bool,
    strict: bool,
    workers: int,
    quiet: bool,
) -> None:
    settings = make_settings(asked.method, dict(asked.options), None, "training")
    if asked.surrogate is not None:
        make_surrogate(asked.surrogate)  # an unknown name fails here, before anything is loaded
    plan = Plan(asked.method, asked.bit_policy(), settings, asked.recipe.seed, out, packed=packed, onnx=onnx)
    start = open_start(asked, strict=strict)
    if dry_run:
        show_plan(plan, asked, start)
        return
    trainer.launch()
    if trainer.is_main:
        prepare_folder(out, needed_bytes=12 * tensor_bytes(start.source.model))
        for note in start.notes:
            trainer.progress.say(note)
    trained = train_network(
        start.source.model,
        start.train,
        trainer,
        method=asked.method,
        recipe=asked.recipe,
        policy=plan.policy,
        test_data=start.test,
        out=out,
        surrogate=asked.surrogate,
        teacher=start.teacher,
        task=asked.task,
        augment=asked.augment,
        workers=workers,
        resume=resume,
        tensorboard=tensorboard,
        options=settings,
        settings={"recipe_file": yaml.safe_load(asked.resolved().to_yaml())},
    )
    if trained.is_main:
        _deliver(plan, start, trained, trainer, quiet=quiet)


def _deliver(plan: Plan, start: Start, trained: Trained, trainer: Trainer, *, quiet: bool) -> None:
    """Measure, export and report; on the CPU, where the files are checked."""
    record = record_of(trained.model)
    assert record is not None
    training = {
        "metric": trained.task.metric_name,
        "task": trained.task.facts(),
        "recipe": dataclasses.asdict(trained.recipe),
        "curve": [dataclasses.asdict(result) for result in trained.curve],
    }
    comparison = Comparison(
        trained.model.cpu(), start.source.sample, has_float=start.is_trained, training=training, task=trained.task, notes=start.notes
    )
    plan = dataclasses.replace(plan, policy=record.policy)
    outcome = deliver(plan, start.source, comparison, trainer.progress)
    before, after = outcome.report.latency_float_onnx, outcome.report.latency_quantized_onnx
    if record.policy.merges is None and before is not None and after is not None and after >= before:
        trainer.progress.say("to let residual sums run in integers too, which makes model.onnx faster, train with --merge-bits 8")
    report_outcome(outcome, quiet=quiet)


def show_plan(plan: Plan, asked: TrainRecipe, start: Start) -> None:
    """Print what would be done, layer by layer and phase by phase."""
    show_layers(plan, start.source)
    method = build_method(asked.info, dict(plan.settings))
    assert isinstance(method, TrainingMethod)
    phases = ", ".join(f"{phase.name} {phase.epochs} epochs" for phase in method.phases(asked.recipe))
    say(f"\nhyper-parameters: {', '.join(f'{key}={value}' for key, value in plan.settings.items()) or 'the defaults of the method'}")
    say(f"phases: {phases}")
    say(f"training: {len(start.train)} samples of {start.train.name}, {asked.recipe.batch_size} at a time")
    say(f"metrics: {'not measured' if start.test is None else f'{len(start.test)} samples of {start.test.name}'}")
    for note in start.notes:
        say(f"note: {note}")
    say(f"would write {', '.join([*plan.files, 'train.json', 'train.csv'])} to {plan.out}")


@contextlib.contextmanager
def _told_of_termination() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the command with a message and the command to go on with."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM; what was saved is kept")

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except Terminated as stopped:
        what, _, kept = stopped.message.partition("; ")
        if _is_first_process():
            say_how_to_go_on(what, kept)
        raise
    except KeyboardInterrupt as error:
        if _is_first_process():
            say_how_to_go_on("stopped", "what was saved is kept")
        raise typer.Exit(130) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _is_first_process() -> bool:
    """Whether this is no process that another one, or torchrun, started beside the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _parsed(pairs: list[str] | None, name: str) -> dict[str, object] | None:
    return {key: yaml.safe_load(value) for key, value in key_values(pairs or [], name).items()} or None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)

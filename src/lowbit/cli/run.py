"""``lowbit run``: a packed file at work on this machine's few-bit kernels."""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

from lowbit.cli import options as shared
from lowbit.cli.console import say, show_table
from lowbit.cli.export import packed_file
from lowbit.cli.output import prepare_folder
from lowbit.cli.source import preprocessing_of
from lowbit.data import Preprocessing, load_data
from lowbit.data.folders import pictures_in
from lowbit.data.images import read_input
from lowbit.errors import LayerError, SpecError
from lowbit.files import write_text
from lowbit.formats.packed.network import PackedNetwork
from lowbit.progress import Progress
from lowbit.runtime.compile import RuntimeNetwork, compile_runtime
from lowbit.runtime.profile import profile
from lowbit.workflows.load import load


def run(
    packed: Annotated[Path, typer.Argument(help="A .lowbit file, or a folder that 'lowbit train' or 'lowbit quantize' wrote.")],
    pictures: Annotated[
        Path | None, typer.Argument(help="A picture, or a folder of pictures, sub-folders included, to classify.", show_default=False)
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time the network instead, on noise of its input shape, and show where the time goes.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="The data set that the network was trained on (see 'lowbit data list'): its pixel mean and std and its class names are used.",
            show_default=False,
            rich_help_panel=shared.NETWORK,
        ),
    ] = None,
    preprocess: shared.Preprocess = None,
    weight_only: Annotated[
        Literal["none", "float", "int8"],
        typer.Option(
            "--weight-only",
            help="Layers whose weights alone are quantized: none: in float; float: decoded while they run, little memory; int8: inputs of "
            "linear layers are rounded to 8 bits besides, fast for few samples.",
        ),
    ] = "none",
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to show for each picture.")] = 3,
    runs: Annotated[int, typer.Option("--runs", min=1, help="How many calls to time.", rich_help_panel=shared.RUN)] = 30,
    batch_size: shared.BatchSize = 1,
    threads: shared.Threads = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="CSV file for the classes of each picture.", show_default=False, rich_help_panel=shared.OUTPUT),
    ] = None,
    quiet: shared.Quiet = False,
) -> None:
    """Classify pictures with a packed network on few-bit kernels, or time it.

    Layers whose weights and inputs are signs run on XOR and popcount, those of up to 8 bits on 8-bit kernels, the others in float; it says
    which do. Answers are those of the network that was trained, up to the rounding of floats.
    """
    shared.set_threads(threads)
    if not benchmark and pictures is None:
        raise SpecError("name a picture or a folder of pictures to classify, or ask for --benchmark")
    plain = load(packed_file(packed))
    assert isinstance(plain, PackedNetwork)
    classes = None if pictures is None else _Classes.of(plain, data, preprocess)
    paths = [] if pictures is None else [pictures] if pictures.is_file() else pictures_in(pictures)
    try:
        network: PackedNetwork = compile_runtime(plain, weight_only=weight_only)
    except LayerError as error:
        network, why = plain, str(error)
    if not quiet:
        say(f"{network.report}" if isinstance(network, RuntimeNetwork) else f"in float: {why}")
    if classes is not None:
        _classify(network, paths, classes, top, batch_size, out, quiet)
    if benchmark:
        _time(plain, network, batch_size, runs)


class _Classes:
    """How pictures become inputs of a network, and what its classes are called."""

    def __init__(self, preprocessing: Preprocessing, names: Sequence[str]) -> None:
        self.preprocessing, self.names = preprocessing, names

    @staticmethod
    def of(network: PackedNetwork, data: str | None, preprocess: list[str] | None) -> _Classes:
        """What the options say; size and colours that they leave open are those of the network's input."""
        inputs = network.packed_graph.inputs
        shape = inputs[0].shape[1:]
        if len(inputs) != 1 or len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or None in shape:
            raise SpecError(
                f"the network takes {', '.join(map(str, inputs))}, no square grey or colour pictures: only --benchmark can run it"
            )
        if data is not None and preprocess:
            raise SpecError("--data gives the preprocessing: leave out --preprocess, or the data")
        known = None if data is None else load_data(data, split="test")
        settings = {"size": str(shape[1]), "grey": str(shape[0] == 1).lower(), "crop_fraction": "1"}
        if known is not None:
            settings |= {"mean": ",".join(map(str, known.mean)), "std": ",".join(map(str, known.std))}
        elif shape[0] == 1:
            settings |= {"mean": "0.5", "std": "0.5"}
        given = dict(pair.partition("=")[::2] for pair in preprocess or [])
        preprocessing = preprocessing_of([f"{name}={value}" for name, value in {**settings, **given}.items()])
        assert preprocessing is not None
        if (preprocessing.channels, preprocessing.size) != shape[:2]:
            raise SpecError(
                f"--preprocess makes {preprocessing.channels} x {preprocessing.size} x {preprocessing.size}, the network takes {inputs[0]}"
            )
        return _Classes(preprocessing, () if known is None else known.class_names)

    def name(self, label: int) -> str:
        """Of a class, or its number."""
        return self.names[label] if label < len(self.names) else str(label)


def _classify(
    network: nn.Module, paths: Sequence[Path], classes: _Classes, top: int, batch_size: int, out: Path | None, quiet: bool
) -> None:
    if out is not None:
        prepare_folder(out.parent, needed_bytes=1_000_000, option="--out")
    rows: list[tuple[str, list[tuple[str, float]]]] = []
    with Progress(quiet=quiet).stage("pictures", len(paths)) as stage, torch.no_grad():
        for batch in _batches(paths, batch_size):
            inputs = torch.stack([read_input(path, classes.preprocessing) for path in batch])
            scores = network(inputs)
            if not isinstance(scores, Tensor) or scores.dim() != 2:
                raise SpecError("the network's output is no table of class scores: only --benchmark can run it")
            chosen = scores.softmax(1).topk(min(top, scores.shape[1]))
            for path, shares, labels in zip(batch, chosen.values.tolist(), chosen.indices.tolist(), strict=True):
                rows.append((str(path), [(classes.name(label), share) for share, label in zip(shares, labels, strict=True)]))
            stage.advance(len(batch))
    count = len(rows[0][1])
    if not quiet:
        show_table(
            ("picture", *(f"class {index + 1}" for index in range(count))),
            ((path, *(f"{name} {share:.1%}" for name, share in found)) for path, found in rows),
        )
    if out is not None:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["picture", *(f"{what}_{index + 1}" for index in range(count) for what in ("class", "share"))])
        writer.writerows([path, *(part for name, share in found for part in (name, f"{share:.6f}"))] for path, found in rows)
        write_text(out, text.getvalue())
        say(f"classes: {out}")


def _batches(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


@torch.no_grad()
def _time(plain: PackedNetwork, network: PackedNetwork, batch_size: int, runs: int) -> None:
    """Time both turn by turn on the same noise, and show the shares of ``network``."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn([batch_size if size is None else size for size in item.shape], generator=generator).to(item.dtype)
        for item in plain.packed_graph.inputs
    ]
    networks: dict[str, PackedNetwork] = {"few-bit kernels": network, "decoded to float": plain}
    if network is plain:
        del networks["few-bit kernels"]
    milliseconds: dict[str, list[float]] = {name: [] for name in networks}
    for index in range(runs + 2):
        for name, timed in networks.items():
            passed = _milliseconds(lambda timed=timed: timed(*inputs))  # type: ignore[misc]
            if index >= 2:
                milliseconds[name].append(passed)
    medians = {name: statistics.median(found) for name, found in milliseconds.items()}
    slowest = medians["decoded to float"]
    say(f"{torch.get_num_threads()} thread(s), batch {batch_size}, medians of {runs} calls turn by turn")
    show_table(("run by", "ms", "speed-up"), ((name, f"{value:.3f}", f"{slowest / value:.2f}x") for name, value in medians.items()))
    found = profile(network, tuple(inputs), runs=runs)
    total = sum(found.shares().values())
    show_table(
        ("\nwhere the time goes", "calls", "ms", "share"),
        (
            (name, sum(entry.operator == name for entry in found.operators) or None, f"{value:.3f}", f"{value / total:.1%}")
            for name, value in found.shares().items()
        ),
    )


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)

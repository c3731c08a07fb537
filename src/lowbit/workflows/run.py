"""Running a packed file on this machine's low-bit kernels: classification and profiling."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lowbit.data import Preprocessing, load_data
from lowbit.data.folders import pictures_in
from lowbit.data.images import read_picture
from lowbit.data.loading import is_suite
from lowbit.errors import SpecError
from lowbit.files import write_text
from lowbit.formats.packed.network import PackedNetwork
from lowbit.network.bits import WidthLike
from lowbit.progress import Progress
from lowbit.provenance import Provenance
from lowbit.runtime.compile import RuntimeNetwork
from lowbit.runtime.profile import Profile, profile
from lowbit.workflows.load import load
from lowbit.workflows.origin import Origin
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.settings import NetworkSettings
from lowbit.workflows.source import classes_of, preprocessing_of

OPEN_SIZE = 128  # of a dimension that the file leaves open, where a network is timed
Classes = list[tuple[str, list[tuple[str, float]]]]


@dataclass(frozen=True)
class LoadedNetwork:
    """A packed file as networks.

    Attributes:
        plain: All layers in float.
        network: Low-bit layers on kernels; ``plain`` itself where none can be.
        summary: Which layers run on what, and why.
    """

    plain: PackedNetwork
    network: PackedNetwork
    summary: str


def load_on_kernels(path: Path, *, weight_only: Literal["none", "float", "int8"] = "none", bits: WidthLike = None) -> LoadedNetwork:
    """The network in a packed file, on kernels where it can be; arguments and errors as ``load`` and ``compile_runtime``."""
    plain = load(path, bits=bits, kernels=False, check_finite=True)
    network = RuntimeNetwork(plain.packed_content, weight_only, max_elements=plain.packed_max_elements).eval()
    why = network.why_in_float()
    if why:
        return LoadedNetwork(plain, plain, f"in float: {why}")
    network.packed_refuses_nan = True
    return LoadedNetwork(plain, network, str(network.report))


class Labels:
    """How pictures become inputs of a network, and what its classes are called.

    Attributes:
        preprocessing: From a picture to an input.
        names: Names of the classes; a class without one goes by its number.
        note: Where the preprocessing comes from, if nobody said it.
    """

    def __init__(self, preprocessing: Preprocessing, names: Sequence[str], note: str = "") -> None:
        self.preprocessing, self.names, self.note = preprocessing, names, note

    @staticmethod
    def of(
        network: PackedNetwork,
        data: str | None,
        preprocess: Mapping[str, object],
        classes: str | None = None,
        *,
        place: str = "the file",
    ) -> Labels:
        """From the file, ``data`` or ``preprocess``; the rest follows from the shape of the network's input.

        Raises:
            SpecError: The network takes no pictures, or the user asks for something else than the file at ``place`` says.
        """
        inputs = network.packed_graph.inputs
        shape = inputs[0].shape[1:]
        if len(inputs) != 1 or len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or None in shape:
            raise SpecError(f"the network takes {', '.join(map(str, inputs))}, no square grey or colour pictures: it can only be timed")
        if data is not None and preprocess:
            raise SpecError("data= gives the preprocessing: leave out preprocess=, or the data")
        origin, known = Origin(place, network.provenance), network.provenance or Provenance()
        origin.with_task(NetworkSettings(task="classification"))
        named = None if data is None else load_data(data, split="test", preprocessing=None if is_suite(data) else known.preprocessing)
        names = classes_of(named, classes)
        origin.require_classes(names, data)
        settings: dict[str, object] = {"size": str(shape[1]), "grey": shape[0] == 1, "crop_fraction": 1.0}
        if known.preprocessing is not None:
            settings = dataclasses.asdict(known.preprocessing)
        elif named is not None:
            settings |= {"mean": named.mean, "std": named.std}
        elif shape[0] == 1:
            settings |= {"mean": (0.5,), "std": (0.5,)}
        preprocessing = preprocessing_of({**settings, **preprocess})
        assert preprocessing is not None
        if (preprocessing.channels, preprocessing.size) != shape[:2]:
            raise SpecError(
                f"preprocess= makes {preprocessing.channels} x {preprocessing.size} x {preprocessing.size}, the network takes {inputs[0]}"
            )
        origin.require_preprocessing(preprocessing if named is None or named.preprocessing is None else named.preprocessing, data)
        note = (
            f"{place} does not say how pictures become inputs; they are made {preprocessing}: say data= or preprocess= where that is wrong"
        )
        is_known = known.preprocessing is not None or named is not None or {"mean", "std"} <= set(preprocess)
        return Labels(preprocessing, names or known.classes, "" if is_known else note)

    def name(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.names[label] if label < len(self.names) else str(label)


def find_pictures(path: Path) -> list[Path]:
    """A picture, or the pictures in a folder; DataError when there are none."""
    return [path] if path.is_file() else list(pictures_in(path))


def classify(
    network: PackedNetwork, paths: Sequence[Path], labels: Labels, *, top: int = 3, batch_size: int = 1, progress: Progress | None = None
) -> Classes:
    """The ``top`` classes of each picture, with their shares."""
    rows: Classes = []
    with (progress or Progress.silent()).stage("pictures", len(paths)) as stage, torch.no_grad():
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            scores = network(torch.stack([labels.preprocessing(read_picture(path)) for path in batch]))
            if not isinstance(scores, Tensor) or scores.dim() != 2:
                raise SpecError("the network's output is no table of class scores: it can only be timed")
            chosen = scores.softmax(1).topk(min(top, scores.shape[1]))
            for path, shares, found in zip(batch, chosen.values.tolist(), chosen.indices.tolist(), strict=True):
                rows.append((str(path), [(labels.name(label), share) for share, label in zip(shares, found, strict=True)]))
            stage.advance(len(batch))
    return rows


def write_classes(classes: Classes, path: Path) -> None:
    """Write ``classes`` as a table of comma-separated values."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["picture", *(f"{what}_{index + 1}" for index in range(len(classes[0][1])) for what in ("class", "share"))])
    writer.writerows([path, *(part for name, share in found for part in (name, f"{share:.6f}"))] for path, found in classes)
    write_text(path, text.getvalue())


def prepare_table(path: Path) -> None:
    """Make the folder of ``path``; OutputError where it cannot be written to."""
    prepare_folder(path.parent, needed_bytes=1_000_000)


@dataclass(frozen=True)
class Timing:
    """Times of one network.

    Attributes:
        medians: Milliseconds of a call, of the network as it runs and of the same file in float.
        profile: Profile of the first.
    """

    medians: dict[str, float]
    profile: Profile


@torch.no_grad()
def time_network(loaded: LoadedNetwork, *, batch_size: int = 1, runs: int = 30) -> Timing:
    """Time a network and the same file in float, turn by turn on the same noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(
            [batch_size if dim == item.batch_dim else OPEN_SIZE if size is None else size for dim, size in enumerate(item.shape)],
            generator=generator,
        ).to(item.dtype)
        for item in loaded.plain.packed_graph.inputs
    ]
    networks: dict[str, PackedNetwork] = {"low-bit kernels": loaded.network, "decoded to float": loaded.plain}
    if loaded.network is loaded.plain:
        del networks["low-bit kernels"]
    milliseconds: dict[str, list[float]] = {name: [] for name in networks}
    for index in range(runs + 2):
        for name, timed in networks.items():
            passed = _milliseconds(lambda timed=timed: timed(*inputs))  # type: ignore[misc]
            if index >= 2:
                milliseconds[name].append(passed)
    medians = {name: statistics.median(found) for name, found in milliseconds.items()}
    return Timing(medians, profile(loaded.network, tuple(inputs), runs=runs))


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)

"""The provenance recorded in a file: defaults for later commands, and a check that these fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from lowbit.data import Preprocessing
from lowbit.data.loading import is_suite
from lowbit.errors import DataError, FileFormatError, SpecError
from lowbit.formats.onnx.sessions import onnx_provenance
from lowbit.formats.packed.file import read_package
from lowbit.provenance import SHOWN, Provenance, provenance_from_json
from lowbit.reading import check_readable, read_json, shorten
from lowbit.workflows.domain import domain_of, name_of_task
from lowbit.workflows.samples import is_made
from lowbit.workflows.settings import NetworkSettings, SampleSettings
from lowbit.workflows.source import NO_DATA, Source, is_network_named, open_source, preprocessing_of
from lowbit.workflows.trust import is_trusted
from lowbit.workfolder import unfinished_facts

N = TypeVar("N", bound=NetworkSettings)
LARGEST_REPORT = 2**26  # bytes
REPORT, WORK = "report.json", ".work"  # in an output folder: the report, and the folder of a run's state


@dataclass(frozen=True)
class Origin:
    """A file and the provenance of its network.

    Attributes:
        place: The file, for messages.
        provenance: What it says; ``None`` where it says nothing.
    """

    place: str
    provenance: Provenance | None

    @property
    def has_no_float_network(self) -> bool:
        """Whether training started from random weights, so that there is no float network to compare with."""
        return self.provenance is not None and self.provenance.model is not None and self.provenance.weights_sha256 is None

    def open(
        self,
        request: NetworkSettings,
        samples: SampleSettings,
        *,
        device: str,
        seed: int,
        missing: str = NO_DATA,
        opened: tuple[str, nn.Module] | None = None,
        batch_dim: int = 0,
    ) -> Source:
        """What ``request`` names, and the file where it names nothing, held to what the file says; ``opened`` and
        ``batch_dim`` as for ``open_source``.

        Raises:
            LowbitError: As ``fill``, ``require_same`` and ``open_source``.
        """
        filled = self.fill(request, needs_network=opened is None)
        both = filled if isinstance(filled, SampleSettings) else samples
        try:
            source = open_source(filled, both, device=device, seed=seed, missing=missing, opened=opened, batch_dim=batch_dim)
        except FileFormatError as error:
            if request.model is None or request.weights is not None or self.provenance is None or filled.weights is None:
                raise
            raise SpecError(
                f"{self.place} was made from {_network(self.provenance)}; these weights do not fit {request.model}, which you name ({error}). "
                "Leave model out, or name the weights that belong to it with weights=."
            ) from error
        self.require_same(source.provenance)
        return source

    def fill(self, request: N, *, needs_network: bool = True) -> N:
        """``request`` with the file's provenance for everything that the user did not name.

        Args:
            request: What the user asks for.
            needs_network: Whether the float network is going to be made.

        Raises:
            SpecError: The file does not say where it comes from and the user does not either; it names something that is not there any
                more, or code that the user has not named on this machine; or the user asks for another preprocessing than the file's.
        """
        known, request = self.provenance or Provenance(), self.with_task(request)
        has_samples = isinstance(request, SampleSettings)
        samples = [getattr(request, name) for name in ("calibration", "input_shape") if has_samples]
        is_data_named = request.data is not None or any(samples) or request.model == domain_of(request).network
        if not (request.model or known.model if needs_network else is_data_named or known.data or known.calibration):
            network = "the float network with model= and weights=, " if needs_network else ""
            raise SpecError(
                f"{self.place} does not say where its network comes from: name {network}its data with data=, and how pictures become "
                "inputs with preprocess=."
            )
        changes: dict[str, object] = {}
        if needs_network:
            changes |= {name: getattr(known, name) for name in ("model", "model_options", "weights") if not getattr(request, name)}
        if not request.data:
            changes["data"] = known.data
            if has_samples and not any(samples):
                changes |= {name: value for name, value in _samples_of(known).items() if not getattr(request, name)}
        for name in ("model", "weights", "data", "calibration"):
            self._check_is_there(name, changes.get(name))
        filled = replace(request, **changes)  # type: ignore[arg-type]
        if known.preprocessing is not None and not is_suite(filled.data):
            recorded = dataclasses.asdict(known.preprocessing)
            self.require_preprocessing(preprocessing_of({**recorded, **request.preprocess}), None)
            filled = replace(filled, preprocess=recorded)
        if request.model is None and filled.model is not None and not is_trusted(filled.model, filled.model_options):
            raise SpecError(
                f"{self.place} names the network {known.model}, whose code was not named on this machine before, so it is not run. "
                f"If you trust it, name it with model={known.model!r}."
            )
        return filled

    def require_same(self, found: Provenance) -> None:
        """SpecError where the network and the data that were opened are not those that the file was made from; says both."""
        known = self.provenance
        if known is None:
            return
        if known.weights_sha256 and found.weights_sha256 and known.weights_sha256 != found.weights_sha256:
            raise SpecError(
                f"{self.place} was made from {_network(known)}, but this is {_network(found)}. "
                "Name the network and the weights that it was made from with model= and weights=, or make the file again from these."
            )
        self.require_classes(found.classes, found.data)
        self.require_preprocessing(found.preprocessing, found.data)

    def require_classes(self, classes: Sequence[str], data: str | None) -> None:
        """SpecError where data has other classes than the network; classes that are only numbered are compared by their number."""
        known = () if self.provenance is None else self.provenance.classes
        differ = len(known) != len(classes) or (_are_named(known) and _are_named(classes) and tuple(known) != tuple(classes))
        if known and classes and differ:
            raise SpecError(
                f"{self.place} knows {len(known)} classes ({shorten(', '.join(known))}), {data or 'the data'} has {len(classes)} "
                f"({shorten(', '.join(classes))}). Name data with the same classes, or the names of its classes with classes=."
            )

    def with_task(self, request: N) -> N:
        """``request`` with the file's task where it names none.

        Raises:
            SpecError: It names another one, or the file's is none of those that go by a name.
        """
        known = None if self.provenance is None else self.provenance.task
        name = name_of_task(known)
        if known is not None and (name is None or request.task not in (None, name)):
            raise SpecError(
                f"{self.place} was made for the task {name or known}, this measures {request.task or 'classification'}. Measure it in Python: "
                "lowbit.evaluate(lowbit.load(file), data, task=...)."
            )
        return replace(request, task=request.task or name)

    def require_preprocessing(self, used: Preprocessing | None, data: str | None) -> None:
        """SpecError where pictures become inputs in another way than those that the network was made for; ``data`` is where that is from."""
        known = None if self.provenance is None else self.provenance.preprocessing
        if known is None or used is None or used == known:
            return
        pairs = ((entry.name, getattr(known, entry.name), getattr(used, entry.name)) for entry in dataclasses.fields(Preprocessing))
        differences = ", ".join(f"{name} {before} and {now}" for name, before, now in pairs if before != now)
        raise SpecError(
            f"{self.place} was made with the preprocessing {known}; {'asked for' if data is None else f'that of {data}'} is {used} "
            f"(they differ in {differences}). Leave preprocess out, name data that fits with data=, or make the file again."
        )

    def _check_is_there(self, name: str, value: object) -> None:
        """SpecError where a path that the file names is not there any more."""
        path = _path_in(name, value)
        if path is not None and not path.exists():
            raise SpecError(
                f"{self.place} names {name} {value}, but there is no {path} here. It may have been moved: say where it is with {name}=."
            )


def origin_of(target: Path) -> Origin:
    """What the file at ``target`` says, or in a folder its report, or else its first file that says something.

    Raises:
        LowbitError: There is no such file or folder, or it cannot be read.
    """
    if target.is_dir():
        files = [path for path in (target / REPORT, target / "model.lowbit", target / "model.onnx") if path.is_file()]
        if not files:
            raise FileFormatError(
                f"{target}: there is no {REPORT} in this folder. Name a folder that 'lowbit quantize' or 'lowbit train' wrote."
            )
        origins = [origin_of(path) for path in files]
        return next((origin for origin in origins if origin.provenance is not None), origins[0])
    check_readable(target)
    readers = {".lowbit": lambda path: read_package(path).provenance, ".onnx": onnx_provenance, ".json": _from_report}
    if target.suffix not in readers:
        raise FileFormatError(f"{target}: expected a .lowbit or .onnx file, or a folder, got {target.suffix or 'no suffix'}")
    return Origin(str(target), readers[target.suffix](target))


def common_origin(origins: Mapping[str, Provenance | None]) -> Origin:
    """What several files say, by their names; SpecError where they do not come from the same network and data."""
    known = {place: found for place, found in origins.items() if found is not None}
    if not known:
        return Origin(next(iter(origins)), None)
    (place, first), *others = known.items()
    for other, provenance in others:
        if provenance != first:
            raise SpecError(
                f"{place} and {other} do not belong together: one is of {first}; the other of {provenance}. Name one of the files."
            )
    return Origin(place, first)


def stopped_run(out: Path, kind: str) -> Origin | None:
    """What the stopped run of that kind in an output folder says; ``None`` where there is none to resume."""
    facts = unfinished_facts(out / WORK, kind)
    return None if facts is None else Origin(f"the stopped run in {out}", provenance_from_json(facts))


def policy_origin(policy: object) -> Origin | None:
    """What a policy says of the network that it was found for; ``None`` where it says nothing, or is none.

    Raises:
        FileFormatError: It says something that is no provenance.
    """
    found = policy.get("network") if isinstance(policy, Mapping) else None
    if not found:
        return None
    try:
        return Origin("the policy", provenance_from_json(found))
    except FileFormatError as error:
        raise FileFormatError(f"policy: network: {error}") from error


def with_network_of_policy(request: N, policy: object) -> N:
    """``request`` with the network and the data that a policy was found for, where the user names no network."""
    origin = policy_origin(policy)
    return request if origin is None or is_network_named(request) else origin.fill(request)


def require_network_of_policy(policy: object, found: Provenance) -> None:
    """SpecError where a policy was found for another network, or other data, than those that were opened; says both."""
    origin = policy_origin(policy)
    if origin is None:
        return
    try:
        origin.require_same(found)
    except SpecError as error:
        raise SpecError(f"{error} To take its bits all the same, delete 'network' from the policy.") from error


def _from_report(path: Path) -> Provenance | None:
    check_readable(path, max_bytes=LARGEST_REPORT)
    try:
        content = read_json(path, max_bytes=LARGEST_REPORT)
    except DataError as error:
        raise FileFormatError(f"{path}: it is no report ({error})") from error
    found = content.get("provenance") if isinstance(content, dict) else None
    try:
        return None if found is None else provenance_from_json(found)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _path_in(name: str, value: object) -> Path | None:
    """The path that a setting names, where it names one."""
    if not isinstance(value, str):
        return None
    if name == "model":
        source, _, _ = value.rpartition(":")
        return Path(source) if source.endswith(".py") else None
    if is_made(value):
        return None
    if name in ("data", "calibration"):
        _, _, folder = value.partition(":")
        return (Path(folder) if folder else None) if is_suite(value) else Path(value)
    return Path(value)


def _samples_of(known: Provenance) -> dict[str, object]:
    """The settings of calibration samples; of those that were made also how."""
    if not is_made(known.calibration):
        return {"calibration": known.calibration}
    shapes, options = known.synthesis.get("shapes"), known.synthesis.get("options", {})
    shape = shapes[0] if isinstance(shapes, list) and len(shapes) == 1 else None
    return {
        "calibration": known.calibration,
        "calibration_options": options,
        "calibration_samples": known.synthesis.get("samples"),
        "input_shape": shape and "x".join(map(str, shape)),
    }


def _are_named(classes: Sequence[str]) -> bool:
    return list(classes) != [str(number) for number in range(len(classes))]


def _network(known: Provenance) -> str:
    weights = f"the weights {known.weights}" if known.weights else "the weights that it comes with"
    return f"{known.model} with {weights} (SHA-256 {(known.weights_sha256 or '')[:SHOWN]})"

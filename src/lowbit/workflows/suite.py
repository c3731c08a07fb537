"""The request of ``lowbit compare``: networks x data x methods x bits x seeds, and the terms that are the same for all."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, get_args

from lowbit.assignment.budget import CostKind
from lowbit.comparison.cells import FLOAT, Cell, Track
from lowbit.comparison.orderings import Ordering
from lowbit.errors import LowbitError, SpecError, unknown_name
from lowbit.options import Above, AtLeast, make_method
from lowbit.qat.recipe import AugmentName, Recipe
from lowbit.reading import entries_of, line_of, shorten
from lowbit.registry import MethodInfo, find_method, list_methods
from lowbit.spec import BitPolicy, LayerBits, parse_bits
from lowbit.workflows.request import Bits, Request, plain_value, recipe_for
from lowbit.workflows.settings import EMBEDDED, BitSettings, NetworkSettings

if TYPE_CHECKING:
    from lowbit.qat.method import TrainingMethod

OWN_DATA = "data"  # in place of what makes samples: the network's own
DEFAULT_METHODS = ("dorefa", "pact", "lq_nets", "ewgs", "lsq")


@dataclass(frozen=True)
class Contender:
    """A method of a suite, as its paper has it or altered.

    Attributes:
        method: Name of the method, or ``path/to/file.py:Class``.
        label: Its name in tables. Default: the method's name, with whatever is altered behind it.
        options: Hyper-parameters that differ from the method's defaults.
        surrogate: Gradient surrogate in place of the method's own.
        procedure: Procedure in place of the method's own.
        procedure_options: Hyper-parameters of that procedure.
        kind: Kind of the method, where methods of several kinds have the name.
        bits: Bits of this method in place of the suite's.
        networks: Names of the only networks to run it on. Default: all.
        widths: Bits between which one network is to switch, from the highest to the lowest, for methods that train several. It is
            trained once and measured at each of them, or at those of ``bits``.
        mixtures: Number of networks with widths drawn for each layer to measure as well, for methods that mix them; tables call their mean
            ``mixed``.
        search: Bits of each layer by a search method, at the cost of the network whose layers all have the bits of the row: its ``method``;
            ``cost`` (average, size, bops or latency; default size), ``candidates``, ``activation_bits`` and ``latency_table`` as for
            ``lowbit.search``; and hyper-parameters.
        calibration: What makes samples in place of the network's own data, in place of the suite's: ``noise``, or a synthesis method such as
            ``dsg``; ``data``: the network's own. Training methods then learn from the float network's outputs on ``synthesized_samples`` of
            them, with no labels.
        calibration_options: Hyper-parameters of that synthesis method.

    Example:
        >>> Contender.parse({"method": "ewgs", "options": {"delta": 0.001}}).name
        'ewgs (delta=0.001)'
    """

    method: str
    label: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    surrogate: str | None = None
    kind: str | None = None
    procedure: str | None = None
    procedure_options: Mapping[str, object] = field(default_factory=dict)
    bits: tuple[BitPair, ...] = ()
    networks: tuple[str, ...] = ()
    widths: tuple[BitPair, ...] = ()
    mixtures: int = 0
    search: Mapping[str, object] = field(default_factory=dict)
    calibration: str | None = None
    calibration_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.label is not None:
            return self.label
        options = [f"{name}={value}" for name, value in {**self.options, **self.procedure_options}.items()]
        options += [f"{name}={value}" for name, value in self.calibration_options.items()]
        words = (self.surrogate, self.procedure, ", ".join(map(str, self.widths)), self.calibration)
        changes = [*options, *(word for word in words if word)]
        found = f"{self.method} ({', '.join(changes)})" if changes else self.method
        return f"{self.search['method']} + {found}" if self.search else found

    @staticmethod
    def parse(value: object, where: str = "") -> Contender:
        """A contender from its name or from a mapping of its settings."""
        if isinstance(value, Contender):
            return value
        if isinstance(value, str):
            return Contender(value.strip())
        mappings = ("options", "procedure_options", "search", "calibration_options")
        other = (*mappings, "bits", "networks", "widths", "mixtures")
        entries = entries_of(value, "method", [f.name for f in dataclasses.fields(Contender)], where, other=other)
        for name in mappings:
            if not isinstance(entries.get(name, {}), Mapping):
                raise SpecError(f"{where}{line_of(value, name)}: {name} must hold names and values, got {shorten(entries[name])}")
        pairs = {
            name: tuple(BitPair.parse(pair, f"{where}{line_of(value, name)}: {name}") for pair in _several(entries.get(name)))
            for name in ("bits", "widths")
        }
        count = entries.get("mixtures", 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise SpecError(f"{where}{line_of(value, 'mixtures')}: mixtures must be a whole number from 0 on, got {shorten(count)}")
        return Contender(**entries | pairs | {"networks": tuple(map(str, _several(entries.get("networks"))))})

    def pairs(self, bits: Sequence[BitPair]) -> Iterator[tuple[BitPair, int]]:
        """The bits at which it is measured in a suite with these ``bits``, and the number of mixtures, of those without bits."""
        yield from ((pair, 0) for pair in self.bits or self.widths or bits)
        if self.mixtures:
            yield BitPair(None, None), self.mixtures


@dataclass(frozen=True)
class BitPair:
    """Bits of weights and activations; ``None`` is float.

    >>> str(BitPair.parse("4/8")), str(BitPair.parse(2)), str(BitPair.parse("4/float"))
    ('4/8', '2/2', '4/float')
    """

    weight: int | None
    activation: int | None

    @staticmethod
    def parse(value: object, where: str = "bits") -> BitPair:
        """A pair from ``4/8``, or from one number for both."""
        if isinstance(value, BitPair):
            return value
        parts = value.split("/") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        if not 1 <= len(parts) <= 2:
            raise SpecError(f"{where}: expected WEIGHTS/ACTIVATIONS such as 4/8, got {shorten(value)}")
        bits = [parse_bits(part.strip() if isinstance(part, str) else part, where) for part in parts]
        return BitPair(bits[0], bits[-1])

    def __str__(self) -> str:
        return "/".join(FLOAT if bits is None else str(bits) for bits in (self.weight, self.activation))


@dataclass(frozen=True)
class SubjectSettings(NetworkSettings):
    """A network of a suite with its data.

    Attributes:
        name: Its name in tables. Default: the model and its data.
        subject: Function of a Python file that returns a ``lowbit.Subject``, as file.py:function, for networks, data and tasks of any kind; in place
            of all other settings but the name.
        test_data: Labelled data that metrics are measured on. Default: the test part of the data.
        calibration: Samples without labels. Default: training samples of the data.
        train_samples: Number of training samples to use, the first ones. Default: all.
    """

    command: ClassVar[str] = "networks"

    name: str | None = None
    subject: str | None = None
    test_data: str | None = None
    calibration: str | None = None
    train_samples: Annotated[int | None, AtLeast(1)] = None

    @property
    def title(self) -> str:
        """Its name in tables."""
        if self.subject is not None:
            return self.name or self.subject.rpartition(":")[2]
        parts = [self.model or EMBEDDED[self.task or "classification"], *([self.data] if self.data and self.data != self.model else [])]
        return self.name or " on ".join(parts)

    @staticmethod
    def parse(value: object, where: str = "") -> SubjectSettings:
        """A network from its name or from a mapping of its settings."""
        if isinstance(value, SubjectSettings):
            return value
        if isinstance(value, str):
            return SubjectSettings(model=value)
        if not isinstance(value, Mapping):
            raise SpecError(f"{where}: a network is a name or names and values such as model: resnet20, got {shorten(value)}")
        return SubjectSettings().changed(value, where)


@dataclass(frozen=True)
class SuiteSettings(Request):
    """Suite.

    Attributes:
        networks: Networks with their data; in a suite file a list with the settings of each. Default: the one that --model, --weights and
            --data name.
        methods: Methods, joined by commas; in a suite file also with method, label, kind, options, surrogate, procedure,
            procedure_options, bits, networks, widths, mixtures, search, calibration and calibration_options. Any kinds.
        bits: Bits of weights and activations, for example 4/4,2/2 or 4/float.
        seeds: Number of seeds; the first one is the recipe's. Fewer than 3 show no difference.
        track: aligned: one recipe, one policy for first and last layers, one number of images for all. published: every method with the
            recipe and the policy of its paper. The two are never in one table.
        baseline: Method that differences are taken to. Default: the first.
        equal: More terms that must be equal within a table, for example granularity, symmetry or norms.
        orderings: Claims to judge by the results, for example 'lsq > dorefa at 2/2'; in a suite file also with source and note.
    """

    networks: tuple[SubjectSettings, ...] = ()
    methods: tuple[Contender, ...] = tuple(Contender(name) for name in DEFAULT_METHODS)
    bits: tuple[BitPair, ...] = (BitPair(4, 4), BitPair(2, 2))
    seeds: Annotated[int, AtLeast(1)] = 3
    track: Track = "aligned"
    baseline: str | None = None
    equal: tuple[str, ...] = ()
    orderings: tuple[Ordering, ...] = ()


@dataclass(frozen=True)
class TermSettings(Request):
    """Terms.

    Attributes:
        recipe: Epochs, optimizer and so on of the aligned track; in a file its fields are listed with the others.
        paper_epochs: Epochs in place of the papers' own, for the published track; tables say so. Default: the papers'.
        augment: none, crop (shifts), crop_flip (mirrors too), or auto: crop_flip from 28 pixels on.
        first_last_bits: Minimum bits of the first and the last layer in the aligned track, or 'same' for no exception. Default: 8.
        merge_bits: Bits of residual sums and concatenations in the aligned track, or 'float'. Default: each kind's own.
        keep: Name patterns of layers to leave in float in the aligned track.
        calibration_samples: Calibration samples of post-training methods; each seed draws its own.
        batch_size_calibration: Samples per forward pass of these.
        calibration: What makes these samples in place of the networks' own data, of all methods that do not say another: noise, or a synthesis
            method such as dsg. Default: the networks' own data.
        calibration_options: Hyper-parameters of that synthesis method.
        synthesized_samples: Samples that are made for a training method whose calibration says so.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=5))
    paper_epochs: Annotated[int | None, AtLeast(1)] = None
    augment: AugmentName = "auto"
    first_last_bits: Bits = None
    merge_bits: Bits = None
    keep: tuple[str, ...] = ()
    calibration_samples: Annotated[int, AtLeast(1)] = 256
    batch_size_calibration: Annotated[int, AtLeast(1)] = 32
    calibration: str | None = None
    calibration_options: Mapping[str, object] = field(default_factory=dict)
    synthesized_samples: Annotated[int, AtLeast(1)] = 1024


@dataclass(frozen=True)
class PlaceSettings(Request):
    """Run.

    Attributes:
        workers: Processes that run cells here; 0 runs them in this process. Default: as many as there are cores for.
        threads: CPU threads of each cell; the bits of a result may depend on it.
        ray: Address of a Ray cluster that runs the cells: auto, or HOST:PORT. Default: none.
        memory_gb: Memory that each cell declares to Ray. Default: nothing is declared.
        latency: Write an ONNX file of each cell and time it against the float network's.
        save_every: Interval between saves of a running cell's state: a time such as 30s, or a number of steps.
        out: Folder of the results (cells/) and the tables made of them.
        against: A results.csv of an earlier comparison, to show what has changed.
        merge: Folders of other comparisons, to take in the cells of.
        only: Names, or patterns of names, of the only cells to run, for example 'lsq 4/4 on digits, seed 0' or 'lsq *'.
    """

    decides: ClassVar[bool] = False

    workers: Annotated[int | None, AtLeast(0)] = None
    threads: Annotated[int, AtLeast(1)] = 1
    ray: str | None = None
    memory_gb: Annotated[float | None, Above(0)] = None
    latency: bool = False
    save_every: str = "30s"
    out: str = "lowbit-compare"
    against: str | None = None
    merge: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite(SuiteSettings, NetworkSettings, TermSettings, PlaceSettings):
    """Run.

    Example:
        >>> import lowbit
        >>> suite = lowbit.Suite(methods=("lsq", {"method": "pact", "label": "pact, slow clip", "options": {"clip_decay": 1e-5}}), bits=("2/2",))
        >>> [contender.name for contender in suite.methods], len(list(suite.cells()))
        (['lsq', 'pact, slow clip'], 6)
    """

    command: ClassVar[str] = "compare"

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = recipe_for(self, self.task)
        if fitting is not None:
            object.__setattr__(self, "recipe", fitting)

    @property
    def subjects(self) -> tuple[SubjectSettings, ...]:
        """The networks with their data."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(NetworkSettings)}
        if not self.networks:
            return (SubjectSettings(**shared),)
        given = {name: value for name in ("data", "task", "scale", "patch") if (value := getattr(self, name)) is not None}
        return tuple(
            dataclasses.replace(one, **{name: value for name, value in given.items() if getattr(one, name) is None})
            for one in self.networks
        )

    @property
    def seed_numbers(self) -> range:
        """The seeds."""
        return range(self.recipe.seed, self.recipe.seed + self.seeds)

    def cells(self, subjects: tuple[str, ...] | None = None) -> Iterator[tuple[Cell, str]]:
        """Every cell, with the reason why it has to be skipped, which is empty where it has not.

        Args:
            subjects: Names of the networks. Default: those of ``subjects``.

        Raises:
            UnknownNameError: A method, option or term that is not known.
            SpecError: A label twice, or an altered method by the name of another.
        """
        infos = self.check()
        for name in subjects or tuple(one.title for one in self.subjects):
            for contender, info in zip(self.methods, infos, strict=True):
                if contender.networks and name not in contender.networks:
                    continue
                for pair, mixtures in contender.pairs(self.bits):
                    for seed in self.seed_numbers:
                        cell = Cell(
                            name, contender.name, contender.method, info.kind, pair.weight, pair.activation, seed, self.track,
                            dict(contender.options), contender.surrogate, self._terms(contender, info), contender.procedure,
                            dict(contender.procedure_options), tuple(map(str, contender.widths)), mixtures, dict(contender.search),
                            *self._calibration(contender, info),
                        )  # fmt: skip
                        if not self.only or any(cell.name == name or fnmatch.fnmatchcase(cell.name, name) for name in self.only):
                            yield cell, "" if mixtures else _missing_bits(info, pair)

    def check(self) -> list[MethodInfo]:
        """The facts of every method, in their order; raises what ``cells`` raises."""
        if not self.methods:
            raise SpecError("methods: there is none to compare. Name some, see lowbit.list_methods().")
        names = [contender.name for contender in self.methods]
        infos = [_info(contender) for contender in self.methods]
        for contender, name in zip(self.methods, names, strict=True):
            altered = (
                contender.options,
                contender.surrogate,
                contender.procedure,
                contender.widths,
                contender.search,
                contender.calibration,
            )
            is_altered = any(altered)
            if name != contender.method and name in {info.name for info in list_methods()}:
                raise SpecError(
                    f"methods: the label {name!r} is the name of another method than {contender.method!r}. Choose another label."
                )
            if is_altered and name == contender.method:
                raise SpecError(f"methods: {name!r} is altered, so it needs another label than the method's own name.")
        titles = [one.title for one in self.subjects]
        for title in titles:
            if titles.count(title) > 1:
                raise SpecError(f"networks: {title!r} appears twice. Give each its own name.")
        self._check_labels(titles)
        for contender in self.methods:
            for title in contender.networks:
                if title not in titles and self.networks:
                    raise unknown_name(f"network of {contender.name}", title, titles)
        if self.baseline is not None and self.baseline not in names:
            raise unknown_name("baseline", self.baseline, names)
        for ordering in self.orderings:
            for label in (ordering.better, ordering.worse):
                if label not in names:
                    raise unknown_name(f"method of the ordering {ordering.claim!r}", label, names)
        for contender, info in zip(self.methods, infos, strict=True):
            self._check_calibration(contender, info)
        from lowbit.comparison.terms import SHOWN  # brings torch

        for term in self.equal:
            if term not in SHOWN:
                raise unknown_name("term of equal", term, SHOWN)
        return infos

    def _check_labels(self, titles: Sequence[str]) -> None:
        """SpecError when a label stands for two methods, or twice for the same cells."""
        meanings: dict[str, Contender] = {}
        seen: set[tuple[str, str, BitPair]] = set()
        for one in self.methods:
            same = dataclasses.replace(meanings.setdefault(one.name, one), bits=one.bits, networks=one.networks)
            cells = {(one.name, title, pair) for title in one.networks or titles for pair, _ in one.pairs(self.bits)}
            if same != one or cells & seen:
                raise SpecError(f"methods: {one.name!r} appears twice. Give each its own label, or other bits or networks.")
            seen |= cells

    def policy(self, bits: LayerBits) -> BitPolicy:
        """Bits of each layer in the aligned track, with ``bits`` in inner layers."""
        settings = BitSettings(
            weight_bits=bits.weight or FLOAT,
            activation_bits=bits.activation or FLOAT,
            first_last_bits=self.first_last_bits,
            merge_bits=self.merge_bits,
            keep=self.keep,
        )
        return settings.bit_policy()

    def recipe_for(self, cell: Cell, paper: Recipe) -> Recipe:
        """The recipe of a cell; ``paper`` is that of its method's paper."""
        if self.track == "aligned":
            return dataclasses.replace(self.recipe, seed=cell.seed)
        return dataclasses.replace(paper, seed=cell.seed, epochs=self.paper_epochs or paper.epochs)

    def _calibration(self, contender: Contender, info: MethodInfo) -> tuple[str | None, dict[str, object]]:
        """What makes samples for a contender, with its hyper-parameters; the suite's counts for methods that calibrate."""
        if contender.calibration is not None or info.kind == "training":
            own = (contender.calibration, dict(contender.calibration_options))
        else:
            own = (self.calibration, dict(self.calibration_options))
        return (None, {}) if own[0] == OWN_DATA else own

    def _check_calibration(self, contender: Contender, info: MethodInfo) -> None:
        """SpecError or UnknownNameError where what makes samples is not known."""
        from lowbit.workflows.samples import Making, is_made, made_names  # brings torch

        asked, options = self._calibration(contender, info)
        where = f"methods, {contender.name}" if contender.calibration or contender.calibration_options else "suite"
        if asked is not None and not is_made(asked):
            raise unknown_name(f"calibration of {where}", asked, (*made_names(), OWN_DATA))
        if asked is None and options:
            raise SpecError(f"{where}: calibration_options need the method that makes samples, such as calibration: dsg.")
        try:
            if asked is not None:
                Making(asked, options)
        except LowbitError as error:
            raise type(error)(f"{where}, calibration: {error}") from error

    def _terms(self, contender: Contender, info: MethodInfo) -> dict[str, object]:
        """What a cell depends on beside the method, the bits and the seed; only what its kind of method looks at."""
        terms: dict[str, object] = {}
        if self.track == "aligned":
            terms["policy"] = {name: plain_value(getattr(self, name)) for name in ("first_last_bits", "merge_bits", "keep")}
        if info.kind == "training":
            recipe = dataclasses.asdict(self.recipe) if self.track == "aligned" else {"epochs": self.paper_epochs or "paper"}
            recipe.pop("seed", None)
            terms |= {"recipe": plain_value(recipe), "augment": self.augment}
            if contender.calibration not in (None, OWN_DATA):
                terms["synthesized_samples"] = self.synthesized_samples
        else:
            terms |= {"calibration_samples": self.calibration_samples, "batch_size": self.batch_size_calibration}
        return terms


def _info(contender: Contender) -> MethodInfo:
    info = find_method(contender.method, contender.kind or _only_kind(contender.method))  # type: ignore[arg-type]
    if info.kind not in QUANTIZING:
        place = f"search: {{method: {info.name}}}" if info.kind == "search" else f"calibration: {info.name}"
        raise SpecError(f"methods, {contender.name}: a {info.kind} method quantizes nothing itself. Name one that does, with {place}.")
    if contender.procedure is not None and info.kind != "training":
        raise SpecError(f"methods, {contender.name}: a procedure is for training methods, and {info.name} is {info.kind}.")
    try:
        if info.kind == "training":
            from lowbit.qat.procedure import training_method  # brings torch

            method = training_method(contender.method, contender.options, contender.procedure, contender.procedure_options)
            _check_widths(contender, method)
        else:
            _check_widths(contender, None)
            make_method(contender.method, info.kind, contender.options)
    except LowbitError as error:
        raise type(error)(f"methods, {contender.name}: {error}") from error
    if contender.search:
        _check_search(contender)
    if contender.surrogate is not None:
        from lowbit.surrogates import make_surrogate  # brings torch

        make_surrogate(contender.surrogate)
        if info.kind != "training":
            raise SpecError(f"methods, {contender.name}: a surrogate is for training methods, and {info.name} is {info.kind}.")
    return info


def _only_kind(method: str) -> str | None:
    """The kind of the methods of this name that quantize, where it is one: searches and syntheses of the same name cannot be meant."""
    kinds = QUANTIZING.intersection(info.kind for info in list_methods(method))
    return next(iter(kinds)) if len(kinds) == 1 else None


QUANTIZING = frozenset({"post_training", "training"})  # kinds of methods that give a quantized network
SEARCH_TERMS = (
    "method",
    "cost",
    "candidates",
    "activation_bits",
    "latency_table",
)  # of a search; what else stands there are hyper-parameters


def _check_search(contender: Contender) -> None:
    """SpecError or UnknownNameError where the search of a contender cannot be run."""
    if "method" not in contender.search:
        raise SpecError(f"methods, {contender.name}: search needs the method that searches, such as method: hawq_v2.")
    if contender.widths:
        raise SpecError(f"methods, {contender.name}: a network of several widths has no bits to search. Leave out widths or search.")
    if contender.search.get("cost", "size") not in get_args(CostKind):
        raise SpecError(
            f"methods, {contender.name}: cost must be one of {', '.join(get_args(CostKind))}, got {shorten(contender.search['cost'])}"
        )
    options = {name: value for name, value in contender.search.items() if name not in SEARCH_TERMS}
    try:
        make_method(contender.search["method"], "search", options)
    except LowbitError as error:
        raise type(error)(f"methods, {contender.name}, search: {error}") from error


def _check_widths(contender: Contender, method: TrainingMethod | None) -> None:
    if contender.widths and method is not None:
        from lowbit.qat.prepare import training_switches

        training_switches(method, ",".join(map(str, contender.widths)))
    elif contender.widths:
        raise SpecError("widths are for training methods that train one network for several. Leave them out.")
    if contender.mixtures and (not contender.widths or method is None or method.switching != "layer"):
        raise SpecError("mixtures are for methods that mix widths, such as bit_mixer, and need widths. Leave them out.")
    strangers = [pair for pair in contender.bits if contender.widths and pair not in contender.widths]
    if strangers:
        raise SpecError(f"bits {', '.join(map(str, strangers))} are not among its widths {', '.join(map(str, contender.widths))}.")


def _missing_bits(info: MethodInfo, pair: BitPair) -> str:
    """Why the method does not have these bits; empty where it has."""
    if pair.weight is not None and pair.weight not in info.weight_bits:
        return f"{info.name} has weight bits {_listed(info.weight_bits)}, not {pair.weight}"
    if pair.activation is not None and info.activation_bits is None:
        return f"{info.name} leaves activations in float; its bits are written {pair.weight}/{FLOAT}"
    if pair.activation is not None and info.activation_bits is not None and pair.activation not in info.activation_bits:
        return f"{info.name} has activation bits {_listed(info.activation_bits)}, not {pair.activation}"
    return ""


def _listed(bits: range) -> str:
    return ", ".join(map(str, bits))


def _several(value: object) -> Sequence[object]:
    """The entries of a list, or of text that commas join."""
    if value is None:
        return ()
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, (list, tuple)) else [value]

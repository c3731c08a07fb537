"""Requests of the public verbs, one frozen dataclass each: the same from Python, the command line and a YAML file.

Settings of a request are grouped by topic; the first line of a group's docstring is its heading in the help of a command, the
``Attributes`` section describes each setting. Nothing here needs torch, so that help and errors in options come at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml

from lowbit.errors import SpecError, unknown_name
from lowbit.options import Above, AtLeast, Interval, Method, Setting, check_settings, convert_option, make_method, settings_of
from lowbit.qat.recipe import UPSCALING_RECIPE, AugmentName, OptimizerSpec, PrecisionName, Recipe, Selection
from lowbit.reading import Lined, line_of, read_yaml, shorten
from lowbit.registry import Kind, MethodInfo, find_method
from lowbit.spec import BitPolicy, LayerBits, parse_bits, parse_switches, widest

Bits = int | str | None
MAX_THREADS = 1024  # beyond what any processor has torch fails without a word
RECIPES = {"super-resolution": UPSCALING_RECIPE}  # of tasks that the default does not fit
EMBEDDED = {"classification": "digits", "super-resolution": "edsr_small"}  # networks of tasks where none is named
PAPER = "paper"  # in place of a policy or a recipe: that of the method's paper
EIGHT_BITS = LayerBits(8, 8)  # what layers get without training where nothing is said
LAYER_BITS = ("weight_bits", "activation_bits", "first_last_bits")


@dataclass(frozen=True)
class Request:
    """Base of all requests: values are converted and checked when one is made."""

    command: ClassVar[str] = ""  # the subcommand of the command line, for hints
    decides: ClassVar[bool] = True  # whether the settings of a group decide what is made, and so belong in a file

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            if not dataclasses.is_dataclass(setting.type):
                object.__setattr__(self, name, _converted(setting, getattr(self, name), ""))
        check_settings(self, where=self.command or type(self).__name__)

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Mapping[str, object] | None = None) -> Self:
        """The request in the file, with the values of ``overrides`` in place of its own.

        Raises:
            SpecError: It cannot be read, or holds a value that is not allowed.
            UnknownNameError: It holds an unknown name.
        """
        path = Path(path)
        if path.is_dir():
            raise SpecError(
                f"{path} is a folder, a recipe is a YAML file. To resume the run in it, pass out={str(path)!r} and resume=True."
            )
        content = read_yaml(path)
        if content is not None and not isinstance(content, dict):
            raise SpecError(f"{path}: expected names and values such as weight_bits: 4, got {shorten(content)}")
        known = [name for name, owner in fields_of(cls) if decides_result(owner)]
        cls()._changed(content or {}, str(path), known)
        overrides = overrides or {}
        cls().changed({name: value for name, value in overrides.items() if name != "recipe"})  # whose errors are not those of the file
        return cls()._changed(_merged(content or {}, overrides), str(path), [name for name, _ in fields_of(cls)])

    def changed(self, values: Mapping[Any, object], where: str = "") -> Self:
        """This request with some values replaced, named as in the file; ``where`` is for errors.

        >>> TrainRequest().changed({"epochs": "3", "optimizer": {"learning_rate": 0.1}}).recipe.epochs
        3
        """
        return self._changed(values, where, [name for name, _ in fields_of(type(self))])

    def _changed(self, values: Mapping[Any, object], where: str, known: list[str]) -> Self:
        own = settings_of(type(self))
        nested = {name: settings_of(own[name].type) for name in known if dataclasses.is_dataclass(own[name].type)}
        names = [*known, *(name for inner in nested.values() for name in inner)]
        changes: dict[str, Any] = {}
        if "recipe" in values and "recipe" in names:
            changes["recipe"] = self._whole_recipe(values, f"{where}{line_of(values, 'recipe')}")
        elif getattr(self, "recipe", None) == Recipe() and str(values.get("task")) in RECIPES:
            changes["recipe"] = RECIPES[str(values["task"])]
        for name, value in values.items():
            if name in changes:
                continue
            owner = next((owner for owner, inner in nested.items() if name in inner), None)
            if name not in names:
                raise unknown_name(f"entry of {where}{line_of(values, name)}" if where else "setting", str(name), names)
            place = f"{where}{line_of(values, name)}"
            if owner is None:
                changes[name] = _converted(own[name], value, place)
            else:
                group = changes.get(owner, getattr(self, owner))
                changes[owner] = replace(group, **{name: _nested(nested[owner][name], value, getattr(group, name), place)})
        return replace(self, **changes)

    def _whole_recipe(self, values: Mapping[Any, object], where: str) -> Recipe:
        """The recipe that ``values`` name as a whole: an object, or the paper's of the method that they, or this request, choose."""
        asked = values["recipe"]
        if isinstance(asked, Recipe):
            return asked
        if asked != PAPER:
            raise SpecError(f"{where or 'settings'}: recipe must be {PAPER!r} or a Recipe, got {shorten(asked)}. Set its fields by name.")
        named = ("method", "options", "procedure", "procedure_options")
        chosen = self.changed({name: values[name] for name in named if name in values})
        return typing.cast("TrainRequest", chosen).paper_recipe()

    def to_yaml(self) -> str:
        """The request as ``from_yaml`` reads it."""
        values: dict[str, object] = {}
        for name, owner in fields_of(type(self)):
            value = getattr(self, name)
            if dataclasses.is_dataclass(value):
                values |= {key: plain_value(part) for key, part in dataclasses.asdict(value).items()}  # type: ignore[arg-type]
            elif decides_result(owner):
                values[name] = plain_value(value)
        return yaml.safe_dump(values, sort_keys=False)


def fields_of(cls: type) -> Iterator[tuple[str, type]]:
    """Each field of a request with the group that declares it, group by group as the class names them."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    owners = {name: base for base in cls.__mro__ for name in inspect.get_annotations(base) if name in names}
    for base in (*cls.__mro__[1:], cls):
        yield from ((name, base) for name in inspect.get_annotations(base) if owners.get(name) is base)


def decides_result(group: type) -> bool:
    """Whether the settings that ``group`` declares decide what is made; those that do not, such as folders, are in no file."""
    return bool(vars(group).get("decides", True))


@dataclass(frozen=True)
class NetworkSettings(Request):
    """Network and data.

    Attributes:
        model: The network: 'package.module:factory', 'file.py:factory' (a function or class that returns the network; 'file.py'
            will do where it has one that needs no arguments), 'timm:NAME', 'torchvision:NAME', or a name from 'lowbit models list'.
            Default: the embedded network of the task.
        model_options: Arguments for the network's factory, for example num_classes=10.
        weights: Trained weights, .safetensors or a .pt/.pth state dict (no code in it is run). Default: what the factory returns; the
            embedded network has its own.
        data: Labelled data: a name from 'lowbit data list', or a folder with one sub-folder per class (inside train/ and test/ or val/).
            Default: the embedded digits with the embedded network; none with any other network.
        preprocess: How pictures of a folder become inputs: size=224, crop_fraction=0.875, mean=0.485,0.456,0.406, std=0.229,0.224,0.225,
            interpolation=bicubic, grey=false (these are the defaults).
        classes: Names of the classes in the order of the outputs: a text file with a name a line, or names joined by commas. Default: those of
            the data.
        task: What the network is for. Default: what the file says that is worked with, else classification. Super-resolution trains with Adam,
            a learning rate of 2e-4 and 16 patches a step where nothing else is said.
        scale: For super-resolution, how many times larger pictures become. Default: as the network makes them.
        patch: For super-resolution, side of the small pictures' patches that are trained and calibrated on, in pixels. Default: 48; 24 with the
            embedded pictures.
    """

    model: str | None = None
    model_options: Mapping[str, object] = field(default_factory=dict)
    weights: str | None = None
    data: str | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)
    classes: str | None = None
    task: Literal["classification", "super-resolution"] | None = None
    scale: Annotated[int | None, Interval(2, 4)] = None
    patch: Annotated[int | None, AtLeast(8)] = None


@dataclass(frozen=True)
class SampleSettings(Request):
    """Network and data.

    Attributes:
        calibration: Samples to calibrate on, without labels: a name from 'lowbit data list', a folder of images, or a .npy/.npz file.
            Default: training samples of the data.
        calibration_samples: Largest number of calibration samples.
        input_shape: Shape of one sample, for example 3x224x224, if there is no data and the method needs none. Default: that of the data.
        batch_size: Samples per forward pass; changes memory and speed only.
    """

    calibration: str | None = None
    calibration_samples: Annotated[int, AtLeast(1)] = 256
    input_shape: str | None = None
    batch_size: Annotated[int, AtLeast(1)] = 32


@dataclass(frozen=True)
class MethodSettings(Request):
    """Method.

    Attributes:
        method: Name of the method, see 'lowbit methods list'.
        options: Hyper-parameters of the method; 'lowbit methods show METHOD' lists them.
    """

    method_kind: ClassVar[Kind] = "post_training"

    method: str = "white_paper"
    options: Mapping[str, object] = field(default_factory=dict)

    def chosen_method(self) -> Method:
        """The method with its hyper-parameters; UnknownNameError or SpecError where there is no such method or option."""
        return make_method(self.method, self.method_kind, self.options)


@dataclass(frozen=True)
class BitSettings(Request):
    """Bits.

    Attributes:
        weight_bits: Bits of a weight, 1 to 8, or 'float'. Default: 8 without training, 4 in training, or the method's nearest.
        activation_bits: Bits of an activation, 1 to 8, or 'float'. Default: as for weights.
        first_last_bits: Minimum bits of the first and the last layer, 1 to 8, or 'same' for no exception. Default: 8.
        merge_bits: Bits of residual sums, concatenations and what is pooled, 1 to 8, or 'float'; whole networks run in integers with 8.
            Default: what the policy says, else 8 after training and 'float' in training.
        policy: Bits for each layer; on the command line a YAML file, like the policy.yaml that 'lowbit quantize' writes. Replaces the other
            settings of bits but merge_bits and keep. 'paper': the given bits, with the first and the last layer as in the method's paper
            (a file of this name is './paper').
        keep: Name patterns of layers to leave in float, for example 'head.*'.
        only: Name patterns of the only layers to quantize. Default: all.
    """

    weight_bits: Bits = None
    activation_bits: Bits = None
    first_last_bits: Bits = None
    merge_bits: Bits = None
    policy: Mapping[str, object] | Literal["paper"] | None = None
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def bit_policy(self, default: LayerBits = EIGHT_BITS) -> BitPolicy:
        """Bits for each layer; ``default`` where none are given.

        Raises:
            SpecError: A policy together with settings that it replaces.
        """
        replaced = () if self.policy is None else ("first_last_bits", "only") if self.policy == PAPER else (*LAYER_BITS, "only")
        given = [name for name in replaced if getattr(self, name)]
        if given:
            raise SpecError(f"a policy says the bits of every layer; leave out {', '.join(given)}, or change the policy.")
        if isinstance(self.policy, Mapping):
            policy = BitPolicy.from_dict(dict(self.policy))
        else:
            weight = default.weight if self.weight_bits is None else parse_bits(self.weight_bits, "weight_bits")
            activation = default.activation if self.activation_bits is None else parse_bits(self.activation_bits, "activation_bits")
            if self.policy == PAPER:
                policy = self.chosen_method().default_policy(LayerBits(weight, activation))
            elif self.only:
                policy = BitPolicy.uniform(None, None, first_last=None)
                for pattern in self.only:
                    policy = policy.with_rule(match=pattern, weight=weight or "float", activation=activation or "float")
            else:
                first_last = self.first_last_bits
                ends = None if first_last == "same" else 8 if first_last is None else parse_bits(first_last, "first_last_bits")
                policy = BitPolicy.uniform(weight, activation, first_last=ends)
        for pattern in self.keep:
            policy = policy.keep_float(pattern)
        return policy.with_merges(self.merge_bits)

    def chosen_method(self) -> Method:
        """The method whose paper decides; settings of a method override this."""
        raise SpecError("policy='paper' belongs to a method: use it in a request that names one.")

    def _filled(self, default: LayerBits) -> Self:
        if isinstance(self.policy, Mapping) or self.only:
            return self
        bits = self.bit_policy(default).default
        return replace(self, weight_bits=bits.weight or "float", activation_bits=bits.activation or "float")


@dataclass(frozen=True)
class OutputSettings(Request):
    """Output.

    Attributes:
        out: Folder for report.html, report.json, policy.yaml, model.lowbit and model.onnx; training adds train.json, train.csv and
            tensorboard/.
        packed: Write model.lowbit: exactly the bits asked for, loads without the model's code.
        onnx: Write model.onnx: integer kernels in ONNX Runtime and OpenVINO.
        resume: Resume a stopped run with the same settings, or start over, replacing what the folder holds.
    """

    decides: ClassVar[bool] = False

    out: str = "lowbit-out"
    packed: bool = True
    onnx: bool = True
    resume: bool = True


@dataclass(frozen=True)
class RunSettings(Request):
    """Run.

    Attributes:
        device: Device for torch: cpu, cuda, cuda:1 or mps; training also takes auto (cuda if available).
        threads: CPU threads for torch. Default: as many as torch chooses.
    """

    decides: ClassVar[bool] = False

    device: str = "cpu"
    threads: Annotated[int | None, Interval(1, MAX_THREADS)] = None


@dataclass(frozen=True)
class QuantizeRequest(NetworkSettings, SampleSettings, MethodSettings, BitSettings, OutputSettings, RunSettings):
    """Run.

    Attributes:
        seed: Makes the result reproducible: the same seed leads to the same bits.

    Example:
        >>> import lowbit
        >>> request = lowbit.QuantizeRequest(method="adaround", weight_bits=4, keep=["fc"])
        >>> request.bit_policy().default
        LayerBits(weight=4, activation=8, output=None)
    """

    command: ClassVar[str] = "quantize"

    seed: int = 0

    def resolved(self) -> Self:
        """The request with default bits filled in."""
        return self._filled(EIGHT_BITS)


@dataclass(frozen=True)
class DiagnoseRequest(NetworkSettings, SampleSettings, MethodSettings, BitSettings, RunSettings):
    """Run.

    Attributes:
        samples: Number of samples to measure on; the time grows with samples x layers.
        remedies: Number of worst quantizers to try remedies for.
        seed: Makes the result reproducible.
        out: Folder for diagnosis.json. Default: only print.
        target: A .lowbit or .onnx file, or a folder that 'lowbit quantize' wrote: its network and data. Default: what the options name.
    """

    command: ClassVar[str] = "diagnose"

    target: str | None = None
    method: str = "round_to_nearest"
    samples: Annotated[int, AtLeast(1)] = 32
    remedies: Annotated[int, AtLeast(0)] = 3
    seed: int = 0
    out: str | None = None


@dataclass(frozen=True)
class BudgetSettings(Request):
    """Budget.

    Attributes:
        budget: The most that the network may cost: average=4 (bits of a weight), size=2.5MB or size=10% (of the float file), bops=1.2G or
            bops=8% (bit operations; of the float network's), latency=3ms or latency=60% (of 8-bit weights and activations; needs a latency
            table). Several hold together.
        max_drop: In place of a budget: the cheapest network along the method's frontier whose measured metric falls by at most so many points;
            needs labels.
        latency_table: Times of the layers: a file that 'lowbit latency-table' wrote, or a model of hardware: bit_serial or bit_fusion.
    """

    budget: tuple[str, ...] = ()
    max_drop: Annotated[float | None, AtLeast(0)] = None
    latency_table: str | None = None


@dataclass(frozen=True)
class CandidateSettings(Request):
    """Bits.

    Attributes:
        candidates: Widths that weights may have, joined by commas.
        activation_bits: Bits of what layers read, 1 to 8, or 'float'; several, joined by commas: each layer may have any of them.
        first_last_bits: Bits of the first and the last layer, which are not searched, or 'same': they are searched as all others.
    """

    candidates: str = "2,4,8"
    activation_bits: str | int = "8"
    first_last_bits: str | int = "8"

    def candidate_bits(self) -> tuple[int, ...]:
        """The widths of weights."""
        return tuple(bits for bits in _list_of_bits(self.candidates, "candidates") if bits is not None)

    def input_bits(self) -> tuple[int | None, ...]:
        """The widths of what layers read; ``None`` is float."""
        return _list_of_bits(self.activation_bits, "activation_bits")

    @property
    def ends(self) -> int | None:
        """Bits of the first and the last layer; ``None``: they are searched."""
        return None if self.first_last_bits == "same" else parse_bits(self.first_last_bits, "first_last_bits")


def _list_of_bits(given: str | int, where: str) -> tuple[int | None, ...]:
    return tuple(parse_bits(part.strip(), where) for part in str(given).split(","))


@dataclass(frozen=True)
class SearchRequest(NetworkSettings, SampleSettings, MethodSettings, BudgetSettings, CandidateSettings, RunSettings):
    """Run.

    Attributes:
        then: Post-training method to quantize the network with that was found; it is written to the folder quantized/ in the output folder, and
            compared with the uniform network that costs no more. Default: only search.
        then_options: Hyper-parameters of that method.
        quantizer: Post-training method that networks are measured with for max_drop, where 'then' names none.
        workers: Processes; the result does not depend on their number.
        ray: Address of a Ray cluster that measures layers in their place: auto, local, or HOST:PORT. Default: none.
        seed: Makes the result reproducible.
        out: Folder for policy.yaml, search.json and report.html.
        resume: Resume a stopped search with the same settings, or start over.

    Example:
        >>> import lowbit
        >>> request = lowbit.SearchRequest(budget=("size=10%", "bops=8%"), candidates="2,3,4,8")
        >>> request.candidate_bits(), request.input_bits()
        ((2, 3, 4, 8), (8,))
    """

    command: ClassVar[str] = "search"
    method_kind: ClassVar[Kind] = "search"

    method: str = "hawq_v2"
    then: str | None = None
    then_options: Mapping[str, object] = field(default_factory=dict)
    quantizer: str = "round_to_nearest"
    workers: Annotated[int, AtLeast(1)] = 1
    ray: str | None = None
    seed: int = 0
    out: str = "lowbit-search"
    resume: bool = True

    def deciding_settings(self) -> dict[str, object]:
        """The settings that the result depends on, as JSON holds them."""
        names = (
            "options",
            "budget",
            "max_drop",
            "latency_table",
            "candidates",
            "activation_bits",
            "first_last_bits",
            "then",
            "then_options",
        )
        return {name: plain_value(getattr(self, name)) for name in (*names, "quantizer", "seed", "calibration_samples")}


@dataclass(frozen=True)
class EvaluateRequest(NetworkSettings, RunSettings):
    """Run.

    Attributes:
        target: A .lowbit or .onnx file, or a folder that 'lowbit quantize' wrote; its network and data are the defaults of the other
            settings. Default: the float network alone.
        samples: Largest number of samples to compare on if there are no labels.
        batch_size: Samples per forward pass.
        seed: Makes the result reproducible.
        out: Folder for evaluation.json. Default: only print.
    """

    command: ClassVar[str] = "evaluate"

    target: str | None = None
    samples: Annotated[int, AtLeast(1)] = 256
    batch_size: Annotated[int, AtLeast(1)] = 32
    seed: int = 0
    out: str | None = None


@dataclass(frozen=True)
class ExportRequest(NetworkSettings, SampleSettings, RunSettings):
    """Output.

    Attributes:
        packed: A .lowbit file, or a folder that 'lowbit quantize' wrote. Default: the float network.
        to: The file to write; its suffix, .onnx, .lowbit or .c, is the format.
        bits: The one width to write, of a packed file that holds several: 4, or weights and activations apart, 4/8. Default: all of them for
            .lowbit, that with which the file starts for .onnx.
        weight_container: Type of the weight codes in an ONNX file: int8 is fast; int4 takes half a byte for codes of up to 4 bits, but
            runtimes compute with them in float.
        runtime: For a .lowbit file: lowbit.load and 'lowbit run' put its low-bit layers on low-bit kernels. Each weight still takes its bits
            and no more.
        speed: Time the ONNX file of a quantized network against the float one.
        dynamic: Input dimensions to leave open in addition to the batch, joined by commas: H,W for pictures of any size. Default: those that
            the task needs.
        batch_dim: The input dimension over samples: 0, or 1 where time comes first. Default: found by trying.
        output_names: Names for the output tensors of an ONNX file, joined by commas. Default: the keys of a dictionary, else out0, out1 ...
        requantizer: How a C file makes codes of sums of products: fixed_point: multiplied by 32 bits and shifted, as in TensorFlow Lite; dyadic:
            as in HAWQ-V3, ties to even.
        rounding: For fixed_point: double rounds products twice, as gemmlowp and TensorFlow Lite do; single once.
        seed: Seed of the noise that stands in for samples.
    """

    command: ClassVar[str] = "export"

    calibration_samples: Annotated[int, AtLeast(1)] = 32
    packed: str | None = None
    to: str = "model.onnx"
    bits: str | None = None
    weight_container: Literal["int8", "int4"] = "int8"
    runtime: bool = False
    speed: bool = True
    dynamic: str | None = None
    batch_dim: Annotated[int | None, AtLeast(0)] = None
    output_names: str | None = None
    requantizer: Literal["fixed_point", "dyadic"] = "fixed_point"
    rounding: Literal["double", "single"] = "double"
    seed: int = 0


@dataclass(frozen=True)
class LatencyTableRequest(NetworkSettings, SampleSettings):
    """Run.

    Attributes:
        weight_bits: Widths of weights to measure, joined by commas; 'float' is one too.
        activation_bits: Widths of what layers read to measure, likewise.
        calibration_samples: Number of samples to read; only their shape matters.
        batch_size: Samples in a timed call.
        threads: CPU threads.
        runs: Timed calls of each kernel.
        runtime: What the network will run on: lowbit's kernels, ONNX Runtime, or for each layer the faster of the two.
        out: The file to write.
        resume: Go on with a stopped run of the same settings, or start over.
        seed: Seed of the noise that stands in for samples, and of random weights.
    """

    command: ClassVar[str] = "latency-table"

    weight_bits: str = "1,2,3,4,5,6,7,8"
    activation_bits: str = "1,2,3,4,5,6,7,8,float"
    calibration_samples: Annotated[int, AtLeast(1)] = 1
    batch_size: Annotated[int, AtLeast(1)] = 1
    threads: Annotated[int, Interval(1, MAX_THREADS)] = 1
    runs: Annotated[int, AtLeast(1)] = 20
    runtime: Literal["fastest", "lowbit", "onnxruntime"] = "fastest"
    out: str = "latency-table.json"
    resume: bool = True
    seed: int = 0


@dataclass(frozen=True)
class RunRequest(Request):
    """Run.

    Attributes:
        data: The data set that the network was trained on (see 'lowbit data list'): its pixel mean and std and its class names are used.
            Default: what the file says.
        preprocess: How pictures become inputs where neither the file nor a data set says so: mean=0.5, std=0.5 and the like.
        classes: Names of the classes in the order of the outputs where neither says them: a text file with a name a line, or names joined by
            commas.
        weight_only: Treatment of layers with quantized weights and float inputs: none: in float; float: decoded while they run, with little
            memory; int8: inputs of linear layers are also rounded to 8 bits, fast for few samples.
        bits: The width to run at, of a file that holds several: 4, or weights and activations apart, 4/8. Default: that with which it starts.
        top: Number of classes to show for each picture.
        runs: Number of calls to time.
        batch_size: Samples per forward pass.
        tile: For super-resolution, side of the tiles that a picture is cut into, in its pixels; less takes less memory.
        overlap: For super-resolution, pixels around a tile that the network sees as well.
        out: CSV file for the classes of each picture; for super-resolution the enlarged picture, or the folder for several.
        threads: CPU threads for torch. Default: as many as torch chooses.
    """

    command: ClassVar[str] = "run"

    data: str | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)
    classes: str | None = None
    weight_only: Literal["none", "float", "int8"] = "none"
    bits: str | None = None
    top: Annotated[int, AtLeast(1)] = 3
    runs: Annotated[int, AtLeast(1)] = 30
    batch_size: Annotated[int, AtLeast(1)] = 1
    tile: Annotated[int, AtLeast(16)] = 256
    overlap: Annotated[int, AtLeast(0)] = 16
    out: str | None = None
    threads: Annotated[int | None, Interval(1, MAX_THREADS)] = None


@dataclass(frozen=True)
class TeacherSettings(Request):
    """Teacher.

    Attributes:
        teacher: A float network whose outputs are soft targets: 'self' (the network that training starts from), a weights file for the same
            network, or a network as for the model. Default: none.
        teacher_options: Arguments for the teacher's factory.
        teacher_weights: Weights of the network that the teacher names.
    """

    teacher: str | None = None
    teacher_options: Mapping[str, object] = field(default_factory=dict)
    teacher_weights: str | None = None


@dataclass(frozen=True)
class TrainingSettings(Request):
    """Training.

    Attributes:
        recipe: Epochs, optimizer and so on; in a file its fields are listed with the others.
        label_smoothing: Share of each label that is spread over all classes, from 0 to below 1.
        temperature: Temperature of a teacher's soft targets.
        augment: none, crop (shifts), crop_flip (mirrors too), or auto: crop_flip from 28 pixels on.
        select: Network to keep: that of the last epoch, or the best on the test data.
        precision: 32, or bf16 / fp16 for mixed precision of the forward pass.
    """

    recipe: Recipe = field(default_factory=Recipe)
    label_smoothing: Annotated[float, Interval(0, 1, closed="left")] = 0.0
    temperature: Annotated[float, Above(0)] = 4.0
    augment: AugmentName = "auto"
    select: Selection = "last"
    precision: PrecisionName = "32"


@dataclass(frozen=True)
class ProcessSettings(Request):
    """Run.

    Attributes:
        devices: Processes on this machine, one for each device. Default: 1.
        nodes: Number of machines; each runs this command. Default: 1.
        workers: Processes that decode pictures.
        strict: Raise an error for a picture that cannot be decoded. Default: it is left out and counted.
        save_every: Interval between saves of the state within an epoch: a time such as 300s or 10m, or a number of steps.
        tensorboard: Write files for TensorBoard. Default: if it is installed.
        strategy: How processes are started, by its name in Lightning Fabric; auto runs this command again for each.
    """

    decides: ClassVar[bool] = False

    devices: Annotated[int | None, AtLeast(1)] = None
    nodes: Annotated[int | None, AtLeast(1)] = None
    workers: Annotated[int, AtLeast(0)] = 0
    strict: bool = False
    save_every: str | float = "5m"
    tensorboard: bool | None = None
    strategy: str = "auto"


@dataclass(frozen=True)
class TrainSettings(TrainingSettings, OutputSettings, RunSettings, ProcessSettings):
    """Method.

    Attributes:
        surrogate: Name of the gradient surrogate to use instead of the method's own.
    """

    command: ClassVar[str] = "train"

    surrogate: str | None = None


@dataclass(frozen=True)
class ProcedureSettings(Request):
    """Method.

    Attributes:
        procedure: Name of the procedure to train with instead of the method's own: its phases, companions and losses, with the method's
            quantizers. 'lowbit methods list --axis procedure' lists them.
        procedure_options: Hyper-parameters of that procedure.
    """

    procedure: str | None = None
    procedure_options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SwitchSettings(Request):
    """Bits.

    Attributes:
        bits: Widths of one network that switches between them, from the highest to the lowest, for methods that train several: 8,4,2, or
            weights and activations apart, 32/32,4/4,1/1. Replaces the bits of weights and activations.
    """

    bits: str | None = None


@dataclass(frozen=True)
class TrainRequest(NetworkSettings, MethodSettings, ProcedureSettings, BitSettings, SwitchSettings, TeacherSettings, TrainSettings):
    """Network and data.

    Attributes:
        test_data: Data to measure on. Default: the test part of the data.

    Example:
        >>> import lowbit
        >>> request = lowbit.TrainRequest(method="pact", weight_bits=2).changed({"epochs": 3})
        >>> request.recipe.epochs, request.bit_policy().default
        (3, LayerBits(weight=2, activation=4, output=None))
    """

    method_kind: ClassVar[Kind] = "training"

    method: str = "lsq"
    test_data: str | None = None
    out: str = "lowbit-trained"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe == Recipe() and self.task in RECIPES:
            object.__setattr__(self, "recipe", RECIPES[self.task])

    @property
    def method_info(self) -> MethodInfo:
        """The method's facts; SpecError when it is no training method."""
        return find_method(self.method, "training")

    def chosen_method(self) -> Method:
        """The method with its hyper-parameters, its quantizers sent through the procedure where one is named."""
        from lowbit.qat.procedure import training_method  # brings torch

        return training_method(self.method, self.options, self.procedure, self.procedure_options)

    def bit_policy(self, default: LayerBits | None = None) -> BitPolicy:
        """Bits for each layer; where none are given 4, or the nearest below or above that the method supports."""
        given = [name for name in ("weight_bits", "activation_bits") if getattr(self, name) is not None]
        if self.bits is not None and given:
            raise SpecError(f"bits={self.bits} lists the widths of weights and activations; leave out {', '.join(given)}.")
        return super().bit_policy(default or self._default_bits())

    def resolved(self) -> Self:
        """The request with default bits filled in."""
        return self if isinstance(self.policy, Mapping) or self.bits is not None else self._filled(self._default_bits())

    def paper_recipe(self) -> Recipe:
        """The recipe of the method's paper, which ``changed({"recipe": "paper"})`` chooses."""
        from lowbit.qat.method import TrainingMethod

        method = self.chosen_method()
        assert isinstance(method, TrainingMethod)
        return method.default_recipe()

    def _default_bits(self) -> LayerBits:
        if self.bits is not None:
            return widest(parse_switches(self.bits))
        info = self.method_info
        return LayerBits(_nearest(info.weight_bits), None if info.activation_bits is None else _nearest(info.activation_bits))


def _nearest(bits: range, wanted: int = 4) -> int:
    return min(bits, key=lambda value: (abs(value - wanted), value))


def _converted(setting: Setting, value: object, where: str) -> object:
    name, place = setting.name, f"{where}: " if where else ""
    if setting.type == Bits:
        return _bits(value, name, f"{place}{name}")
    if setting.type == tuple[str, ...]:
        return _list(value, f"{place}{name}")
    if typing.get_origin(setting.type) is tuple and hasattr(typing.get_args(setting.type)[0], "parse"):
        entries = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        file = where.partition(", line ")[0]  # entries know their own lines
        return tuple(
            typing.get_args(setting.type)[0].parse(entry, f"{file}: {name}" if file and isinstance(entry, Lined) else f"{place}{name}")
            for entry in entries
        )
    if name == "policy":
        return _policy(value, place)
    if typing.get_origin(setting.type) is Mapping:
        return _mapping(value, name, place)
    text = isinstance(value, Path) or setting.type is PrecisionName
    return convert_option(where or "settings", name, str(value) if text else value, setting.type)


def _nested(setting: Setting, value: object, before: object, where: str) -> object:
    if setting.type is not OptimizerSpec:
        return convert_option(where or "settings", setting.name, value, setting.type)
    if not isinstance(value, Mapping):
        raise SpecError(f"{where}: optimizer must hold names and values such as learning_rate: 0.02, got {value!r}")
    known = settings_of(OptimizerSpec)
    changes: dict[str, Any] = {}
    for name, entry in value.items():
        if name not in known:
            raise unknown_name(f"entry of optimizer in {where}", str(name), known)
        changes[name] = convert_option(where or "settings", f"optimizer.{name}", entry, known[name].type)
    return replace(typing.cast(OptimizerSpec, before), **changes)


def _merged(content: Mapping[Any, Any], overrides: Mapping[str, Any]) -> dict[Any, Any]:
    """``content`` with ``overrides`` in place of what it says; the optimizer's entry by entry."""
    optimizer = {**(content.get("optimizer") or {}), **overrides.get("optimizer", {})}
    return {**content, **overrides, **({"optimizer": optimizer} if optimizer else {})}


def _policy(value: object, place: str) -> dict[str, object] | str | None:
    if value is None or value == PAPER:
        return value
    if isinstance(value, (str, Path)):
        return BitPolicy.from_yaml(value).to_dict()
    return value.to_dict() if isinstance(value, BitPolicy) else _mapping(value, "policy", place)


def _mapping(value: object, name: str, place: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{place}{name} must hold names and values, got {value!r}")
    return dict(value)


def _list(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise SpecError(f"{where} must be a list of patterns, got {value!r}")
    return tuple(value)


def _bits(value: object, name: str, where: str) -> int | str | None:
    if value is None or (name == "first_last_bits" and value == "same"):
        return value
    bits = parse_bits(value, where)
    return "float" if bits is None else bits


def plain_value(value: object) -> object:
    """``value`` as YAML and JSON hold it; of dataclasses what differs from their defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:
            return str(value)
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: plain_value(entry) for f, entry in pairs if entry != f.default and entry not in ({}, ())}
    if isinstance(value, Mapping):
        return {key: plain_value(entry) for key, entry in value.items()}
    return [plain_value(entry) for entry in value] if isinstance(value, (tuple, list)) else value

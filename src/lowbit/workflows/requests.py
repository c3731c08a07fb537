"""Requests of the public verbs, one frozen dataclass each: the same from Python, the command line and a YAML file.

Settings of a request are grouped by topic. Nothing here needs torch, so that help and errors in options come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

from lowbit.errors import SpecError
from lowbit.options import Above, AtLeast, Interval, Method
from lowbit.qat.recipe import AugmentName, PrecisionName, Recipe, Selection
from lowbit.registry import Kind, MethodInfo, find_method
from lowbit.spec import BitPolicy, LayerBits, parse_bits, parse_switches, widest
from lowbit.workflows.request import Request, plain_value, recipe_for
from lowbit.workflows.settings import (
    EIGHT_BITS,
    MAX_THREADS,
    BitSettings,
    MethodSettings,
    NetworkSettings,
    OutputSettings,
    RunSettings,
    SampleSettings,
)


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
        used = ("quantizer", "seed", "calibration_samples", "calibration_options")
        return {name: plain_value(getattr(self, name)) for name in (*names, *used)}


@dataclass(frozen=True)
class SynthesizeRequest(NetworkSettings, MethodSettings, RunSettings):
    """Run.

    Attributes:
        count: How many samples. Default: as in the method's paper.
        input_shape: Shape of one sample, for example 3x224x224. Default: that of the data.
        compared: Real samples of the data to compare with, where there are data; 0 for none.
        seed: Makes the samples reproducible.
        out: Folder for samples.safetensors, samples.png, synthesis.json and report.html.
        resume: Resume a stopped synthesis with the same settings, or start over.

    Example:
        >>> import lowbit
        >>> lowbit.SynthesizeRequest(method="zeroq", count=64).chosen_method().iterations
        500
    """

    command: ClassVar[str] = "synthesize"
    method_kind: ClassVar[Kind] = "synthesis"

    method: str = "dsg"
    count: Annotated[int | None, AtLeast(1)] = None
    input_shape: str | None = None
    compared: Annotated[int, AtLeast(0)] = 256
    seed: int = 0
    out: str = "lowbit-samples"
    resume: bool = True


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

    calibration_samples: Annotated[int | None, AtLeast(1)] = 32
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
    calibration_samples: Annotated[int | None, AtLeast(1)] = 1
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
        overlap: For super-resolution, pixels around a tile that the network sees as well. Default: as many as it looks far.
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
    overlap: Annotated[int | None, AtLeast(0)] = None
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
        data: Labelled data: a name from 'lowbit data list', or a folder with one sub-folder per class (inside train/ and test/ or val/).
            Default: the embedded digits with the embedded network. Without any data: a method that makes samples from the float network (dsg,
            zeroq), noise, or a folder that 'lowbit synthesize' wrote; a teacher's outputs are learned in place of labels, and test_data only
            measures. A folder of your own that is called dsg is ./dsg.
        data_options: Hyper-parameters of the method that makes the samples.
        synthesized_samples: Samples that it makes.
        test_data: Data to measure on. Default: the test part of the data.
        input_shape: Shape of one input, for example 3x32x32, where samples are made. Default: that of the data, or of the test data, of which the
            test part alone is used, to measure.

    Example:
        >>> import lowbit
        >>> request = lowbit.TrainRequest(method="pact", weight_bits=2).changed({"epochs": 3})
        >>> request.recipe.epochs, request.bit_policy().default
        (3, LayerBits(weight=2, activation=4, output=None))
    """

    method_kind: ClassVar[Kind] = "training"

    method: str = "lsq"
    data: str | None = None
    data_options: Mapping[str, object] = field(default_factory=dict)
    synthesized_samples: Annotated[int, AtLeast(1)] = 1024
    test_data: str | None = None
    input_shape: str | None = None
    out: str = "lowbit-trained"
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = recipe_for(self, self.task)
        if fitting is not None:
            object.__setattr__(self, "recipe", fitting)

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

"""Settings that requests of several verbs share, grouped by topic.

The first line of a group's docstring is its heading in the help of a command, the ``Attributes`` section describes each setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Self

from lowbit.errors import SpecError
from lowbit.options import AtLeast, Interval, Method, make_method
from lowbit.registry import Kind
from lowbit.spec import BitPolicy, LayerBits, parse_bits
from lowbit.workflows.request import PAPER, Bits, Request

MAX_THREADS = 1024  # beyond what any processor has torch fails without a word
EMBEDDED = {"classification": "digits", "super-resolution": "edsr_small"}  # networks of tasks where none is named
EIGHT_BITS = LayerBits(8, 8)  # what layers get without training where nothing is said
LAYER_BITS = ("weight_bits", "activation_bits", "first_last_bits")


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
        calibration: Samples to calibrate on, without labels: a name from 'lowbit data list', a folder of images, or a .npy/.npz file. Where
            there are no data: a method that makes samples from the network ('lowbit methods list --kind synthesis'; dsg, zeroq), noise, or a
            folder that 'lowbit synthesize' wrote. A folder of your own that is called dsg is ./dsg. Default: training samples of the data.
        calibration_options: Hyper-parameters of the method that makes the samples.
        calibration_samples: Largest number of calibration samples. Default: 256, or of samples that are made as many as in the method's paper.
        input_shape: Shape of one sample, for example 3x224x224, if there is no data and the method needs none. Default: that of the data.
        batch_size: Samples per forward pass; changes memory and speed only.
    """

    calibration: str | None = None
    calibration_options: Mapping[str, object] = field(default_factory=dict)
    calibration_samples: Annotated[int | None, AtLeast(1)] = None
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
            policy = replace(BitPolicy.from_dict(dict(self.policy)), network={})  # reports and files say it themselves
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

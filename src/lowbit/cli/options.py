"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from lowbit.errors import SpecError

# headings in --help
NETWORK, METHOD, BITS, OUTPUT, RUN = "Network and data", "Method", "Bits", "Output", "Run"
TRAINING, TEACHER = "Training", "Teacher"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The network: 'package.module:factory', 'file.py:factory' (a function or class that returns the network), 'timm:NAME', "
        "'torchvision:NAME', or a name from 'lowbit models list'. Default: the embedded digits network.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-option",
        help="An argument for the network's factory, for example num_classes=10. Repeatable.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Trained weights, .safetensors or a .pt/.pth state dict (no code in it is run). Default: what the factory returns.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Labelled data to measure on: a name from 'lowbit data list', or a folder with one sub-folder per class. "
        "Default: the embedded digits with the embedded network; none with any other network.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Samples that the method looks at, no labels needed: a name from 'lowbit data list', a folder of images, or a .npy/.npz file. "
        "Default: training samples of --data.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(
        "--preprocess",
        help="How pictures of a folder become inputs, as NAME=VALUE: size=224, crop_fraction=0.875, mean=0.485,0.456,0.406, "
        "std=0.229,0.224,0.225, interpolation=bicubic, grey=false (these are the defaults). Repeatable.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        help="Shape of one sample, for example 3x224x224, where there is no data and the method needs none. Default: that of the data.",
        show_default=False,
        rich_help_panel=NETWORK,
    ),
]
CalibrationSamples = Annotated[
    int, typer.Option("--calibration-samples", min=1, help="How many samples the method looks at, at most.", rich_help_panel=NETWORK)
]
Method = Annotated[
    str,
    typer.Option("--method", "-m", help="How to quantize: a name from 'lowbit methods list --kind post_training'.", rich_help_panel=METHOD),
]
WeightBits = Annotated[
    str | None,
    typer.Option("--weight-bits", "-w", help="Bits of a weight, 1 to 8, or 'float'. Default: 8.", show_default=False, rich_help_panel=BITS),
]
ActivationBits = Annotated[
    str | None,
    typer.Option(
        "--activation-bits", "-a", help="Bits of an activation, 1 to 8, or 'float'. Default: 8.", show_default=False, rich_help_panel=BITS
    ),
]
FirstLastBits = Annotated[
    str | None,
    typer.Option(
        "--first-last-bits",
        help="The least bits in the first and the last layer, 1 to 8, or 'same' for no exception. Default: 8.",
        show_default=False,
        rich_help_panel=BITS,
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="A YAML file with bits for each layer, like the policy.yaml that 'lowbit quantize' writes. Replaces the options for bits.",
        show_default=False,
        rich_help_panel=BITS,
    ),
]
MergeBits = Annotated[
    str | None,
    typer.Option(
        "--merge-bits",
        help="Bits of residual sums, concatenations and what is pooled, 1 to 8, or 'float'; whole networks run in integers with 8. "
        "Default: what --policy says, else 8 after training and 'float' in training.",
        show_default=False,
        rich_help_panel=BITS,
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        help="Leave the layers whose name matches this pattern in float, for example 'head.*'. Repeatable.",
        show_default=False,
        rich_help_panel=BITS,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Quantize only the layers whose name matches this pattern. Repeatable. Default: all.",
        show_default=False,
        rich_help_panel=BITS,
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        help="Any hyper-parameter of the method as NAME=VALUE; 'lowbit methods show METHOD' lists them. Repeatable.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Packed = Annotated[
    bool,
    typer.Option(
        "--packed/--no-packed",
        rich_help_panel=OUTPUT,
        help="Write model.lowbit: exactly the bits asked for, loads without the model's code.",
    ),
]
Onnx = Annotated[
    bool,
    typer.Option("--onnx/--no-onnx", rich_help_panel=OUTPUT, help="Write model.onnx: integer kernels in ONNX Runtime and OpenVINO."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Check everything, print what each layer would get, and write nothing."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", rich_help_panel=OUTPUT, help="Go on where a stopped run with the same settings was, or start over."),
]
Seed = Annotated[int, typer.Option("--seed", help="Makes the result reproducible: the same seed gives the same bits.", rich_help_panel=RUN)]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Samples per forward pass; changes memory and speed only.", rich_help_panel=RUN)
]
Device = Annotated[str, typer.Option("--device", help="Where torch computes: cpu, cuda, cuda:1, mps.", rich_help_panel=RUN)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads for torch. Default: as many as torch chooses.", show_default=False, rich_help_panel=RUN
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no tables; files are written all the same.", rich_help_panel=RUN)
]


def set_threads(count: int | None) -> None:
    """Let torch use ``count`` CPU threads; ``None`` leaves its choice."""
    if count is not None:
        torch.set_num_threads(count)


def key_values(pairs: list[str], option: str) -> dict[str, str]:
    """``["a=1", "b=x"]`` as a dictionary; SpecError where the equals sign is missing or a key comes twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"{option} {pair}: expected NAME=VALUE, for example {option} iterations=1000")
        if key in values:
            raise SpecError(f"{option} {pair}: {key} was given twice, also as {values[key]!r}")
        values[key] = value
    return values

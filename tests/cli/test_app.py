from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lowbit
from lowbit.cli import names
from lowbit.cli.app import COMMANDS
from lowbit.cli.flags import in_flags
from lowbit.data import SUITES, UPSCALING_SUITES
from lowbit.lazy import imports_for_type_checkers
from lowbit.models import BUILT_IN
from lowbit.registry import list_methods
from lowbit.surrogates import SURROGATES

NESTED = [["methods", "list"], ["methods", "show"], ["methods", "new"], ["data", "list"], ["data", "show"], ["models", "list"]]


def without_torch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``lowbit`` in a process in which importing torch is an error."""
    code = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'lowbit'; from lowbit.cli import main; main()"
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from lowbit.cli import app; app(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["-V"], *([*command, "--help"] for command in [*([name] for name in COMMANDS), *NESTED])],
    ids=" ".join,
)
def test_help_and_version_need_no_torch(arguments: list[str]) -> None:
    done = without_torch(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["train", "--epoch"], "No such option: --epoch"),
        (["train", "--epochs", "many"], "epochs must be int, got 'many'"),
        (["quantize", "-w", "9"], "--weight-bits: bit_width must be a whole number from 1 to 8"),
        (["evaluate", "--samples", "0"], "samples must be 1 or more, got 0"),
        (["export", "--weight-container", "int3", "--to", "x.onnx"], "weight_container must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_in_options_need_no_torch(arguments: list[str], told: str) -> None:
    done = without_torch(*arguments)
    assert done.returncode == 2
    assert told.replace("weight_container", "--weight-container") in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr


def completed(words: str) -> list[str]:
    """What the shell offers after ``words``."""
    position = len(words.split()) - (not words.endswith(" "))
    done = without_torch(_LOWBIT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(position))
    return done.stdout.split()


def test_completion_offers_commands_options_and_values_without_torch() -> None:
    assert completed("lowbit qu") == ["quantize"]
    assert completed("lowbit train --weight-b") == ["--weight-bits"]
    assert completed("lowbit train --method ew") == ["ewgs"]
    assert completed("lowbit quantize --method bre") == ["brecq"]
    assert completed("lowbit quantize --method ew") == []
    assert completed("lowbit quantize --data fash") == ["fashion-mnist"]
    assert completed("lowbit train --model resnet2") == ["resnet20"]
    assert completed("lowbit train --optimizer ") == ["sgd", "adam", "adamw"]
    assert completed("lowbit methods show adar") == ["adaround"]


def test_the_names_that_are_completed_are_those_that_are_known() -> None:
    for kind in ("post_training", "training", "search"):
        assert names.method_names(kind) == [info.name for info in list_methods(kind=kind)]  # type: ignore[arg-type]
    assert names.method_names() == list(dict.fromkeys(info.name for info in list_methods()))
    assert names.model_names() == list(BUILT_IN)
    assert names.data_names() == [*SUITES, *UPSCALING_SUITES]
    assert names.surrogate_names() == list(SURROGATES)
    assert names.procedure_names() == [info.name for info in list_methods(kind="training") if info.is_procedure]


@pytest.mark.parametrize(
    ("python", "command_line"),
    [
        ("pass weight_bits=4 or activation_bits='float'.", "pass --weight-bits 4 or --activation-bits float."),
        ("start over with resume=False, which", "start over with --fresh, which"),
        ("name some with data= (see", "name some with --data (see"),
        ("leave out weight_bits, only", "leave out --weight-bits, only"),
        ("device='cuda:9': no", "--device cuda:9: no"),
        ("recipe.yaml: weight_bits: must", "recipe.yaml: weight_bits: must"),
        ("Did you mean 'weight_observer'?", "Did you mean 'weight_observer'?"),
        ("weights and model_options belong", "weights and --model-option belong"),
        ("NAME=VALUE, size=224", "NAME=VALUE, size=224"),
    ],
)
def test_errors_speak_of_options(python: str, command_line: str) -> None:
    assert in_flags(python) == command_line


def test_everything_public_can_be_imported_and_is_listed() -> None:
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None
        assert name in dir(lowbit)
    with open(lowbit.__file__, encoding="utf-8") as file:
        lazy = imports_for_type_checkers(file.read())
    assert set(lazy) <= set(lowbit.__all__)
    assert lowbit.data.load_data is not None  # submodules too
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = lowbit.quantise  # type: ignore[attr-defined]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, lowbit; assert 'torch' not in sys.modules; lowbit.quantize; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

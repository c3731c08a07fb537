from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from tests.optional import require

import lowbit
from lowbit.data import load_data, loader

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {  # beside lowbit's own
    "plain_loop": (),
    "distill": (),
    "lightning_trainer": ("lightning.pytorch",),
    "huggingface_trainer": ("transformers", "accelerate"),
    "accelerate_loop": ("accelerate",),
}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# how much worse than the float network the low-bit ones may be, in the metric that selects (R2 for the regression)
TASKS = {"segmentation": 0.02, "two_inputs": 0.05, "dicts": 0.05, "regression": 0.05, "several_labels": 0.04}
SHARED = {"loops"}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PACKAGES, *TASKS, *SHARED}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_learned_at_few_bits_both_ways_and_exported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    scores = load_example(name).main(tmp_path)
    assert scores["float"] > 0.55  # learned at all: regression of noisy data ends lowest
    assert scores["train"] >= scores["float"] - TASKS[name] and scores["loop"] >= scores["float"] - TASKS[name]
    assert {path.suffix for path in tmp_path.iterdir()} == {".lowbit", ".onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_an_example_trains_two_bits_and_writes_them(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES[name]:
        require(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "digits.lowbit"
    accuracy = load_example(name).main(["--epochs", "2", "--out", str(path)])
    assert accuracy > 0.9  # untrained: 0.23
    assert f"quantized accuracy {accuracy:.2%}" in capfd.readouterr().out
    assert path.stat().st_size < 14_000  # 86.3 kB in float
    assert lowbit.evaluate(lowbit.load(path), loader(load_data("digits", split="test"), 256))["accuracy"] == pytest.approx(accuracy)

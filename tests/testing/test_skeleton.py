from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit import registry
from lowbit.cli import app
from lowbit.errors import OutputError, SpecError
from lowbit.testing import tiny, training
from lowbit.testing.skeleton import skeleton, write_skeleton

ROOT = Path(__file__).parents[2]


def run(*command: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, **more})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A package of each kind as the command writes them, both installed into one folder; gives the packages' and that folder."""
    packages, site = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("site")
    for name, kind in (("noisy_steps", "training"), ("mean_keeper", "post_training")):
        result = CliRunner().invoke(app, ["methods", "new", name, "--kind", kind, "--out", str(packages / name)])
        assert result.exit_code == 0, result.output
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", site)
    done = run(*pip, packages / "noisy_steps", packages / "mean_keeper")
    assert done.returncode == 0, done.stderr
    return packages, site


@pytest.fixture
def found(installed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The installed packages are on the path of this process."""
    monkeypatch.syspath_prepend(str(installed[1]))
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    for name in ("lowbit_noisy_steps", "lowbit_mean_keeper"):
        sys.modules.pop(name, None)
    registry._import_all.cache_clear()
    yield
    registry._import_all.cache_clear()


@pytest.mark.usefixtures("found")
def test_an_installed_package_is_known_through_its_entry_point(installed: tuple[Path, Path]) -> None:
    assert {info.name: info.kind for info in lowbit.list_methods("*_*e*")}.items() >= {
        "noisy_steps": "training",
        "mean_keeper": "post_training",
    }.items()
    assert Path(sys.modules["lowbit_noisy_steps"].__file__ or "").parent == installed[1]
    shown = CliRunner().invoke(app, ["methods", "show", "noisy_steps"], terminal_width=200).output
    shown = " ".join(shown.split())
    assert "noise" in shown and "from 0 to 1" in shown and "Width of the noise, in steps." in shown
    with pytest.raises(SpecError, match="noisy_steps: noise must be from 0 to 1, got 2"):
        lowbit.get_method("noisy_steps").method(noise=2.0)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy_steps", "mean_keeper"])
def test_the_skeleton_keeps_the_laws_as_it_is(name: str, installed: tuple[Path, Path]) -> None:
    packages, site = installed
    path = os.pathsep.join([str(site), str(ROOT / "src")])
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", packages / name / "tests", PYTHONPATH=path)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout


def test_an_installed_method_trains_exports_and_reports(installed: tuple[Path, Path], tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed[1]), str(ROOT / "src")])
    command = (sys.executable, "-m", "lowbit", "train", "--method", "noisy_steps", "-w", "2", "-a", "2", "--epochs", "1", "--option")
    done = run(*command, "noise=0.125", "--out", tmp_path / "out", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["method"], report["weight_bits"], report["activation_bits"]) == ("noisy_steps", 2, 2)
    settings = json.loads((tmp_path / "out" / "train.json").read_text())
    assert "noise" in json.dumps(settings) and len(re.findall(r'"method_source": "[0-9a-f]{64}"', json.dumps(settings))) == 1
    assert (tmp_path / "out" / "model.lowbit").stat().st_size > 0 and (tmp_path / "out" / "report.html").stat().st_size > 0


def test_a_package_that_cannot_be_loaded_is_named_and_does_not_stop_the_others(tmp_path: Path) -> None:
    facts = tmp_path / "broken_bits-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-bits\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text("[lowbit.methods]\nbroken = broken_bits\n")
    (tmp_path / "broken_bits.py").write_text("import no_such_module\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = run(sys.executable, "-c", "import lowbit; print(len(lowbit.list_methods()) > 20)", PYTHONPATH=path)
    assert done.stdout.strip() == "True", done.stderr
    assert "package broken-bits 1.2: 'broken_bits'" in done.stderr and "no_such_module" in done.stderr


def test_the_guide_shows_the_skeleton_and_its_class_trains_from_a_file(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    code = next(block for block in blocks if "class NoisySteps(TrainingMethod)" in block)
    assert code == skeleton("noisy_steps")["lowbit_noisy_steps.py"]
    (tmp_path / "guide.py").write_text(code)
    method = f"{tmp_path / 'guide.py'}:NoisySteps"
    before = training.prepared(method).conv1.weight
    after = training.trained(method).conv1.weight
    assert not torch.equal(before, after) and after.unique().numel() <= 4 * 16  # 2 bits, 16 channels
    rigid = training.train(training.ready(method, tiny.trained(), tiny.calibration()))
    assert torch.equal(rigid.conv1.weight, after)


def test_the_guide_names_every_allowed_fact() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for values in registry._SETS.values():
        assert all(f"`{value}`" in guide for value in values)


@pytest.mark.parametrize("name", ["Noisy", "2bits", "class", "noisy-steps", ""])
def test_a_name_that_is_no_lower_case_python_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="lower-case Python name such as my_method"):
        write_skeleton(name, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_taken_names_and_folders_with_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a training method called 'ewgs' is registered already"):
        write_skeleton("ewgs", folder=tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files already"):
        write_skeleton("noisy", folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

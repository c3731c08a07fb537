"""State on disk: complete or absent, only of this very run, never unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowbit.files
from lowbit.errors import FileFormatError, OutputError
from lowbit.post_training.reconstruction.resume import RunState, fingerprint

BASE = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([1, 2])}


def of(tensors: dict[str, Tensor] = BASE, facts: object = "facts") -> str:
    return fingerprint(tensors.items(), facts)


def test_a_fingerprint_follows_every_bit_name_shape_type_and_fact() -> None:
    nudged = BASE["a"].clone()
    nudged[3] = torch.nextafter(nudged[3], torch.tensor(9.0))
    negative_zero = torch.tensor([-0.0])
    others = [
        of({**BASE, "a": nudged}), of({**BASE, "a": BASE["a"].view(2, 2)}), of({**BASE, "a": BASE["a"].double()}),
        of({"c": BASE["a"], "b": BASE["b"]}), of({"b": BASE["b"], "a": BASE["a"]}), of({"a": BASE["a"]}), of(facts="other"),
        of({"z": negative_zero}), of({"z": negative_zero.abs()}),
    ]  # fmt: skip
    assert len({of(), *others}) == 10
    assert of({name: tensor.clone() for name, tensor in BASE.items()}) == of()


def test_a_fingerprint_does_not_follow_the_memory_layout() -> None:
    image = torch.randn(2, 3, 4, 5)
    assert of({"x": image}) == of({"x": image.contiguous(memory_format=torch.channels_last)})


def test_state_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "codes": torch.tensor([-3, 2], dtype=torch.int8)}
    state = RunState(tmp_path / "new" / "folder", "run")
    assert not state.is_resumed
    assert not state.has("unit")
    assert state.load("unit") is None
    state.save("unit", tensors, {"loss": 0.1, "name": "conv", "is_kept": True, "iteration": 7})
    again = RunState(tmp_path / "new" / "folder", "run")
    assert again.is_resumed
    assert not again.is_stale
    loaded, facts = again.load("unit")
    assert facts == {"loss": 0.1, "name": "conv", "is_kept": True, "iteration": 7}
    assert loaded["codes"].dtype == torch.int8
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    again.drop("unit")
    again.drop("never kept")
    assert not again.has("unit")


def test_state_of_another_run_is_removed(tmp_path: Path) -> None:
    RunState(tmp_path, "first").save("unit", {"x": torch.ones(1)}, {})
    second = RunState(tmp_path, "second")
    assert second.is_stale
    assert not second.is_resumed
    assert not second.has("unit")
    assert RunState(tmp_path, "second").is_resumed
    assert not RunState(tmp_path, "first").is_resumed


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"other": 1})])
def test_a_damaged_marker_counts_as_another_run(text: str, tmp_path: Path) -> None:
    RunState(tmp_path, "run").save("unit", {"x": torch.ones(1)}, {})
    (tmp_path / "run.json").write_text(text)
    assert not RunState(tmp_path, "run").has("unit")


@pytest.mark.parametrize("damage", [lambda raw: raw[:20], lambda raw: b"", lambda raw: raw[:8] + b"#" + raw[9:], lambda raw: raw[:-1]])
def test_a_damaged_file_is_named(damage: object, tmp_path: Path) -> None:
    state = RunState(tmp_path, "run")
    state.save("unit", {"x": torch.arange(6.0)}, {"loss": 1.0})
    path = tmp_path / "unit.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileFormatError, match=r"unit\.safetensors is damaged.*Remove it"):
        state.load("unit")


def test_a_failed_write_leaves_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState(tmp_path, "run")
    state.save("unit", {"x": torch.ones(3)}, {"iteration": 1})

    def full(_tensors: object, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lowbit.files, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        state.save("unit", {"x": torch.zeros(3)}, {"iteration": 2})
    tensors, facts = state.load("unit")
    assert facts == {"iteration": 1}
    assert tensors["x"].tolist() == [1, 1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "unit.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot make the folder .*file/inside.*work_dir"):
        RunState(tmp_path / "file" / "inside", "run")


def test_without_a_folder_nothing_is_kept() -> None:
    state = RunState(None, "run")
    state.save("unit", {"x": torch.ones(1)}, {})
    state.drop("unit")
    assert not state.has("unit")
    assert state.load("unit") is None

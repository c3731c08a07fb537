from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.errors import FileFormatError
from lowbit.models import load_model, load_weights

State = dict[str, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def trained() -> State:
    return {name: torch.full_like(tensor, 0.5) for name, tensor in network().state_dict().items() if tensor.is_floating_point()}


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "state_dict", "module", "ddp_of_compiled", "compiled_ddp"],
)
def test_weights_are_found_however_they_are_wrapped(tmp_path: Path, suffix: str, wrap: Callable[[State], object]) -> None:
    torch.save(wrap(trained()), tmp_path / f"w.{suffix}")
    model = network()
    load_weights(model, tmp_path / f"w.{suffix}")
    assert all((tensor == 0.5).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_safetensors_in_half_precision_become_float32(tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in trained().items()}, tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors")
    assert model[0].weight.dtype == torch.float32
    assert (model[0].weight == 0.5).all()


def test_what_does_not_fit_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    state = trained()
    state["2.weight"] = state.pop("0.bias")
    state["0.weight"] = torch.zeros(2, 3, 3, 3)
    save_file(state, tmp_path / "w.safetensors")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileFormatError) as error:
        load_weights(model, tmp_path / "w.safetensors")
    for words in (
        "missing (1): 0.bias",
        "unexpected (1): 2.weight",
        "other shape (1): 0.weight: file (2, 3, 3, 3), model (2, 1, 3, 3)",
        "do not fit Sequential",
    ):
        assert words in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Bomb:
    """Fails the test when something unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a weights file ran code",)


@pytest.mark.parametrize("content", [Bomb(), {"state_dict": {"a": Bomb()}}, network()], ids=["object", "inside", "whole network"])
def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(
        FileFormatError, match=r"would run code from the file\. Save the state dict alone, torch\.save\(model\.state_dict\(\)"
    ):
        load_weights(network(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "noise"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"w.{suffix}"
    torch.save(trained(), path) if suffix == "pt" else save_file(trained(), path)
    noise = torch.randint(256, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy().tobytes()
    path.write_bytes({"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"hello world" * 20, "noise": noise}[damage])
    with pytest.raises(FileFormatError, match=rf"w\.{suffix}: cannot be read as .*truncated, corrupt or of another format"):
        load_weights(network(), path)


@pytest.mark.parametrize(
    ("content", "found"), [([torch.zeros(1)], "found list"), ({"epoch": 3}, "found dict with epoch"), ({}, "found dict")]
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match=found):
        load_weights(network(), tmp_path / "w.pt")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no such file"):
        load_model("resnet8", tmp_path / "w.pt")

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from lowbit.errors import install_command
from lowbit.runtime.cuda import target
from lowbit.runtime.cuda.target import VARIABLE, cuda_target


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    cuda_target.cache_clear()
    yield
    cuda_target.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "has_device", "told"),
    [
        ("reference", True, "LOWBIT_KERNELS asks for the reference"),
        ("", False, "torch finds no CUDA device"),
        ("", True, f"triton is not installed: {install_command('cuda')}"),
    ],
)
def test_why_layers_on_cuda_run_in_float(wanted: str, has_device: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    assert cuda_target() == (False, told)


def test_a_triton_that_does_not_work_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C compiler here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "lowbit.runtime.cuda.kernels", SimpleNamespace(pack=broken))
    with pytest.warns(UserWarning, match="no C compiler here"):
        assert cuda_target() == (False, "triton does not work here (RuntimeError)")
    assert cuda_target()[0] is False

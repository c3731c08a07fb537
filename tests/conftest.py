"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Workers run side by side: one thread each, so that they do not fight over the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def available_devices() -> list[str]:
    """Names of the devices this machine can run tests on."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker holds all laws of a method, so that it trains a network for them once (``--dist loadgroup``)."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        if "laws" in item.path.parts and callspec is not None and isinstance(callspec.params.get("name"), str):
            item.add_marker(pytest.mark.xdist_group(callspec.params["name"]))


@pytest.fixture(params=available_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A file that one test wrote and imported is not what the next one finds under the same name."""
    known, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    written = str(tmp_path_factory.getbasetemp().resolve())
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(written) and not name.startswith("lowbit_file_"):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Networks that tests name are not noted in the cache of whoever runs them."""
    folder = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lowbit.workflows.trust._folder", lambda: folder)
        yield

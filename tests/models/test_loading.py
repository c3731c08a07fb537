from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.errors import MissingExtraError, SpecError, UnknownNameError, install_command
from lowbit.files import without_downloads
from lowbit.models import full_name, load_model

FILE = """
import torch
from beside_it import WIDTH

class Net(torch.nn.Linear):
    def __init__(self, out=WIDTH):
        super().__init__(3, out)

def broken():
    raise RuntimeError("no disk")

def text():
    return "a network"

ready = Net(2)
number = 5
"""


@pytest.fixture
def network_file(tmp_path: Path) -> Path:
    (tmp_path / "beside_it.py").write_text("WIDTH = 4")
    (tmp_path / "some_network.py").write_text(FILE)
    return tmp_path / "some_network.py"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'resnet200'. Did you mean 'resnet20'\?"):
        load_model("resnet200")


def test_a_factory_in_a_file_gets_the_options(network_file: Path) -> None:
    assert load_model(f"{network_file}:Net").weight.shape == (4, 3)
    assert load_model(f"{network_file}:Net", out=6).weight.shape == (6, 3)


def test_two_files_of_one_name_are_two_networks_that_pickle(tmp_path: Path) -> None:
    for folder, width in (("first", 3), ("second", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(
            f"import torch\nclass Net(torch.nn.Linear):\n    def __init__(self): super().__init__({width}, 2)"
        )
        network = load_model(f"{tmp_path / folder / 'same_name.py'}:Net")
        assert pickle.loads(pickle.dumps(network)).in_features == width


def test_a_file_named_as_an_installed_module_does_not_take_its_place(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("import torch\nnetwork = torch.nn.Linear(3, 2)")
    load_model(f"{tmp_path / 'json.py'}:network")
    assert hasattr(sys.modules["json"], "dumps")


def test_a_factory_in_a_module_of_the_current_folder(network_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(network_file.parent)
    assert load_model("some_network:Net", out=2).weight.shape == (2, 3)


def test_a_factory_in_an_installed_module() -> None:
    model = load_model("torch.nn:Linear", in_features=3, out_features=2)
    assert isinstance(model, nn.Linear)
    assert not model.training


def test_a_ready_network_can_be_named_but_takes_no_options(network_file: Path) -> None:
    assert load_model(f"{network_file}:ready").weight.shape == (2, 3)
    with pytest.raises(SpecError, match="takes no options, got out"):
        load_model(f"{network_file}:ready", out=3)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_package.net:make", "model no_such_package.net: importing it failed with ModuleNotFoundError"),
        ("/no/such/file.py:make", "model /no/such/file.py: there is no such file in /no/such. Name one"),
        ("{file}:broken", "failed with RuntimeError: no disk"),
        ("{file}:text", "returned str, expected a torch.nn.Module"),
    ],
)
def test_what_goes_wrong_is_said(network_file: Path, spec: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_model(spec.format(file=network_file))


def test_a_wrong_option_shows_what_the_factory_takes() -> None:
    with pytest.raises(SpecError, match=r"unexpected keyword argument 'classes'.*It takes \(num_classes: 'int' = 10, in_channels"):
        load_model("resnet8", classes=3)


@pytest.mark.parametrize("name", ["Nett", "number"])
def test_a_factory_that_is_not_there_is_named(network_file: Path, name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown factory in .*{name}"):
        load_model(f"{network_file}:{name}")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_said_with_the_install_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*{re.escape(install_command('models'))}"):
        load_model(f"{package}:resnet18")


@pytest.mark.parametrize(("spec", "count"), [("timm:resnet18", 11_689_512), ("torchvision:resnet18", 11_689_512)])
def test_networks_of_timm_and_torchvision(spec: str, count: int) -> None:
    package = spec.partition(":")[0]
    try:
        model = load_model(spec)
    except MissingExtraError:
        pytest.skip(f"{package} is not installed")
    assert sum(p.numel() for p in model.parameters()) == count
    assert load_model(spec, num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with without_downloads():  # trained weights are left out
        assert load_model(spec, pretrained=True).training is False
    with pytest.raises(UnknownNameError, match=f"unknown {package} model 'resnet18x'"):
        load_model(f"{package}:resnet18x")
    with pytest.raises(SpecError, match="nonsense"):
        load_model(spec, nonsense=1)


@pytest.mark.parametrize(
    ("source", "spec", "words"),
    [
        ("import sys\ndef build():\n    sys.exit(0)\n", ":build", "calling the factory with no options failed with SystemExit: 0"),
        ("import sys\nsys.exit(0)\n", ":build", "failed with SystemExit: 0"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError('in str')\ndef build():\n    raise E\n",
            ":build",
            "failed with E, without a readable message",
        ),
        (
            "import torch\ndef one(n):\n    return torch.nn.Linear(n, 1)\n",
            "",
            r"name the function or class in it, as .*exiting_net\.py:NAME\. It has: one \(none of them makes a network without arguments",
        ),
        (
            "import torch\ndef one():\n    return torch.nn.Linear(1, 1)\ntwo = torch.nn.ReLU\ndef three() -> torch.nn.Module:\n    return two()\n",
            "",
            r"It has: one, three \(one, three need no arguments\)\.",
        ),
    ],
)
def test_code_of_the_user_that_exits_or_is_not_named_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, spec: str, words: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "exiting_net.py").write_text(source)
    try:
        with pytest.raises(SpecError, match=words):
            load_model(f"{tmp_path / 'exiting_net.py'}{spec}")
    finally:
        sys.modules.pop("exiting_net", None)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def build():\n    return nn.Linear(2, 3)\n", "build"),
        (
            "class Net(nn.Linear):\n    def __init__(self, width=3):\n        super().__init__(2, width)\ndef seed():\n    torch.manual_seed(0)\n",
            "Net",
        ),
        (
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 3)\ndef build() -> nn.Module:\n    return Net()\n",
            "build",
        ),
        ("class Block(nn.Linear):\n    pass\ndef classes() -> int:\n    return 3\nnet = Block(2, classes())\n", "net"),
    ],
    ids=["function", "class beside a helper", "function of a class", "network"],
)
def test_a_file_with_one_factory_needs_no_name(source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "only_net.py"
    path.write_text(f"import torch\nfrom torch import nn\n{source}")
    try:
        assert full_name(str(path)) == f"{path}:{name}"
        assert load_model(str(path))(torch.zeros(1, 2)).shape == (1, 3)
    finally:
        sys.modules.pop("only_net", None)


def test_a_file_of_weights_is_no_network() -> None:
    with pytest.raises(SpecError, match=r"net\.pt: a file of weights. Name the network as file\.py:factory"):
        load_model("net.pt")

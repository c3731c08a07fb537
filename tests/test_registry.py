from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit import registry
from lowbit.errors import CalibrationError, DataError, GraphError, LayerError, SpecError, UnknownNameError
from lowbit.methods.gradients.ewgs import Ewgs
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.options import hyper_parameters_of, make_method
from lowbit.plugins import source_digest
from lowbit.qat.prepare import method_of
from lowbit.registry import MethodInfo, check_needs, find_method, get_method, list_methods, register
from lowbit.spec import LayerBits
from tests.qat.training import assert_same, killed, train

INFO = MethodInfo("two_ways", "", "", "other", ("data",), "synthesis", range(1, 9), None, (), "unverified", "")


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry afterwards is what it was before."""
    list_methods()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    yield
    registry._import_all.cache_clear()


# Kinds


@pytest.mark.usefixtures("restored")
def test_one_paper_may_have_a_method_of_each_kind_and_the_kind_says_which() -> None:
    for kind in ("synthesis", "search"):
        register(replace(INFO, kind=kind))(type("TwoWays", (), {}))  # type: ignore[arg-type]
    assert get_method("two_ways", "search").kind == "search"
    assert [info.kind for info in list_methods("two_ways")] == ["search", "synthesis"]
    with pytest.raises(SpecError, match=r"several kinds \(search and synthesis\).*kind='search' in Python, kind: search in a suite"):
        get_method("two_ways")
    with pytest.raises(SpecError, match=r"'two_ways' is a search and synthesis method\. To train use one of: .*ewgs"):
        get_method("two_ways", "training")


@pytest.mark.usefixtures("restored")
def test_a_second_method_of_one_name_and_kind_and_a_class_registered_twice_are_errors() -> None:
    cls = register(INFO)(type("TwoWays", (), {}))
    with pytest.raises(ValueError, match="a synthesis method called 'two_ways' is registered already"):
        register(INFO)(type("Other", (), {}))
    with pytest.raises(ValueError, match="Give each kind of method a class of its own"):
        register(replace(INFO, kind="search"))(cls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"section": "misc"}, "section may hold .*other; got 'misc'"),
        ({"axes": ("data", "weights")}, "axes may hold .*procedure.*; got 'weights'"),
        ({"axes": "data"}, None),
        ({"kind": "qat"}, "kind may hold post_training, training, search, synthesis; got 'qat'"),
        ({"needs": ("gpu",)}, "needs may hold .*batch_norm.*; got 'gpu'"),
        ({"fidelity": "good"}, "fidelity may hold exact, .*; got 'good'"),
        ({"weight_bits": range(9)}, r"weight_bits must lie within range\(1, 9\)"),
        ({"activation_bits": range(2, 2)}, "activation_bits must lie within"),
    ],
)
def test_facts_outside_of_their_sets_are_refused(wrong: dict[str, object], message: str | None) -> None:
    if message is None:
        message = "axes must be a tuple"
    with pytest.raises(SpecError, match=f"method 'two_ways': {message}"):
        register(replace(INFO, **wrong))  # type: ignore[arg-type]


# Needs


def test_needs_are_errors_or_notes() -> None:
    everything = replace(INFO, needs=("calibration", "labels", "graph", "batch_norm", "teacher", "pretrained"))
    assert check_needs(everything) == []  # nothing is known
    assert check_needs(everything, calibration=True, labels=True, graph=True, batch_norm=True, teacher=True, pretrained=True) == []
    for fact, error in (("calibration", CalibrationError), ("labels", DataError), ("batch_norm", LayerError)):
        with pytest.raises(error, match="'two_ways'"):
            check_needs(everything, **{fact: False})  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"cannot be captured \(a branch in forward\)"):
        check_needs(everything, graph="a branch in forward")
    notes = check_needs(everything, teacher=False, pretrained=False)
    assert ["teacher" in note for note in notes] == [True, False] and "trained weights" in notes[1]
    assert check_needs(replace(INFO, needs=()), calibration=False, labels=False) == []


def test_quantize_holds_needs_before_it_works() -> None:
    with pytest.raises(CalibrationError, match="'adaround' needs calibration data: pass calibration="):
        lowbit.quantize(nn.Linear(2, 2), method="adaround", sample=torch.zeros(1, 2))


# Every method


@pytest.mark.parametrize("info", list_methods(), ids=lambda info: info.name)
def test_every_number_has_a_range_that_holds_its_default(info: MethodInfo) -> None:
    assert info.method is not None
    info.method()  # checks the defaults
    without = [name for name, setting in hyper_parameters_of(info).items() if holds_numbers(setting.type) and setting.interval is None]
    assert without == []


def holds_numbers(hint: object) -> bool:
    """Whether a type is a number, or has one among its arguments."""
    return hint in (int, float) or any(holds_numbers(kind) for kind in typing.get_args(hint))


@pytest.mark.parametrize(
    ("name", "bits", "first"),
    [
        ("lsq", LayerBits(2, 2), LayerBits(8, 8)),
        ("ewgs", LayerBits(2, 2), LayerBits(None, None)),
        ("twn", LayerBits(2, None), LayerBits(2, None)),
        ("proxquant", LayerBits(1, None), LayerBits(1, None)),
        ("proxquant", LayerBits(2, None), LayerBits(None, None)),
        ("brecq", LayerBits(4, 4), LayerBits(8, 8)),
        ("adaround", LayerBits(4, 8), LayerBits(4, 8)),
    ],
)
def test_the_papers_policy_says_what_becomes_of_the_ends(name: str, bits: LayerBits, first: LayerBits) -> None:
    policy = make_method(name, get_method(name).kind, {}).default_policy(bits)
    layer = nn.Linear(2, 2)
    assert policy.bits_for("inner", layer) == bits
    assert policy.bits_for("end", layer, position="first") == policy.bits_for("end", layer, position="last") == first


@pytest.mark.parametrize("info", list_methods(kind="training"), ids=lambda info: info.name)
def test_the_papers_recipe_gives_phases_that_fill_its_epochs(info: MethodInfo) -> None:
    method = make_method(info.name, "training", {})
    assert isinstance(method, lowbit.TrainingMethod)
    recipe = method.default_recipe()
    assert sum(phase.epochs for phase in method.phases(recipe)) == recipe.epochs


def test_recipes_have_the_numbers_of_the_papers() -> None:
    ewgs = Ewgs().default_recipe()
    assert (ewgs.epochs, ewgs.batch_size, ewgs.optimizer.kind, ewgs.optimizer.learning_rate) == (400, 256, "adam", 1e-3)
    connect = make_method("binary_connect", "training", {}).default_recipe()  # type: ignore[attr-defined]
    assert connect.optimizer.rate_at(0) == pytest.approx(3e-3) and connect.optimizer.rate_at(1) == pytest.approx(2e-6)
    xnor = make_method("xnor_net", "training", {}).default_recipe().optimizer  # type: ignore[attr-defined]
    assert [xnor.rate_at(epoch / 320) for epoch in (119, 120, 200, 240, 280)] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5, 1e-6])


def test_the_papers_policy_and_recipe_are_asked_for_by_a_word() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = lowbit.prepare(network, method="ewgs", weight_bits=2, activation_bits=2, sample=torch.randn(8, 4), policy="paper")
    rows = [(row.weight_bits, row.activation_bits) for row in lowbit.summary(model).layers]
    assert rows == [(None, None), (2, 2), (None, None)]
    with pytest.raises(SpecError, match="policy must be a BitPolicy or 'paper', got 'papers'"):
        lowbit.prepare(network, method="ewgs", sample=torch.randn(8, 4), policy="papers")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="recipe must be a Recipe or 'paper', got 'best'"):
        lowbit.train(network, (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)), recipe="best")  # type: ignore[arg-type]


# Classes, objects and files


FILE = '''
from dataclasses import dataclass

from lowbit import register
from lowbit.methods.quantizer_design.lsq import Lsq
from dataclasses import replace


@register(replace(Lsq.info, name="lsq", summary="mine", method=None))
@dataclass
class Mine(Lsq):
    """Learned steps without an offset.

    Attributes:
        factor: Nothing yet.
    """

    factor: float = 1.0


class Plain:
    pass
'''


def prepared(method: object, **options: object) -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return lowbit.prepare(network, method=method, weight_bits=3, activation_bits=3, sample=torch.randn(8, 4), **options)  # type: ignore[arg-type]


def test_a_method_may_be_a_class_an_object_or_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my file.py"
    path.write_text(FILE)
    from_file = prepared(f"{path}:Mine", factor="2")
    assert vars(method_of(from_file))["factor"] == 2.0 and type(method_of(from_file)).__name__ == "Mine"
    assert get_method("lsq").method is Lsq  # the name is taken in the file alone
    assert type(method_of(prepared(f"{path}:Mine"))) is type(method_of(from_file))  # run once
    for copied in (copy.deepcopy(from_file), pickle.loads(pickle.dumps(from_file))):
        assert torch.equal(copied(torch.ones(1, 4)), from_file(torch.ones(1, 4)))
    assert method_of(prepared(Ewgs, delta=0.5)) == Ewgs(delta=0.5)
    chosen = Ewgs(delta=0.25)
    assert method_of(prepared(chosen)) is chosen
    with pytest.raises(SpecError, match=r"hyper-parameters of its own: set delta there"):
        prepared(chosen, delta=0.1)


def test_a_class_without_facts_of_its_own_has_those_of_its_base_and_its_own_name() -> None:
    @dataclass
    class Sharper(Ewgs):
        delta: float = 0.5

    info = find_method(Sharper)
    assert (info.name, info.kind, info.method) == ("Sharper", "training", Sharper)
    assert lowbit.summary(prepared(Sharper)).method == "Sharper"


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        ("{}", SpecError, "say which class of the file is meant, as .*:CLASS. It defines: Mine, Plain"),
        ("{}:Min", UnknownNameError, "unknown class of .*'Min'. Did you mean 'Mine'"),
        ("{}:Plain", SpecError, r"Plain: it has no facts. Put @lowbit.register"),
        ("{}.none.py:Mine", SpecError, "cannot read .* Give the path of a Python file"),
        ("{}/broken.py:Mine", SpecError, "broken.py fails when it is run: ZeroDivisionError"),
    ],
)
def test_files_that_hold_no_method_are_refused(ask: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(error, match=message):
        find_method(ask.format(tmp_path if "broken" in ask else path), "training")
    assert not [name for name in sys.modules if name.startswith("lowbit_file_broken")]


def test_a_method_of_another_kind_names_those_that_fit(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    with pytest.raises(SpecError, match=r"'lsq' is a training method\. To quantize without training use one of: .*brecq"):
        lowbit.quantize(nn.Linear(2, 2), method=f"{path}:Mine", sample=torch.zeros(1, 2))


def test_a_changed_file_is_another_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    first = find_method(f"{path}:Mine").method
    path.write_text(FILE.replace("factor: float = 1.0", "factor: float = 3.0"))
    second = find_method(f"{path}:Mine").method
    assert first is not None and second is not None
    assert [dataclasses.fields(cls)[-1].default for cls in (first, second)] == [1.0, 3.0]
    assert source_digest(Ewgs) is None and source_digest(second) is not None


def test_a_stopped_run_of_a_changed_file_is_not_resumed(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.py", tmp_path / "out"
    path.write_text(FILE)
    killed(7, out, method=f"{path}:Mine")
    path.write_text(FILE + "# changed\n")
    with pytest.raises(SpecError, match="method_source"):
        train(out=out, method=f"{path}:Mine")
    path.write_text(FILE)
    assert_same(train(out=out, method=f"{path}:Mine"), train(method=f"{path}:Mine"))

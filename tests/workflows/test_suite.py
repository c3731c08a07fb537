from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.errors import SpecError, UnknownNameError
from lowbit.spec import LayerBits
from lowbit.workflows.suite import DEFAULT_METHODS, BitPair, Contender, SubjectSettings, Suite


def test_a_suite_is_networks_times_methods_times_bits_times_seeds() -> None:
    suite = Suite(networks=("digits", "resnet8"), methods=("lsq", "dfq"), bits="4/4,8", seeds=2, data="digits")  # type: ignore[arg-type]
    cells = [cell for cell, reason in suite.cells() if not reason]
    assert len(cells) == len({cell.key({}) for cell in cells}) == 16
    assert {cell.subject for cell in cells} == {"digits", "resnet8 on digits"}
    assert {(cell.label, cell.kind) for cell in cells} == {("lsq", "training"), ("dfq", "post_training")}
    assert {(cell.bits, cell.seed) for cell in cells} == {("4/4", 0), ("4/4", 1), ("8/8", 0), ("8/8", 1)}


def test_nothing_named_is_five_methods_at_two_widths_with_three_seeds() -> None:
    suite = Suite()
    assert tuple(contender.name for contender in suite.methods) == DEFAULT_METHODS
    assert len([cell for cell, reason in suite.cells() if not reason]) == 30
    assert [subject.title for subject in suite.subjects] == ["digits"]


def test_a_suite_file_gives_the_suite_back(tmp_path: Path) -> None:
    suite = Suite(
        networks=({"model": "resnet8", "data": "fashion-mnist", "name": "r8"},),  # type: ignore[arg-type]
        methods=("lsq", {"method": "ewgs", "label": "ewgs, more", "options": {"delta": 0.01}}, {"method": "lsq", "surrogate": "ewgs"}),  # type: ignore[arg-type]
        bits=("4/8", "2/float"),  # type: ignore[arg-type]
        baseline="lsq",
        equal=("granularity",),
    ).changed({"epochs": 7, "optimizer": {"learning_rate": 0.1}})
    path = tmp_path / "suite.yaml"
    path.write_text(suite.to_yaml())
    assert Suite.from_yaml(path) == suite
    assert suite.recipe.epochs == 7 and suite.bits == (BitPair(4, 8), BitPair(2, None))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seeds: 3\nmethodz: [lsq]", r"suite.yaml, line 2 'methodz'. Did you mean 'methods'"),
        ("methods:\n- lsq\n- method: pact\n  optoins: {a: 1}", r"suite.yaml: methods, line 4 'optoins'. Did you mean 'options'"),
        ("networks:\n- model: resnet20\n  weigths: a", r"suite.yaml: networks, line 3 'weigths'"),
        ("\nseeds: many", r"suite.yaml, line 2: option seeds must be int, got 'many'"),
        ("bits: [4/4/4]", r"suite.yaml, line 1: bits: expected WEIGHTS/ACTIVATIONS such as 4/8, got '4/4/4'"),
        ("bits: [9/9]", r"suite.yaml, line 1: bits: bit_width must be a whole number from 1 to 8, got 9"),
        ("methods:\n- label: a", r"suite.yaml: methods, line 2: expected a name, or names and values with 'method' among them"),
        ("methods:\n- method: lsq\n  options: 3", r"suite.yaml: methods, line 3: options must hold names and values, got 3"),
    ],
)
def test_a_typo_is_named_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises((SpecError, UnknownNameError), match=told):
        Suite.from_yaml(path)


def test_bits_that_a_method_does_not_have_are_skipped_with_the_reason() -> None:
    suite = Suite(methods=("bi_real_net", "binary_connect", "dfq"), bits=("1/1", "4/4"), seeds=1)  # type: ignore[arg-type]
    reasons = {(cell.label, cell.bits): reason for cell, reason in suite.cells()}
    assert reasons["bi_real_net", "1/1"] == ""
    assert reasons["bi_real_net", "4/4"] == "bi_real_net has weight bits 1, not 4"
    assert reasons["dfq", "1/1"] == "dfq has weight bits 2, 3, 4, 5, 6, 7, 8, not 1"
    assert all(reasons[name, "4/4"] for name in ("bi_real_net", "binary_connect"))


def test_an_altered_method_carries_another_name() -> None:
    assert Contender.parse({"method": "ewgs", "options": {"delta": 0.001}}).name == "ewgs (delta=0.001)"
    assert Contender.parse({"method": "lsq", "surrogate": "ewgs"}).name == "lsq (ewgs)"
    assert Contender.parse({"method": "lsq", "procedure": "qkd"}).name == "lsq (qkd)"
    options = {"temperature": 3}
    through = Contender.parse({"method": "lsq", "surrogate": "ewgs", "procedure": "qkd", "procedure_options": options})
    assert through.name == "lsq (temperature=3, ewgs, qkd)"
    (cell, _), *_ = Suite(methods=(through,)).cells()
    assert cell.changes == {"surrogate": "ewgs", "procedure": "qkd", "procedure.temperature": 3}
    assert cell.key({}) != replace(cell, procedure_options={}).key({}) != replace(cell, procedure_options={}, procedure=None).key({})
    for wrong, told in (
        (({"method": "lsq", "label": "lsq", "surrogate": "ewgs"},), "'lsq' is altered, so it needs another label"),
        (({"method": "lsq", "label": "lsq", "procedure": "qkd"},), "'lsq' is altered, so it needs another label"),
        (({"method": "proxquant", "procedure": "qkd"},), "the quantizers of 'proxquant' need its own phases"),
        (({"method": "dfq", "procedure": "qkd"},), "a procedure is for training methods"),
        (({"method": "lsq", "label": "pact"},), "the label 'pact' is the name of another method"),
        (("lsq", "lsq"), "'lsq' appears twice"),
    ):
        with pytest.raises(SpecError, match=told):
            Suite(methods=wrong).check()  # type: ignore[arg-type]


def test_of_a_name_of_several_kinds_the_one_that_quantizes_is_meant() -> None:
    suite = Suite(methods=("zeroq",))  # type: ignore[arg-type]
    suite.check()
    assert {cell.kind for cell, _ in suite.cells()} == {"post_training"}
    with pytest.raises(SpecError, match=r"'integer_only' is a method of several kinds .*kind: post_training in a suite"):
        Suite(methods=("integer_only",)).check()  # type: ignore[arg-type]
    for name, told in (("dsg", "a synthesis method .* with calibration: dsg"), ("haq", r"a search method .* with search: {method: haq}")):
        with pytest.raises(SpecError, match=f"methods, {name}: {told}"):
            Suite(methods=(name,)).check()  # type: ignore[arg-type]


def test_unknown_names_are_told_before_anything_runs() -> None:
    for changes, told in (
        ({"methods": ("lsqq",)}, "lsqq"),
        ({"methods": ({"method": "lsq", "options": {"x": 1}},)}, "'x'"),
        ({"methods": ({"method": "lsq", "surrogate": "no"},)}, "'no'"),
        ({"baseline": "pactt"}, "'pactt'. Did you mean 'pact'"),
        ({"equal": ("granularty",)}, "'granularty'. Did you mean 'granularity'"),
    ):
        with pytest.raises(UnknownNameError, match=told):
            Suite(**changes).check()  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="a surrogate is for training methods"):
        Suite(methods=({"method": "dfq", "surrogate": "ewgs"},)).check()  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="there is none"):
        Suite(methods=()).check()
    with pytest.raises(SpecError, match="'digits' appears twice"):
        Suite(networks=("digits", "digits")).check()  # type: ignore[arg-type]


def test_terms_hold_what_each_kind_looks_at_and_no_seed() -> None:
    suite = Suite(methods=("lsq", "dfq"), seeds=2)  # type: ignore[arg-type]
    cells = [cell for cell, _ in suite.cells()]
    terms = {cell.kind: cell.terms for cell in cells}
    assert terms["training"].keys() == {"policy", "recipe", "augment"}
    assert terms["post_training"].keys() == {"policy", "calibration_samples", "batch_size"}
    assert "seed" not in terms["training"]["recipe"]  # type: ignore[operator]
    longer = [cell for cell, _ in suite.changed({"epochs": 50}).cells()]
    unchanged = {cell.kind for cell, other in zip(cells, longer, strict=True) if cell.key({}) == other.key({})}
    assert unchanged == {"post_training"}


def test_a_contender_says_what_makes_its_samples() -> None:
    suite = Suite(
        methods=("dfq", {"method": "dfq", "calibration": "dsg", "calibration_options": {"iterations": 9}}, {"method": "dfq", "label": "own", "calibration": "data"},
                 "pact", {"method": "pact", "calibration": "noise"}), bits=("4/8",), seeds=1, calibration="zeroq",
    )  # fmt: skip
    cells = {cell.label: cell for cell, _ in suite.cells()}
    assert {label: (cell.calibration, dict(cell.calibration_options)) for label, cell in cells.items()} == {
        "dfq": ("zeroq", {}),
        "dfq (iterations=9, dsg)": ("dsg", {"iterations": 9}),
        "own": (None, {}),
        "pact": (None, {}),
        "pact (noise)": ("noise", {}),
    }
    assert cells["pact (noise)"].terms["synthesized_samples"] == 1024 and "synthesized_samples" not in cells["pact"].terms
    assert cells["own"].key({}) == replace(cells["own"], calibration=None).key({}) != replace(cells["own"], calibration="dsg").key({})
    assert cells["dfq (iterations=9, dsg)"].changes["calibration"] == "dsg"
    for changes, error, told in (
        ({"calibration": "dsq"}, UnknownNameError, "'dsq'. Did you mean 'dsg'"),
        ({"methods": ({"method": "dfq", "calibration": "digits"},)}, UnknownNameError, "calibration of methods, dfq"),
        ({"calibration": "zeroq", "calibration_options": {"x": 1}}, UnknownNameError, "suite, calibration: .*'x'"),
        ({"calibration_options": {"iterations": 1}}, SpecError, "need the method that makes samples"),
        ({"methods": ({"method": "dfq", "label": "dfq", "calibration": "dsg"},)}, SpecError, "it needs another label"),
    ):
        with pytest.raises(error, match=told):
            Suite(**{"methods": ("dfq",), **changes}).check()  # type: ignore[arg-type]


def test_recipes_and_policies_follow_the_track() -> None:
    from lowbit.qat.recipe import Recipe

    paper = Recipe(epochs=90, batch_size=7)
    cell = next(cell for cell, _ in Suite(methods=("lsq",), bits="2/2").cells())  # type: ignore[arg-type]
    aligned = Suite(methods=("lsq",), first_last_bits="same").changed({"epochs": 3, "seed": 4})  # type: ignore[arg-type]
    assert aligned.recipe_for(cell, paper).epochs == 3 and aligned.recipe_for(cell, paper).seed == cell.seed == 0
    assert aligned.policy(LayerBits(2, 2)).first_last is None and aligned.seed_numbers == range(4, 7)
    published = Suite(methods=("lsq",), track="published")  # type: ignore[arg-type]
    assert published.recipe_for(cell, paper) == paper
    assert Suite(track="published", paper_epochs=2).recipe_for(cell, paper) == Recipe(epochs=2, batch_size=7)


def test_networks_without_data_take_the_shared_one() -> None:
    suite = Suite(networks=("resnet8", SubjectSettings(model="resnet20", data="cifar10")), data="fashion-mnist")  # type: ignore[arg-type]
    assert [subject.data for subject in suite.subjects] == ["fashion-mnist", "cifar10"]


def test_a_method_may_have_bits_and_networks_of_its_own() -> None:
    suite = Suite(
        networks=("digits", {"model": "resnet8", "data": "digits", "name": "r8"}),  # type: ignore[arg-type]
        methods=("lsq", {"method": "xnor_net", "bits": "1/1,1/float", "networks": ["r8"]}),  # type: ignore[arg-type]
        seeds=1,
        orderings=("lsq > xnor_net at 1/1",),  # type: ignore[arg-type]
    )
    assert [(cell.subject, cell.label, cell.bits) for cell, _ in suite.cells()] == [
        ("digits", "lsq", "4/4"), ("digits", "lsq", "2/2"), ("r8", "lsq", "4/4"), ("r8", "lsq", "2/2"), ("r8", "xnor_net", "1/1"),
        ("r8", "xnor_net", "1/float"),
    ]  # fmt: skip


def test_a_label_may_come_again_for_other_cells_only() -> None:
    again = [{"method": "lsq", "bits": "4/4"}, {"method": "lsq", "bits": "2/2"}]
    assert len(list(Suite(methods=again, seeds=1).cells())) == 2  # type: ignore[arg-type]
    for other in ({"method": "lsq", "bits": "4/4,2/2"}, {"method": "pact", "label": "same", "bits": "2/2"}):
        with pytest.raises(SpecError, match="appears twice"):
            Suite(methods=({"method": "lsq", "label": "same", "bits": "4/4"}, {**other, "label": "same"})).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"orderings": ("lsq > lsqq at 2/2",)}, r"method of the ordering 'lsq > lsqq at 2/2' 'lsqq'. Did you mean 'lsq'"),
        ({"networks": ("digits",), "methods": ({"method": "lsq", "networks": "digit"},)}, r"network of lsq 'digit'. Did you mean 'digits'"),
    ],
)
def test_names_that_are_not_in_the_suite_are_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UnknownNameError, match=told):
        Suite(**{"methods": ("lsq",), **changes}).check()  # type: ignore[arg-type]


def test_a_method_of_several_widths_is_measured_at_each_and_in_mixtures() -> None:
    mixer = Contender.parse({"method": "bit_mixer", "widths": "4,3,2", "mixtures": 5})
    assert mixer.name == "bit_mixer (4/4, 3/3, 2/2)"
    suite = Suite(methods=(mixer, Contender("lsq")), bits=("4/4", "2/2"), seeds=1)  # type: ignore[arg-type]
    cells = [cell for cell, _ in suite.cells()]
    assert [(cell.label, cell.bits) for cell in cells] == [
        (mixer.name, "4/4"), (mixer.name, "3/3"), (mixer.name, "2/2"), (mixer.name, "mixed"), ("lsq", "4/4"), ("lsq", "2/2"),
    ]  # fmt: skip
    assert [list(cell.widths) for cell in cells] == [["4/4", "3/3", "2/2"]] * 4 + [[]] * 2
    assert len({cell.key({}) for cell in cells}) == 6 and len({cell.trained.key({}) for cell in cells}) == 3  # one training for the mixer


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"method": "lsq", "widths": "8,4"}, "lsq.*one width"),
        ({"method": "lbq", "widths": "8,4"}, "widths are for training methods"),
        ({"method": "adabits", "widths": "4,8"}, "8/8 is above 4/4"),
        ({"method": "adabits", "widths": "8,8"}, "8/8 stands there twice"),
        ({"method": "adabits", "widths": "8,4", "bits": "4,2"}, "bits 2/2 are not among its widths 8/8, 4/4"),
        ({"method": "adabits", "widths": "8,4", "mixtures": 3}, "mixtures are for methods that mix widths"),
        ({"method": "bit_mixer", "mixtures": 3}, "need widths"),
        ({"method": "bit_mixer", "widths": "4,2", "mixtures": "some"}, "mixtures must be a whole number"),
    ],
)
def test_widths_that_a_method_cannot_have_are_errors(entries: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Suite(methods=(Contender.parse(entries),)).check()

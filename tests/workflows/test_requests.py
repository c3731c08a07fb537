from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from torch import nn

import lowbit
from lowbit.errors import SpecError, UnknownNameError
from lowbit.options import settings_of
from lowbit.spec import BitPolicy, LayerBits
from lowbit.workflows import requests
from lowbit.workflows.quantize import open_quantization
from lowbit.workflows.request import Request, fields_of
from lowbit.workflows.requests import QuantizeRequest, TrainRequest
from lowbit.workflows.settings import BitSettings

LAYER = nn.Linear(2, 2)
REQUESTS = [kind for kind in vars(requests).values() if isinstance(kind, type) and issubclass(kind, Request) and kind.command]


def test_bits_that_are_not_given_are_eight() -> None:
    policy = BitSettings().bit_policy()
    assert policy.bits_for("a", LAYER) == LayerBits(8, 8)
    assert policy.bits_for("a", LAYER, position="first") == LayerBits(8, 8)


def test_first_and_last_layer_get_at_least_eight_bits_unless_told_otherwise() -> None:
    assert BitSettings("2", "4").bit_policy().bits_for("a", LAYER, position="last") == LayerBits(8, 8)
    assert BitSettings("2", "4", "6").bit_policy().bits_for("a", LAYER, position="first") == LayerBits(6, 6)
    assert BitSettings("2", "4", "same").bit_policy().bits_for("a", LAYER, position="first") == LayerBits(2, 4)


def test_float_is_a_bit_width() -> None:
    assert BitSettings("4", "float").bit_policy().bits_for("a", LAYER) == LayerBits(4, None)


def test_only_leaves_all_other_layers_in_float_and_keep_wins_over_it() -> None:
    policy = BitSettings(4, 8, only=("body.*",), keep=("body.3",)).bit_policy()
    assert policy.bits_for("body.1", LAYER) == LayerBits(4, 8)
    assert policy.bits_for("body.3", LAYER) == LayerBits(None, None)
    assert policy.bits_for("head", LAYER, position="last") == LayerBits(None, None)


def test_a_policy_may_be_a_file_or_an_object_and_other_bits_beside_it_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    policy = BitPolicy.uniform(3, 5)
    policy.to_yaml(path)
    assert BitSettings().changed({"policy": str(path), "keep": ["head"]}).bit_policy().bits_for("head", LAYER) == LayerBits(None, None)
    assert BitSettings(policy=policy).bit_policy() == policy  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="leave out weight_bits"):
        BitSettings(3, policy=policy).bit_policy()  # type: ignore[arg-type]


def test_the_papers_policy_has_the_bits_asked_for_and_the_ends_of_the_paper(tmp_path: Path) -> None:
    policy = TrainRequest(method="proxquant", weight_bits=2, policy="paper").bit_policy()
    assert policy == lowbit.get_method("proxquant").method().default_policy(LayerBits(2, None))  # type: ignore[misc,attr-defined]
    assert policy.bits_for("a", LAYER, position="first") == LayerBits(None, None)
    bits = QuantizeRequest(weight_bits=3, policy="paper", keep=("head",)).bit_policy()
    assert (bits.bits_for("a", LAYER), bits.bits_for("head", LAYER)) == (LayerBits(3, 8), LayerBits(None, None))
    with pytest.raises(SpecError, match="leave out first_last_bits"):
        QuantizeRequest(policy="paper", first_last_bits=4).bit_policy()
    with pytest.raises(SpecError, match="belongs to a method"):
        BitSettings(policy="paper").bit_policy()
    path = tmp_path / "recipe.yaml"
    path.write_text(TrainRequest(method="proxquant", weight_bits=2, policy="paper").to_yaml())
    assert TrainRequest.from_yaml(path).bit_policy() == policy


def test_the_papers_recipe_is_that_of_the_method_that_is_chosen_and_single_values_override_it(tmp_path: Path) -> None:
    of_pact = lowbit.get_method("pact").method().default_recipe()  # type: ignore[misc,attr-defined]
    asked = TrainRequest().changed({"recipe": "paper", "method": "pact", "epochs": 3, "optimizer": {"learning_rate": 0.5}})
    assert asked.recipe == dataclasses.replace(of_pact, epochs=3, optimizer=dataclasses.replace(of_pact.optimizer, learning_rate=0.5))
    assert of_pact.optimizer.schedule == asked.recipe.optimizer.schedule == "step"
    path = tmp_path / "recipe.yaml"
    path.write_text("method: lsq\nrecipe: paper\noptimizer: {momentum: 0.5, learning_rate: 1}\n")
    changed = TrainRequest.from_yaml(path, {"method": "pact", "optimizer": {"learning_rate": 0.2}, "out": "elsewhere"})
    assert changed.recipe == dataclasses.replace(of_pact, optimizer=dataclasses.replace(of_pact.optimizer, momentum=0.5, learning_rate=0.2))
    assert (changed.method, changed.out) == ("pact", "elsewhere")
    with pytest.raises(SpecError, match="recipe must be 'paper' or a Recipe, got 'papper'"):
        TrainRequest().changed({"recipe": "papper"})


@pytest.mark.parametrize("bits", ["0", "9", "-1", "four", "2.5"])
def test_bits_out_of_range_name_the_setting(bits: str) -> None:
    with pytest.raises(SpecError, match=r"^weight_bits: bit_width must be"):
        QuantizeRequest(weight_bits=bits)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"weight_obsever": "mse"}, UnknownNameError, "Did you mean 'weight_observer'"),
        ({"iterations": 10}, UnknownNameError, r"Methods that have it: .*adaround"),
        ({"fold_batch_norm": "perhaps"}, SpecError, "fold_batch_norm must be bool, got 'perhaps'"),
    ],
)
def test_hyper_parameters_are_checked_before_anything_is_loaded(options: dict[str, object], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        open_quantization(QuantizeRequest(method="round_to_nearest", options=options, model="no_such_network"))
    with pytest.raises(UnknownNameError, match="Did you mean 'round_to_nearest'"):
        open_quantization(QuantizeRequest(method="round_to_nearst", model="no_such_network"))


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.command)
def test_every_setting_says_what_it_is_for_and_which_group_it_belongs_to(kind: type[Request]) -> None:
    assert [name for name, setting in settings_of(kind).items() if not setting.meaning] == []
    assert sorted(name for name, _ in fields_of(kind)) == sorted(field.name for field in dataclasses.fields(kind))
    assert all((group.__doc__ or "").partition("\n")[0].endswith(".") for _, group in fields_of(kind))


def test_numbers_are_held_to_their_ranges() -> None:
    with pytest.raises(SpecError, match="quantize: batch_size must be 1 or more, got 0"):
        QuantizeRequest(batch_size=0)
    with pytest.raises(SpecError, match=r"train: workers must be 0 or more, got -1"):
        TrainRequest(workers=-1)


def test_a_file_gives_the_request_back_and_holds_only_what_decides_the_result(tmp_path: Path) -> None:
    request = QuantizeRequest(method="brecq", options={"iterations": 5}, weight_bits=4, keep=("fc",), preprocess={"size": 32}, seed=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(dataclasses.replace(request, out="elsewhere", device="cpu", threads=2).to_yaml())
    assert QuantizeRequest.from_yaml(path) == request
    path.write_text("out: elsewhere")
    with pytest.raises(UnknownNameError, match=r"unknown entry of .*recipe.yaml, line 1 'out'"):
        QuantizeRequest.from_yaml(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("epochs", r"unknown option of lsq 'epochs'\. It belongs to the recipe: recipe=lowbit\.Recipe\(epochs=\.\.\.\)"),
        ("epoch", r"Did you mean 'epochs'\? It belongs to the recipe: recipe="),
        ("lr", r"recipe=lowbit\.Recipe\(optimizer=lowbit\.OptimizerSpec\(learning_rate=\.\.\.\)\)"),
        ("momentun", r"Did you mean 'momentum'\? It belongs to the recipe's optimizer"),
        ("label_smoothing", r"task=lowbit\.Classification\(label_smoothing=\.\.\.\)"),
        ("weight_bit", r"Did you mean 'weight_bits'\? It is an argument of lowbit\.train"),
        ("quantizer_learning_rat", r"Did you mean 'quantizer_learning_rate'\?"),
    ],
)
def test_an_unknown_option_of_train_names_the_nearest_and_where_it_belongs(name: str, told: str) -> None:
    with pytest.raises(UnknownNameError, match=told):
        lowbit.train(LAYER, [], **{name: 1})


def test_an_unknown_option_of_quantize_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'calibration'\? It is an argument of lowbit\.quantize"):
        lowbit.quantize(LAYER, calibratoin=[])
    with pytest.raises(UnknownNameError, match="Did you mean 'weight_observer'"):
        lowbit.quantize(LAYER, method="round_to_nearest", weight_obsever="mse")


@pytest.mark.parametrize(("function", "request_kind"), [(lowbit.quantize, QuantizeRequest), (lowbit.train, TrainRequest)])
def test_functions_and_requests_have_the_same_defaults(function: object, request_kind: type[Request]) -> None:
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]
    settings = settings_of(request_kind)
    shared = set(defaults) & set(settings) - {
        "model",
        "options",
        "weight_bits",
        "activation_bits",
        "out",
        "device",
        "recipe",
        "calibration",
    }
    assert shared >= {"method", "policy"}
    assert request_kind is QuantizeRequest or shared >= {"surrogate", "augment", "select", "precision", "workers", "save_every", "strategy"}
    assert {name: defaults[name] for name in shared} == {name: settings[name].default for name in shared}

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from lowbit.errors import SpecError, UnknownNameError
from lowbit.options import Above, AtLeast, CheckedSettings, Interval, build_method, convert_option, settings_of
from lowbit.registry import MethodInfo, get_method


@pytest.mark.parametrize(
    ("hint", "given", "expected"),
    [
        (int, 3, 3),
        (int, "3", 3),
        (int, 3.0, 3),
        (int, "-2", -2),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (float, "inf", float("inf")),
        (bool, True, True),
        (bool, "yes", True),
        (bool, "Off", False),
        (bool, "0", False),
        (str, "per_tensor", "per_tensor"),
        (float | None, None, None),
        (float | None, "None", None),
        (float | None, "0.5", 0.5),
        (int | str, "auto", "auto"),
        (int | str, "4", 4),
        (Literal["mse", "max"], "max", "max"),
        (Literal["none", "all"], "none", "none"),
        (tuple[float, ...], "0.5,0.75", (0.5, 0.75)),
        (tuple[float, ...], "(0.5, 0.75)", (0.5, 0.75)),
        (tuple[int, ...], [1, "2"], (1, 2)),
        (tuple[int, ...], "", ()),
    ],
)
def test_values_become_what_the_field_declares(hint: object, given: object, expected: object) -> None:
    found = convert_option("lsq", "option", given, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (int, "3.5", "must be int, got '3.5'"),
        (int, 3.5, "must be int, got 3.5"),
        (int, "many", "must be int"),
        (int, "inf", "must be int"),
        (int, "nan", "must be int"),
        (int, True, "must be int, got True"),
        (float, True, "must be float, got True"),
        (float, "fast", "must be float"),
        (float, None, "must not be None"),
        (float, "none", "must not be None"),
        (bool, "maybe", "must be bool"),
        (bool, 1, "must be bool"),
        (str, 3, "must be str"),
        (Literal["mse", "max"], "min", "must be one of 'mse', 'max', got 'min'"),
        (tuple[float, ...], "0.5,x", "must be float, got 'x'"),
        (tuple[float, ...], 0.5, "must be tuple"),
        (float | int, "x", "must be float or int"),
    ],
)
def test_values_that_do_not_fit_are_refused(hint: object, given: object, message: str) -> None:
    with pytest.raises(SpecError, match=f"lsq: option option {message}"):
        convert_option("lsq", "option", given, hint)


@dataclass
class Example:
    rounds: int = 2
    levels: tuple[float, ...] = (1.0,)
    start: Literal["mse", "max"] = "mse"
    extra: float | None = None


def info_of(cls: type) -> MethodInfo:
    return MethodInfo("example", "", "", "other", (), "training", range(1, 9), None, (), "unverified", "", method=cls)


def test_a_method_is_built_from_text_and_keeps_its_defaults() -> None:
    built = build_method(info_of(Example), {"rounds": "7", "levels": "1,2", "start": "max", "extra": "0.5"})
    assert built == Example(7, (1.0, 2.0), "max", 0.5)
    assert build_method(info_of(Example), {}) == Example()


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"round.*Did you mean 'rounds'"):
        build_method(info_of(Example), {"round": 1})


def test_an_option_of_other_methods_says_which_have_it() -> None:
    with pytest.raises(UnknownNameError, match=r"Methods that have it:.* daq"):
        build_method(get_method("lsq"), {"weight_sigma": 1})


def test_what_the_method_itself_refuses_reaches_the_user() -> None:
    with pytest.raises(SpecError, match="daq: gamma must be above 0"):
        build_method(get_method("daq"), {"gamma": "0"})


@dataclass
class Ranged(CheckedSettings):
    """Settings with ranges.

    Attributes:
        share: Share of the epochs.
        rates: Learning rates.
    """

    share: Annotated[float, Interval(0, 1, closed="left")] = 0.5
    rates: Annotated[tuple[float, ...], Above(0)] = (0.1,)
    epochs: Annotated[int | None, AtLeast(1)] = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "Ranged: share must be from 0 to below 1, got 1.0"),
        ({"share": float("nan")}, "share must be from 0 to below 1, got nan"),
        ({"rates": (0.1, 0.0)}, r"rates must be above 0, got \(0.1, 0.0\)"),
        ({"rates": (math.inf,)}, "rates must be above 0"),
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
    ],
)
def test_numbers_outside_their_declared_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Ranged(**changes)


def test_numbers_at_closed_ends_and_none_are_taken() -> None:
    assert Ranged(share=0.0, epochs=1).epochs == 1
    assert Ranged().epochs is None


def test_a_setting_is_known_with_its_type_default_range_and_meaning() -> None:
    found = settings_of(Ranged)
    assert list(found) == ["share", "rates", "epochs"]
    assert (found["share"].type, found["share"].default, found["share"].meaning) == (float, 0.5, "Share of the epochs.")
    assert found["epochs"].interval == AtLeast(1)


@pytest.mark.parametrize(
    ("interval", "words", "inside", "outside"),
    [
        (Interval(0, 1), "from 0 to 1", [0, 0.5, 1], [-0.1, 1.1]),
        (Interval(0, 1, closed="right"), "above 0 to 1", [0.1, 1], [0]),
        (AtLeast(2), "2 or more", [2, 9], [1.9, math.inf]),
        (Above(0), "above 0", [1e-9], [0, math.inf, math.nan]),
    ],
)
def test_intervals(interval: Interval, words: str, inside: list[float], outside: list[float]) -> None:
    assert str(interval) == words
    assert all(map(interval.contains, inside))
    assert not any(map(interval.contains, outside))

"""Everything that has state comes back as it was; everything else is compared."""

from __future__ import annotations

import enum
import functools
import json
import logging
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lowbit.errors import FileFormatError, StateError
from lowbit.qat import OptimizerSpec
from lowbit.qat.engine.constants import Constants, digest
from lowbit.qat.engine.snapshot import Restoration, Snapshot
from lowbit.spec import Granularity

Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Plan:
    layers: tuple[str, ...]
    scale: torch.Tensor
    level: Level = Level.LOW


@dataclass
class Notes:
    seen: list[int] = field(default_factory=list)
    plan: Plan | None = None


class Config:
    def __init__(self, **entries: object) -> None:
        vars(self).update(entries)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def carried(saved: object, live: object) -> object:
    """``saved`` through a file, put into ``live``."""
    snapshot = Snapshot(constants=Constants())
    tree = json.loads(json.dumps(snapshot.take({"value": saved}, "x")))
    holder = {"value": live}
    Restoration(snapshot.owned()).put(tree, holder, "x")
    return holder["value"]


@pytest.mark.parametrize(
    "value",
    [
        {(1, "a"): 2.5, None: 3, 1.5: "x", True: False},
        {(1, 2), (3, 4)},
        torch.Size([2, 3]), torch.float16, Color.BLUE, Level.HIGH, OptimizerSpec("adam", 0.5, milestones=(0.1, 0.2)),
        Granularity.channel(1), [float("nan"), float("inf"), -0.0], OrderedDict(a=1), ((), [], {}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("live", [None, "other"])
def test_values_come_back_with_their_type_whatever_lies_there(value: object, live: object) -> None:
    found = carried(value, live)
    assert repr(found) == repr(value if not isinstance(value, OrderedDict) else dict(value))
    assert type(found) is (dict if isinstance(value, OrderedDict) else type(value))


def test_frozen_dataclasses_come_back_also_where_the_new_run_has_another_one_or_none() -> None:
    plan = Plan(("a", "b"), torch.tensor([1.0, 2.0]), Level.HIGH)
    for live in (None, Plan((), torch.zeros(3)), Notes()):
        found = carried(plan, live)
        assert isinstance(found, Plan) and found is not live
        assert (found.layers, found.scale.tolist(), found.level) == (("a", "b"), [1, 2], Level.HIGH)
    same = Granularity.channel(1)
    assert carried(Granularity.channel(1), same) is same


def test_dataclasses_that_change_are_changed_in_place_or_made() -> None:
    notes, live = Notes([1, 2], Plan(("a",), torch.ones(1))), Notes([7])
    held = live.seen
    found = carried(notes, live)
    assert found is live and live.seen is held == [1, 2] and live.plan is not None and live.plan.layers == ("a",)
    made = carried(notes, None)
    assert isinstance(made, Notes) and made.seen == [1, 2]


def test_pieces_of_the_program_belong_to_the_new_object() -> None:
    for value in (len, carried, Config, torch.device("cpu"), logging.getLogger("x"), weakref.ref(Config)):
        assert carried(value, "new") == "new"
    module = nn.Linear(1, 1)
    handle = module.register_forward_hook(lambda *_: None)
    assert carried(handle, "new") == "new"


def test_what_getstate_leaves_out_is_no_state() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.cache, self.lock = 1, torch.zeros(2), deque([1])

        def __getstate__(self) -> dict[str, object]:
            return {**{key: value for key, value in vars(self).items() if key != "lock"}, "cache": None}

    old, new = Net(), Net()
    old.kept, old.cache = 5, torch.ones(2)
    snapshot = Snapshot(constants=Constants())
    tree = snapshot.take(old, "model")
    assert not snapshot.tensors
    Restoration({}).put(tree, new, "model")
    assert new.kept == 5 and new.cache.tolist() == [0, 0] and new.lock == deque([1])


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (Config(a=1, b=[torch.ones(2)]), Config(a=1, b=[torch.zeros(2)])),
        (Config(inner=Config(x="a")), Config(inner=Config(x="b"))),
        (functools.partial(carried, 1, live=2), functools.partial(carried, 1, live=3)),
        (deque([1, 2]), deque([1, 3])),
        (Slotted(1), Slotted(2)),
        (Point(1, 2), Point(1, 3)),
        ({Config: 1}, {Config: 2}),
        (b"ab", b"ac"),
    ],
)
def test_other_objects_have_to_be_the_same_again(value: object, other: object) -> None:
    assert carried(value, value) is value
    with pytest.raises(FileFormatError, match=r"x\.value \(\w+\) is not what it was in the saved run"):
        carried(value, other)
    with pytest.raises(FileFormatError, match=r"x\.value \(NoneType\) is not what it was"):
        carried(value, None)


def test_equal_contents_have_one_digest_and_rings_end() -> None:
    ring, other = Config(a=1), Config(a=1)
    ring.me, other.me = ring, other  # type: ignore[attr-defined]
    assert digest(ring) == digest(other) != digest(Config(a=1))
    assert digest(Config(a={"x", "y"})) == digest(Config(a={"y", "x"}))
    assert digest(Config(a=1)) != digest(Config(a=True))


def test_a_constant_that_changes_names_its_place_and_what_to_do() -> None:
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].history = deque([1])  # type: ignore[assignment]
    constants = Constants()
    Snapshot(constants=constants).take(net, "model")
    Snapshot(constants=constants).take(net, "model")
    net[0].history.append(2)  # type: ignore[operator, union-attr]
    with pytest.raises(StateError, match=r"'0\.history' of the network is a collections\.deque.*has changed.*Keep it in a buffer"):
        Snapshot(constants=constants).take(net, "model")
    assert Snapshot().take(net[0].history, "x") == {"left_out": True}  # within one process it stays where it is
    net[0] = nn.Linear(1, 1)
    net[0].history = deque([5])  # type: ignore[assignment]
    Snapshot(constants=constants).take(net, "model")  # another module: whoever put it there does so again


def test_a_constant_may_refer_to_the_network_that_holds_it() -> None:
    def net() -> nn.Module:
        model = nn.Sequential(nn.Linear(1, 1))
        model.helper = Config(model=model, weight=model[0].weight)  # type: ignore[assignment]
        return model

    old, new, constants = net(), net(), Constants()
    Snapshot(constants=constants).take(old, "model")
    with torch.no_grad():
        old[0].weight.add_(1)  # type: ignore[index, operator]
    snapshot = Snapshot(constants=constants)
    tree = snapshot.take(old, "model")
    Restoration(snapshot.owned()).put(tree, new, "model")
    assert torch.equal(new[0].weight, old[0].weight)  # type: ignore[index]
    with pytest.raises(StateError, match=r"the method's field 'helper' .* holds a Linear, so that nobody can tell"):
        Snapshot(constants=Constants()).take({"helper": Config(model=nn.Linear(1, 1))}, "method")

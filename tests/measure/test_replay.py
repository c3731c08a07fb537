"""Runs that are cut short, against the whole network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.measure import replay as replays
from lowbit.measure.replay import Replay
from lowbit.network.insert import weight_sites

COUNTS: Counter[str] = Counter()


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    def forward(self, x: Tensor) -> Tensor:
        COUNTS[self.name] += 1
        return super().forward(x)


def counted(name: str) -> Counted:
    layer = Counted(4, 4)
    layer.name = name
    return layer


class Block(nn.Module):
    """A residual block that works in place."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second, self.relu = counted(f"{name}.first"), counted(f"{name}.second"), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        self.relu(out)  # what it gives is not looked at
        out = self.second(out)
        out += self.shortcut(x)
        return out.relu_()


def predict(model: nn.Module, batch: Tensor) -> object:
    return model(batch)


def batches() -> list[Tensor]:
    return list(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).split(4))


def check(model: nn.Module, data: list[Any], order: list[str]) -> None:
    """Outputs equal those of the whole network for changes of one layer after the other."""
    replay, sites = Replay(model.eval(), data, predict), weight_sites(model)
    for name in order:
        original = sites[name].original
        for factor in (0.5, -2.0):
            changed = nn.Parameter(original.detach() * factor, requires_grad=False)
            setattr(sites[name].layer, sites[name].parameter, changed)
            with torch.no_grad():
                expected = [predict(model, batch) for batch in data]
            assert all(torch.equal(found, wanted) for found, wanted in zip(replay.outputs([name]), expected, strict=True))
            setattr(sites[name].layer, sites[name].parameter, original)
    assert not any("forward" in vars(module) for module in model.modules())


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block("a"), Block("b"), nn.Flatten(), counted("head"))


@pytest.mark.parametrize("order", [["0.first", "0.second", "1.first", "1.second", "3"], ["3", "1.second", "0.first", "1.first", "3"]])
def test_outputs_are_those_of_the_whole_network_in_any_order(order: list[str]) -> None:
    check(residual(), batches(), order)


def test_what_comes_before_a_change_is_computed_once() -> None:
    model = residual()
    replay = Replay(model.eval(), batches()[:1], predict)
    replay.outputs(["1.second"])
    COUNTS.clear()
    for _ in range(3):
        replay.outputs(["1.second"])
    assert COUNTS == {"b.second": 3, "head": 3}
    COUNTS.clear()
    replay.outputs(["0.second", "1.second"])  # the earlier one decides
    assert COUNTS == {"a.first": 1, "a.second": 1, "b.first": 1, "b.second": 1, "head": 1}


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MOST_BYTES", 0)
    model = residual()
    check(model, batches(), ["0.first", "3"])
    replay = Replay(model, batches()[:1], predict)
    replay.outputs(["3"])
    COUNTS.clear()
    replay.outputs(["3"])
    assert COUNTS["a.first"] == 1


def test_a_weight_that_is_used_before_its_layer_is_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(functional.linear(x, self.outer.weight.T)))

    torch.manual_seed(0)
    check(Tied(), batches(), ["outer", "inner"])


def test_a_module_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.shared(self.first(self.shared(x)).relu()))

    torch.manual_seed(0)
    check(Twice(), batches(), ["first", "shared", "last"])


def test_a_network_that_remembers_a_batch_runs_whole() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 4)
            self.encoder[0].register_forward_hook(self.remember)

        def remember(self, _module: nn.Module, _args: object, output: Tensor) -> None:
            self.seen = output.clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x)) + self.seen

    torch.manual_seed(0)
    check(Remembering(), [*batches()[:1], torch.ones(4, 4)], ["decoder", "encoder.2"])


def test_a_network_that_draws_random_numbers_runs_whole() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = nn.Sequential(Noisy(), nn.Linear(4, 4)).eval()
    replay = Replay(model, batches()[:1], predict)
    first, second = (replay.outputs(["1"])[0] for _ in range(2))
    assert not torch.equal(first, second)  # type: ignore[arg-type]


def test_recurrent_layers_and_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    check(nn.Sequential(layer, nn.Linear(4, 4)), [torch.randn(2, 3, 4), torch.randn(3, 3, 4)], ["0.linear1", "0.linear2", "1"])

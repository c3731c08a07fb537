"""One network trained for several widths: what is asked for, how it switches, what a step trains, and what a kill leaves."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tests.qat.adaptive import Joint, Mixed, chain
from tests.qat.training import RECIPE, assert_same, data, killed, train
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.qat import Classification, Recipe, TrainRun
from lowbit.spec import LayerBits

X, Y = data().tensors[0][:16], data().tensors[1][:16]


def network() -> nn.Module:
    torch.manual_seed(0)
    return chain()


def prepared(bits: object = (8, 4, 2), method: type[Joint] = Joint) -> nn.Module:
    return lowbit.prepare(network(), method=method, bits=bits, sample=X)  # type: ignore[arg-type]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def run_of(model: nn.Module) -> TrainRun:
    return TrainRun(model.train(), model.lowbit_method, Classification(), Recipe(1), 4)  # type: ignore[arg-type]


def test_switching_there_and_back_changes_no_bit() -> None:
    model = prepared()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_()  # type: ignore[union-attr]
    first, bits = outputs(model), lowbit.get_bits(model)
    assert (bits["conv2"], bits["conv1"]) == (LayerBits(8, 8), LayerBits(8, 8))
    found = {}
    for width in (4, 2, 8, 2, 4, 8):
        lowbit.set_bits(model, width)
        assert lowbit.get_bits(model)["conv2"] == LayerBits(width, width)
        assert lowbit.get_bits(model)["fc"] == LayerBits(8, 8)  # the last layer keeps its width
        assert torch.equal(found.setdefault(width, outputs(model)), outputs(model))
    assert torch.equal(outputs(model), first) and not torch.equal(found[4], found[2])
    lowbit.set_bits(model, bits)
    assert torch.equal(outputs(model), first)


def test_switches_may_be_in_float_and_may_differ_for_weights_and_inputs() -> None:
    model = prepared("32/32,4/8,1/8")
    assert lowbit.get_bits(model)["conv2"] == LayerBits(None, None)
    lowbit.set_bits(model, 4)
    assert lowbit.get_bits(model)["conv2"] == LayerBits(4, 8) and model.norm2.key == "4/8"  # type: ignore[union-attr]
    lowbit.set_bits(model, LayerBits(1, 8))
    assert lowbit.get_bits(model)["conv3"] == LayerBits(1, 8)
    lowbit.set_bits(model, None)
    assert model.norm2.key == "float/float"  # type: ignore[union-attr]


def test_copies_and_state_dicts_hold_every_width() -> None:
    model, other = prepared(), prepared()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(model.state_dict())
    for width in (8, 4, 2):
        for one in (model, other, copied := copy.deepcopy(model)):
            lowbit.set_bits(one, width)
        assert torch.equal(outputs(model), outputs(other)) and torch.equal(outputs(model), outputs(copied))


@pytest.mark.parametrize("width", [3, None, LayerBits(4, 2), "float"])
def test_a_width_that_was_not_trained_is_refused_and_changes_nothing(width: object) -> None:
    model = prepared()
    before = outputs(model)
    with pytest.raises(SpecError, match="was trained for the widths 8/8, 4/4, 2/2, got"):
        lowbit.set_bits(model, width)  # type: ignore[arg-type]
    assert torch.equal(outputs(model), before)


def test_layers_of_a_network_that_switches_as_a_whole_cannot_differ() -> None:
    model = prepared()
    before = outputs(model)
    with pytest.raises(SpecError, match=r"switches each network between its widths\. Give one of 8/8, 4/4, 2/2"):
        lowbit.set_bits(model, {"conv2": 2})
    with pytest.raises(SpecError, match="got 5"):
        lowbit.set_bits(model, {"conv*": 5})
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("2,4", "4/4 is above 2/2, which stands before it"), ([4, 4], "4/4 stands there twice"), ([], "there is no width"),
        ("4/4/4", "expected a width such as 4"), ([9], "from 1 to 8"), ("4/8,8/4", "8/4 is above 4/8"),
    ],
)  # fmt: skip
def test_a_list_of_widths_that_makes_no_sense_says_why(bits: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prepared(bits)


def test_methods_of_one_width_and_networks_without_norms_say_so() -> None:
    with pytest.raises(SpecError, match="'lsq' trains a network for one width: give weight_bits and activation_bits"):
        lowbit.prepare(network(), method="lsq", bits=[8, 4], sample=X)
    with pytest.raises(LayerError, match="Linear has no batch norm"):
        lowbit.prepare(nn.Linear(4, 2), method=Joint, bits=[8, 4], sample=torch.rand(4, 4))


def test_bits_cannot_be_set_within_a_compiled_graph() -> None:
    model = prepared()

    def switched(x: Tensor) -> Tensor:
        lowbit.set_bits(model, 4)
        return model(x)

    torch.compiler.reset()
    with pytest.raises(Exception, match="set_bits"):
        torch.compile(switched, backend="eager", fullgraph=True)(X)


def test_a_step_adds_the_gradients_of_every_switch() -> None:
    model = prepared()
    alone: dict[str, Tensor] = {}
    for width in (8, 4, 2):
        single = copy.deepcopy(model).train()
        lowbit.set_bits(single, width)
        nn.functional.cross_entropy(single(X), Y).backward()
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                alone[name] = alone.get(name, torch.zeros_like(parameter)) + parameter.grad
    run = run_of(model)
    run.start_phase()
    run.before_step()
    for loss in run.losses((X, Y)):
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == alone.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert model.norm2.key == "8/8"  # type: ignore[union-attr]


def test_only_the_norm_of_a_switch_sees_its_batches() -> None:
    model = prepared().train()
    lowbit.set_bits(model, 4)
    model(X)
    norm = model.norm2
    assert isinstance(norm, SwitchableNorm)
    assert [int(norm.norms[key].num_batches_tracked) for key in norm.norms] == [0, 1, 0]  # type: ignore[arg-type]


def test_every_width_is_measured_and_their_mean_selects(tmp_path: Path) -> None:
    model = train(network(), method=Joint, bits="8,2", test_data=data(50, 5), out=tmp_path)
    metrics = json.loads((tmp_path / "train.json").read_text())["curve"][-1]["metrics"]
    assert set(metrics) == {"accuracy", "accuracy 8/8", "accuracy 2/2"}
    assert metrics["accuracy"] == pytest.approx((metrics["accuracy 8/8"] + metrics["accuracy 2/2"]) / 2)
    for width in (8, 2):
        lowbit.set_bits(model, width)
        assert lowbit.evaluate(model, data(50, 5))["accuracy"] == metrics[f"accuracy {width}/{width}"]


@pytest.mark.parametrize("step", [3, 8])
def test_a_network_of_several_widths_goes_on_to_the_same_bits_after_a_kill(step: int, tmp_path: Path) -> None:
    asked = {"model": network(), "method": Joint, "bits": "32/32,4/4,2/2", "recipe": RECIPE, "save_every": "1"}
    whole = train(**asked)
    killed(step, tmp_path, **asked)
    assert_same(train(out=tmp_path, **asked), whole)


def test_norms_follow_the_widths_of_the_layers_around_them() -> None:
    model = prepared(method=Mixed)
    keys = [module.key for module in model.modules() if isinstance(module, SwitchableNorm)]
    assert keys == ["float>8", "8>8", "8>float"]
    uniform = outputs(model)
    lowbit.set_bits(model, {"*": 4, "conv3": 2})
    assert [module.key for module in model.modules() if isinstance(module, SwitchableNorm)] == ["float>4", "4>2", "2>float"]
    assert [bits.weight for bits in lowbit.get_bits(model).values()] == [8, 4, 2, 8]  # the first and the last layer have one width
    mixed = outputs(model)
    lowbit.set_bits(model, 8)
    assert torch.equal(outputs(model), uniform)
    lowbit.set_bits(model, {"conv2": 4, "conv3": 2})
    assert torch.equal(outputs(model), mixed)
    with pytest.raises(SpecError, match="layer 'fc': the network was trained with 8/8 there alone"):
        lowbit.set_bits(model, {"fc": 4})
    with pytest.raises(SpecError, match="was trained for the widths 8/8, 4/4, 2/2, got 3"):
        lowbit.set_bits(model, {"conv2": 3})
    assert torch.equal(outputs(model), mixed)

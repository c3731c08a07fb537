from __future__ import annotations

import pytest
import torch
from tests.networks import LoopNet, ReusedNet, SharedWeightNet
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.network import insert
from lowbit.network.job import check_method_bits
from lowbit.qat import QatJob, Slot
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.registry import get_method
from lowbit.spec import BitPolicy

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *block, nn.Linear(180, 3))


def job_of(model: nn.Module | None = None, policy: BitPolicy | None = None, sample: object = X) -> QatJob:
    return QatJob(model or network(), policy or BitPolicy.uniform(3, 4), Inputs.of(sample))


def quantizer_of(slot: Slot) -> Quantizer:
    return LearnedScaleQuantizer(slot.bit_width, signed=slot.is_signed)


def initialize(layer: nn.Module, x: Tensor) -> None:
    for quantizer, values in ((insert.weight_quantizer(layer), insert.float_weight(layer)), (insert.input_quantizer(layer), x)):
        if quantizer is not None:
            quantizer.initialize(values.detach())


# Where quantizers go


def test_factories_see_each_place_and_nothing_of_the_first_and_last_layer() -> None:
    job, weights, activations = job_of(), [], []
    job.insert(lambda slot: weights.append(slot) or quantizer_of(slot), lambda slot: activations.append(slot) or quantizer_of(slot))  # type: ignore[func-returns-value]
    assert [(s.name, s.bit_width, s.is_signed, s.position, s.channel_axis) for s in weights] == [
        ("3", 3, True, "inner", 0), ("5", 3, True, "inner", 1),
    ]  # fmt: skip
    assert [(s.name, s.bit_width, s.is_signed) for s in activations] == [("3", 4, False), ("5", 4, False)]
    assert all(s.layer is job.model.get_submodule(s.name) for s in weights + activations)
    assert [name for name, _ in job.inserted] == ["0", "3", "5", "7"] * 2


def test_the_first_and_last_layer_learn_scales_of_their_own() -> None:
    job = job_of()
    job.insert(quantizer_of, quantizer_of)
    for name, is_signed in (("0", True), ("7", True)):
        layer = job.model.get_submodule(name)
        weights, activations = insert.weight_quantizer(layer), insert.input_quantizer(layer)
        assert isinstance(weights, LearnedScaleQuantizer) and isinstance(activations, LearnedScaleQuantizer)
        assert (weights.bit_width, activations.bit_width) == (8, 8)
        assert (weights.granularity.kind, weights.qmin) == ("per_channel", -128)
        assert activations.learn_offset == is_signed and activations.qmin == 0


def test_without_an_exception_all_layers_are_the_methods() -> None:
    seen: list[str] = []
    job = job_of(policy=BitPolicy.uniform(3, 4, first_last=None))
    job.insert(lambda slot: seen.append(slot.name) or quantizer_of(slot), quantizer_of)  # type: ignore[func-returns-value]
    assert seen == ["0", "3", "5", "7"]


def test_signs_are_those_of_the_float_network_in_evaluation_mode() -> None:
    model, signs = network(), {}
    model[2] = nn.LeakyReLU()
    job = job_of(model.train(), policy=BitPolicy.uniform(3, 4, first_last=None))
    job.insert(quantizer_of, lambda slot: signs.__setitem__(slot.name, slot.is_signed) or quantizer_of(slot))  # type: ignore[func-returns-value]
    assert signs == {"0": True, "3": True, "5": False, "7": True}
    assert model.training and torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_layer_in_float_gets_nothing() -> None:
    job = job_of(policy=BitPolicy.uniform(3, 4).keep_float("3"))
    job.insert(quantizer_of, quantizer_of)
    assert insert.weight_quantizer(job.model[3]) is None and insert.input_quantizer(job.model[3]) is None  # type: ignore[index]
    assert [name for name, _ in job.inserted] == ["0", "5", "7"] * 2


def test_inputs_alone_can_be_quantized_but_not_nothing() -> None:
    job = job_of(policy=BitPolicy.uniform(None, 4))
    job.insert(quantizer_of, quantizer_of)
    job.initialize(initialize)
    assert not insert.quantized_layers(job.model) and len(insert.activation_quantizers(job.model)) == 4
    with pytest.raises(LayerError, match="leaves every layer of Sequential in float"):
        job_of(policy=BitPolicy.uniform(None, None))


def test_an_error_of_a_factory_names_the_layer() -> None:
    def refuse(slot: Slot) -> Quantizer:
        raise SpecError("no such grid")

    with pytest.raises(LayerError, match=r"layer '3' \(Conv2d\): no such grid"):
        job_of().insert(refuse, quantizer_of)


def test_bits_of_inputs_are_checked_where_weights_stay_in_float_too() -> None:
    policy = BitPolicy.uniform(3, 4).with_rule(match="3", weight="float", activation=3)
    with pytest.raises(SpecError, match="layer '3': xnor_net supports 1 to 1 activation bits, got 3"):
        check_method_bits(
            get_method("xnor_net"),
            policy.with_rule(match="5", weight=1, activation=1),
            job_of(policy=policy.with_rule(match="5", weight=1, activation=1)),
        )


# Initialization


def test_each_layer_is_set_up_on_what_the_quantized_layers_before_it_give() -> None:
    job, seen = job_of(), {}

    def note(layer: nn.Module, x: Tensor) -> None:
        initialize(layer, x)
        seen[next(name for name, module in job.model.named_modules() if module is layer)] = x.clone()

    job.insert(quantizer_of, quantizer_of)
    job.initialize(note)
    assert list(seen) == ["0", "3", "5", "7"]
    assert torch.equal(seen["0"], X)
    with torch.no_grad():
        model = job.model.train()
        assert torch.equal(seen["3"], model[2](model[1](model[0](X))))  # type: ignore[index]
        assert torch.equal(seen["5"], model[4](model[3](seen["3"])))  # type: ignore[index]


def test_training_flags_and_running_statistics_are_as_before() -> None:
    model = network().eval()
    model[1].running_mean.fill_(0.5)
    model[4].train()
    job = job_of(model)
    job.insert(quantizer_of, quantizer_of)
    job.initialize(initialize)
    assert [module.training for module in model] == [i == 4 for i in range(8)]
    assert model[1].running_mean.tolist() == [0.5] * 4 and model[1].num_batches_tracked.item() == 0
    assert not any(q.training for q in insert.activation_quantizers(model).values())


def test_a_layer_that_runs_often_is_set_up_once_on_its_first_input() -> None:
    for model, sample in ((ReusedNet(), X), (LoopNet(), torch.randn(5, 6))):
        job, calls = job_of(model, sample=sample), []
        job.insert(quantizer_of, quantizer_of)
        job.initialize(lambda layer, x, calls=calls: (calls.append(layer), initialize(layer, x)))  # type: ignore[misc]
        assert len(calls) == len(set(map(id, calls))) == 3


def test_a_layer_that_never_runs_is_set_up_from_its_weight() -> None:
    model = network()
    model.spare = nn.Linear(3, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:8])(x)  # type: ignore[method-assign]
    job = job_of(model)
    job.insert(quantizer_of, quantizer_of)
    job.initialize(initialize)
    quantizer = insert.weight_quantizer(model.spare)
    assert isinstance(quantizer, LearnedScaleQuantizer) and quantizer.is_initialized
    assert insert.input_quantizer(model.spare) is None


def test_layers_that_share_a_weight_have_a_quantizer_each() -> None:
    model = SharedWeightNet()
    job = job_of(model, BitPolicy.uniform(3, 4, first_last=None), torch.randn(5, 6))
    job.insert(quantizer_of, quantizer_of)
    job.initialize(initialize)
    assert insert.float_weight(model.encode) is insert.float_weight(model.decode)
    assert insert.weight_quantizer(model.encode) is not insert.weight_quantizer(model.decode)
    assert torch.equal(model.encode.weight, model.decode.weight)


def test_an_error_of_a_set_up_names_the_layer() -> None:
    def refuse(layer: nn.Module, x: Tensor) -> None:
        raise SpecError("too few values")

    job = job_of()
    job.insert(quantizer_of, quantizer_of)
    with pytest.raises(LayerError, match=r"layer '0' \(Conv2d\): too few values"):
        job.initialize(refuse)


class ByKeyword(nn.Module):
    """Passes the input of its second layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(input=self.a(x).relu()))


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_an_input_may_be_passed_by_keyword(activation_bits: int | None) -> None:
    job, seen = job_of(ByKeyword(), BitPolicy.uniform(3, activation_bits), torch.randn(5, 4)), []
    job.insert(quantizer_of, quantizer_of)
    job.initialize(lambda layer, x: (seen.append(x.shape), initialize(layer, x)))  # type: ignore[misc]
    assert seen == [(5, 4)] * 3


def test_a_sample_that_norms_cannot_take_is_refused_with_advice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    job = job_of(model, sample=X[:1])
    job.insert(quantizer_of, quantizer_of)
    with pytest.raises(CalibrationError, match=r"\(1, 3, 8, 8\).*sample of several inputs"):
        job.initialize(initialize)


# The table


def test_the_table_says_what_each_layer_got() -> None:
    job = job_of(policy=BitPolicy.uniform(3, 4).with_rule(match="3", weight="float"))
    job.insert(quantizer_of, quantizer_of)
    assert [(row.name, row.weight_bits, row.activation_bits, row.status) for row in job.finish()] == [
        ("0", 8, 8, "done"), ("3", None, 4, "skipped"), ("5", 3, 4, "done"), ("7", 8, 8, "done"),
    ]  # fmt: skip


def test_bits_other_than_asked_for_are_an_error() -> None:
    job = job_of()
    job.insert(lambda slot: LearnedScaleQuantizer(2, signed=True), quantizer_of)
    with pytest.raises(LayerError, match="layer '3': asked for 3 weight bits, got 2"):
        job.finish()

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import BranchNet, DictOutputNet, FunctionalNet, LoopNet, TwoInputNet
from tests.qat.recording import BATCHES, network
from torch import Tensor, nn

import lowbit
from lowbit.errors import CalibrationError, LayerError, SpecError, UnknownNameError
from lowbit.inputs import Inputs
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.network import insert
from lowbit.network.record import record_of
from lowbit.qat.prepare import method_of, prepare, prepared_network
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.registry import list_methods
from lowbit.spec import BitPolicy
from lowbit.surrogates import SoftTanh

X = BATCHES[0][0]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantizers(model: nn.Module) -> list[Quantizer]:
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def test_the_copy_has_quantizers_and_the_network_stays_as_it_was() -> None:
    model = network()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    qat = prepare(model, weight_bits=2, activation_bits=3, sample=X)
    assert not quantizers(model) and model.training == mode and list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [q.bit_width for q in quantizers(qat)] == [8, 8, 2, 3, 8, 8]
    assert torch.equal(insert.float_weight(qat[2]), model[2].weight)  # type: ignore[index]
    assert insert.float_weight(qat[2]) is not model[2].weight  # type: ignore[index]


@pytest.mark.parametrize("training", [True, False])
def test_the_copy_is_in_the_mode_of_the_network(training: bool) -> None:
    qat = prepare(network().train(training), sample=X)
    assert all(module.training == training for module in qat.modules())


def test_options_reach_the_method_and_the_record() -> None:
    qat = prepare(network(), sample=X, weight_granularity="per_tensor", offset="never", quantizer_learning_rate="0.5", seed=5)
    method, record = method_of(qat), record_of(qat)
    assert isinstance(method, Lsq) and (method.offset, method.quantizer_learning_rate) == ("never", 0.5)
    assert record is not None and (record.method, record.seed) == ("lsq", 5)
    assert record.options["weight_granularity"] == "per_tensor" and record.options["quantizer_learning_rate"] == 0.5
    assert insert.weight_quantizer(qat[2]).granularity.kind == "per_tensor"  # type: ignore[index, union-attr]
    assert [(row.name, row.weight_bits, row.activation_bits) for row in record.table] == [("0", 8, 8), ("2", 4, 4), ("4", 8, 8)]


def test_a_policy_overrides_the_bits() -> None:
    policy = BitPolicy.uniform(3, None).with_rule(match="0", weight=5, activation=6)
    qat = prepare(network(), weight_bits=2, activation_bits=2, policy=policy, sample=X)
    found = [(insert.weight_quantizer(layer), insert.input_quantizer(layer)) for layer in (qat[0], qat[2], qat[4])]  # type: ignore[index]
    assert [tuple(None if q is None else q.bit_width for q in pair) for pair in found] == [(5, 6), (3, None), (8, None)]


@pytest.mark.parametrize("nothing", [None, 32])
def test_weights_or_inputs_can_stay_in_float(nothing: int | None) -> None:
    weights = prepare(network(), weight_bits=2, activation_bits=nothing, sample=X)
    inputs = prepare(network(), weight_bits=nothing, activation_bits=2, sample=X)
    assert len(insert.quantized_layers(weights)) == 3 and not insert.activation_quantizers(weights)
    assert not insert.quantized_layers(inputs) and len(insert.activation_quantizers(inputs)) == 3


def test_the_sample_may_carry_labels() -> None:
    with_labels, without = prepare(network(), sample=BATCHES[0]), prepare(network(), sample=X)
    assert all(torch.equal(a, b) for a, b in zip(with_labels.state_dict().values(), without.state_dict().values(), strict=True))


class Noisy(nn.Module):
    """Its second layer sees random values in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_the_seed_decides_all_and_leaves_global_randomness_alone() -> None:
    model, found = Noisy(), []
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    for seed in (0, 0, 1):
        found.append(prepare(model, sample=X, seed=seed).state_dict()["body.2.input_quantizer.scale"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (BranchNet, IMAGES),
        (LoopNet, torch.randn(4, 6)),
        (FunctionalNet, IMAGES),
        (DictOutputNet, IMAGES),
        (TwoInputNet, (IMAGES, torch.randn(4, 5))),
    ],
)
def test_networks_that_cannot_be_traced_are_prepared_and_train(make: type[nn.Module], sample: object) -> None:
    torch.manual_seed(0)
    model = make()
    args = sample if isinstance(sample, tuple) else (sample,)
    qat = prepare(model, sample=Inputs(args)).train()
    output = qat(*args)
    output = output["logits"] + output["side"].sum() if isinstance(output, dict) else output
    output.square().sum().backward()
    trained = [layer for layer in insert.quantized_layers(qat).values() if insert.float_weight(layer).grad is not None]
    assert trained and all(bool(insert.float_weight(layer).grad.isfinite().all()) for layer in trained)  # type: ignore[union-attr]


# Surrogates


def test_a_surrogate_replaces_that_of_every_quantizer_each_with_one_of_its_own() -> None:
    qat = prepare(network(), sample=X, surrogate="dsq")
    found = [q.surrogate for q in quantizers(qat)]  # type: ignore[attr-defined]
    assert all(isinstance(s, SoftTanh) for s in found) and len(set(map(id, found))) == 6
    record = record_of(qat)
    assert record is not None and record.options["surrogate"] == "dsq"


@pytest.mark.parametrize("method", ["lcq", "lq_nets", "metaquant", "proxquant", "hwgq"])
def test_methods_with_a_gradient_of_their_own_take_no_surrogate(method: str) -> None:
    bits = next(info for info in list_methods(method)).weight_bits
    weight_bits = 2 if 2 in bits else bits[0]
    with pytest.raises(SpecError, match=f"'{method}' define their own gradient and take no surrogate"):
        prepare(network(), method=method, weight_bits=weight_bits, sample=X, surrogate="ewgs")


def test_layers_that_take_no_surrogate_are_noted_where_others_do() -> None:
    qat = prepare(network(), method="qat_baseline", weight_bits=1, activation_bits=4, sample=X, surrogate="ewgs")
    record = record_of(qat)
    assert record is not None
    assert any("1 layers have a quantizer that defines its own gradient and takes no surrogate: 2" in note for note in record.table.notes)


# What is refused


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"method": "lsqq"}, UnknownNameError, "lsq"),
        ({"method": "round_to_nearest"}, SpecError, "'round_to_nearest' is a post_training method.*lsq"),
        ({"surrogate": "stee"}, UnknownNameError, "ste"),
        ({"ofset": "never"}, UnknownNameError, "offset"),
        ({"offset": "sometimes"}, SpecError, "offset must be one of"),
        ({"weight_bits": 9}, SpecError, "1 to 8"),
        ({"weight_bits": 0}, SpecError, "1 to 8"),
        ({"activation_bits": 2.5}, SpecError, "1 to 8"),
        ({"weight_bits": None, "activation_bits": None}, LayerError, "nothing to do"),
        ({"weight_granularity": "per_row"}, LayerError, "layer '2'.*per_row"),
        ({"method": "qil", "weight_bits": 1}, SpecError, "layer '2': qil supports 2 to 8 weight bits, got 1"),
        ({"sample": torch.randn(4, 5)}, CalibrationError, r"fails on inputs of shape \(4, 5\)"),
        ({"policy": BitPolicy.uniform(2, 2).with_rule(match="conv*", weight=3)}, SpecError, "matches no layer"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_done(asked: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(network(), **{"sample": X, **asked})  # type: ignore[arg-type]


def test_networks_without_layers_and_prepared_ones_are_refused() -> None:
    with pytest.raises(LayerError, match="no layer to quantize"):
        prepare(nn.Sequential(nn.ReLU()), sample=X)
    with pytest.raises(LayerError, match="quantized already"):
        prepare(prepare(network(), sample=X), sample=X)
    broken = network()
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(LayerError, match=r"layer '2' .*NaN"):
        prepare(broken, sample=X)


# Finding the method again


def test_the_method_of_a_network_is_known_also_of_its_copies() -> None:
    qat = prepare(network(), method="ewgs", sample=X, delta=0.25)
    assert method_of(qat).delta == method_of(copy.deepcopy(qat)).delta == 0.25  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match=r"Sequential was not made by lowbit.prepare: it is not quantized"):
        method_of(network())
    quantized = lowbit.quantize(network(), method="round_to_nearest", calibration=X)
    with pytest.raises(SpecError, match="it was quantized by round_to_nearest"):
        method_of(quantized)


def test_the_prepared_network_is_found_inside_wrappers() -> None:
    qat = prepare(network(), sample=X)
    assert prepared_network(qat) is prepared_network(nn.Sequential(nn.Identity(), qat)) is qat
    with pytest.raises(SpecError, match="holds 2 prepared networks: 0, 1"):
        prepared_network(nn.Sequential(qat, copy.deepcopy(qat)))
    with pytest.raises(SpecError, match=r"not made by lowbit.prepare"):
        prepared_network(network())


def test_scales_start_from_the_sample() -> None:
    small, large = (prepare(network(), sample=X * factor) for factor in (1, 10))
    scales = [insert.input_quantizer(qat[0]) for qat in (small, large)]  # type: ignore[index]
    assert isinstance(scales[0], LearnedScaleQuantizer) and isinstance(scales[1], LearnedScaleQuantizer)
    torch.testing.assert_close(scales[1].scale, 10 * scales[0].scale)

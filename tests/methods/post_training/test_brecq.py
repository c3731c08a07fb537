"""BRECQ: blocks learned together, its grids, the released settings, Fisher weights and the activation phase."""

from __future__ import annotations

import pytest
import torch
from tests.networks import BranchNet, TinyNet, settled
from torch import Tensor, nn

import lowbit
from lowbit.errors import CalibrationError, GraphError, SpecError
from lowbit.methods.post_training.brecq import Brecq, ReleasedLayer, released_layers
from lowbit.models.mobilenet import mobilenet_v2_small
from lowbit.models.resnet import resnet8
from lowbit.network.insert import activation_quantizers, bake_weights, weight_quantizer
from lowbit.network.record import record_of
from lowbit.network.slot import Slot
from lowbit.post_training.reconstruction import engine as reconstruction
from lowbit.post_training.reconstruction.objective import UnitReport
from lowbit.post_training.reconstruction.phases import LearnScales
from lowbit.post_training.reconstruction.unit_data import UnitData
from lowbit.quantizers.ranges.range_search import shrink_search
from lowbit.spec import BitPolicy
from lowbit.workflows.quantize import quantize

QUICK = {"iterations": 200, "learning_rate": 0.02, "batch_size": 16, "activation_iterations": 0}


def residual(width: int = 8) -> tuple[nn.Module, Tensor]:
    data = torch.randn(40, 3, 8, 8) + torch.randn(40, 3, 1, 1)
    return settled(resnet8(num_classes=6, width=width), data), data


def error(model: nn.Module, reference: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return (model(data) - reference(data)).square().mean().item()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[UnitReport, UnitData]]]:
    """Reports and data of every unit that is learned, by phase."""
    found: dict[str, list[tuple[UnitReport, UnitData]]] = {}
    for phase in (reconstruction.Phase, *reconstruction.Phase.__subclasses__()):
        if "learn" not in vars(phase) or getattr(phase.learn, "__isabstractmethod__", False):
            continue
        learn = phase.learn

        def watched(self, unit, data, run, seed, learn=learn):
            result, report = learn(self, unit, data, run, seed)
            found.setdefault(self.name, []).append((report, data))
            return result, report

        monkeypatch.setattr(phase, "learn", watched)
    return found


def units(seen: dict[str, list[tuple[UnitReport, UnitData]]], phase: str = "weights") -> list[str]:
    return [report.unit for report, _ in seen[phase]]


# Units


def test_blocks_are_learned_together_and_the_stem_is_left_alone(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> None:
    model, data = residual()
    result = quantize(model, method="brecq", weight_bits=3, activation_bits=None, calibration=data, **QUICK)
    assert units(seen) == ["layer1.0", "layer2.0", "layer3.0", "fc"]
    assert all(report.after < report.before for report, _ in seen["weights"][:3])
    assert [weight_quantizer(result.get_submodule(name)).bit_width for name in ("conv", "layer1.0.conv1", "fc")] == [8, 3, 8]


@pytest.mark.parametrize(("options", "bits"), [({"reconstruct_first": True}, {}), ({}, {"first_last": None})])
def test_the_stem_is_learned_when_asked_or_when_it_has_few_bits(
    options: dict[str, object], bits: dict[str, object], seen: dict[str, list[tuple[UnitReport, UnitData]]]
) -> None:
    model, data = residual()
    policy = BitPolicy.uniform(3, None, **bits)
    quantize(model, method="brecq", policy=policy, calibration=data, **{**QUICK, "iterations": 2}, **options)
    assert units(seen)[0] == "conv"


def test_inverted_residuals_are_blocks(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> None:
    data = torch.randn(16, 3, 8, 8)
    model = settled(mobilenet_v2_small(num_classes=4, width=4), data)
    quantize(model, method="brecq", weight_bits=4, activation_bits=None, calibration=data, **{**QUICK, "iterations": 2})
    assert units(seen) == [*(f"blocks.{index}" for index in range(7)), "head", "classifier"]


def test_patterns_choose_the_blocks(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> None:
    model, data = residual()
    options = {"method": "brecq", "weight_bits": 4, "activation_bits": None, "calibration": data, **QUICK, "iterations": 2}
    quantize(model, blocks="layer[12]", **options)
    assert units(seen) == ["layer1", "layer2", "layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0", "fc"]
    seen.clear()
    quantize(model, blocks=("layer*.*",), **options)
    assert units(seen) == ["layer1.0", "layer2.0", "layer3.0", "fc"]
    with pytest.raises(SpecError, match=r"'stage\*' matches no module that holds layers; the network has: layer1, layer1\.0"):
        quantize(model, blocks="layer1.*,stage*", **options)


def test_a_network_without_blocks_is_learned_layer_by_layer_with_a_note(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> None:
    data = torch.randn(16, 3, 8, 8)
    result = quantize(settled(TinyNet(), data), method="brecq", weight_bits=4, calibration=data, **{**QUICK, "iterations": 2})
    assert units(seen) == ["conv1", "conv2", "head"]
    assert any("no residual or repeated block was found" in note for note in record_of(result).table.notes)


def test_one_layer_units_are_adaround_with_a_linear_schedule() -> None:
    data = torch.randn(32, 24)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    options = {
        "policy": BitPolicy.uniform(3, None, first_last=None), "calibration": data,
        **{key: value for key, value in QUICK.items() if key != "activation_iterations"},
    }  # fmt: skip
    layers = quantize(model, method="adaround", schedule="linear", **options)
    blocks = quantize(model, method="brecq", weight_grid="symmetric", **options)
    cosine = quantize(model, method="adaround", schedule="cosine", **options)
    for index in (0, 2):
        assert torch.equal(layers[index].weight, blocks[index].weight)
        assert not torch.equal(layers[index].weight, cosine[index].weight)


# Grids and released settings


def test_grids_are_affine_below_eight_bits_and_symmetric_at_eight() -> None:
    weight, layer = torch.randn(5, 4, 3, 3) + 0.4, nn.Conv2d(4, 5, 3)
    kinds = {}
    for grid in ("affine", "symmetric", "mixed"):
        for bits in (4, 8):
            quantizer = Brecq(weight_grid=grid).weight_quantizer(Slot("conv", layer, bits))
            quantizer.initialize(weight)
            kinds[grid, bits] = "affine" if quantizer.zero_point.unique().numel() > 1 else "symmetric"
    assert kinds == {
        ("affine", 4): "affine", ("affine", 8): "affine", ("symmetric", 4): "symmetric", ("symmetric", 8): "symmetric",
        ("mixed", 4): "affine", ("mixed", 8): "symmetric",
    }  # fmt: skip


def test_the_affine_range_is_the_best_of_eighty_by_the_power_of_two_point_four() -> None:
    weight = torch.randn(3, 50) + 1.5
    quantizer = Brecq().weight_quantizer(Slot("fc", nn.Linear(50, 3), 3))
    quantizer.initialize(weight)
    for row, scale, zero in zip(weight, quantizer.scale.flatten(), quantizer.zero_point.flatten(), strict=True):
        scores = []
        for step in range(80):
            high, low = row.max() * (1 - 0.01 * step), row.min() * (1 - 0.01 * step)
            delta = (high - low) / 7
            point = (-low / delta).round()
            value = (((row / delta).round() + point).clamp(0, 7) - point) * delta
            scores.append(((value - row).abs().pow(2.4).mean().item(), delta.item(), point.item()))
        _, delta, point = min(scores)
        assert scale.item() == pytest.approx(delta, rel=1e-5)
        assert zero.item() == point


def test_a_dead_channel_stays_zero() -> None:
    model, data = residual()
    with torch.no_grad():
        model.layer1[0].conv1.weight[1] = 0
    result = quantize(model, method="brecq", weight_bits=2, activation_bits=None, calibration=data, **QUICK)
    weight = result.layer1[0].conv1.weight
    assert weight[1].abs().max() == 0
    assert torch.isfinite(weight).all()


def test_released_settings_widen_the_ends_and_skip_the_first() -> None:
    narrow = ReleasedLayer(2, 4, True)
    assert released_layers(5, 2, 4) == [ReleasedLayer(8, 8, False), narrow, narrow, ReleasedLayer(2, 8, True), ReleasedLayer(8, 4, True)]


def bits_of(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    return {row.name: (row.weight_bits, row.activation_bits) for row in lowbit.summary(model).layers}


def released(model: nn.Module, data: Tensor, **asked: object) -> nn.Module:
    policy = BitPolicy.uniform(3, 4, first_last=8)
    options: dict[str, object] = {**QUICK, "iterations": 1, "policy": policy, "first_last": "released", "calibration": data, **asked}
    return quantize(model, method="brecq", **options)


def test_released_ends_leave_the_classifier_behind_a_residual_block_at_the_bits_of_all() -> None:
    model, data = residual()
    bits = bits_of(released(model, data))
    assert bits["conv"] == (8, 8) and bits["fc"] == (8, 4)
    assert bits["layer1.0.conv1"] == (3, 8)  # reads the stem
    inner = {name: pair for name, pair in bits.items() if name not in ("conv", "fc", "layer1.0.conv1")}
    assert set(inner.values()) == {(3, 4)} and len(inner) == 7
    assert bits_of(released(model, data, first_last="intended"))["fc"] == (8, 8)


def test_released_ends_widen_the_classifier_behind_a_layer_of_its_own() -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    bits = bits_of(released(nn.Sequential(*layers).eval(), torch.randn(16, 3, 8, 8)))
    assert bits == {"0": (8, 8), "2": (3, 8), "4": (3, 4), "7": (8, 8)}


def test_released_ends_go_by_the_order_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.inner, self.first = (nn.Linear(5, 5) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.inner(self.first(x).relu()).relu()).relu())

    bits = bits_of(released(Backwards().eval(), torch.randn(16, 5)))
    # "inner" is the second to last: what reads it has 8 bits; of the two ends by definition, one reads nothing of 8 bits
    assert bits == {"first": (8, 4), "inner": (3, 4), "middle": (3, 8), "last": (8, 4)}


def test_released_ends_leave_rules_and_float_activations_alone() -> None:
    model, data = residual()
    policy = BitPolicy.uniform(3, 4).with_rule(match="conv", weight=5, activation=6)
    assert bits_of(released(model, data, policy=policy))["conv"] == (5, 6)
    bits = bits_of(released(model, data, policy=BitPolicy.uniform(3, None)))
    assert bits["conv"] == bits["fc"] == (8, None) and bits["layer1.0.conv1"] == (3, None)


def test_the_record_holds_the_bits_of_the_released_code() -> None:
    model, data = residual()
    record = record_of(released(model, data))
    assert record.policy.first_last is None
    assert [(rule.match, rule.weight, rule.activation) for rule in record.policy.rules] == [
        ("conv", 8, 8), ("layer1.0.conv1", None, 8), ("fc", 8, None)
    ]  # fmt: skip


def test_released_ends_are_refused_where_the_dataflow_is_not_known() -> None:
    with pytest.raises(GraphError, match="first_last='released' needs the network's dataflow"):
        released(BranchNet(), torch.randn(4, 3, 8, 8))


# Fisher weights


def gradients(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> list[UnitData]:
    return [data for _, data in seen["weights"]]


@pytest.mark.parametrize("loss", ["fisher_diag", "fisher_full"])
@pytest.mark.parametrize("fisher", ["paper", "released"])
def test_fisher_weights_have_the_shape_of_the_output_and_their_scale(loss: str, fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    learn = reconstruction.Phase.__subclasses__()[0].learn

    def watched(self, unit, data, run, seed):
        everything = torch.arange(data.target.samples)
        gradient, target = data.gradient.read(everything), data.target.read(everything)
        assert gradient.shape == target.shape
        if fisher == "paper":
            assert gradient.square().mean().item() == pytest.approx(1, rel=1e-4)
        else:
            assert gradient.min() >= 1
            assert gradient.max() < 2
        checked.append(unit.name)
        return learn(self, unit, data, run, seed)

    monkeypatch.setattr(reconstruction.Phase.__subclasses__()[0], "learn", watched)
    model, data = residual()
    quantize(
        model, method="brecq", weight_bits=3, activation_bits=None, calibration=data, loss=loss, fisher=fisher, **{**QUICK, "iterations": 5}
    )
    assert checked == ["layer1.0", "layer2.0", "layer3.0", "fc"]


def test_released_fisher_weights_are_almost_the_plain_error(seen: dict[str, list[tuple[UnitReport, UnitData]]]) -> None:
    model, data = residual()
    arguments = {"method": "brecq", "weight_bits": 3, "activation_bits": None, "calibration": data, **QUICK, "iterations": 1}
    quantize(model, **arguments)
    plain = [report.before for report, _ in seen.pop("weights")]
    quantize(model, loss="fisher_diag", fisher="released", **arguments)
    released = [report.before for report, _ in seen.pop("weights")]
    quantize(model, loss="fisher_diag", fisher="paper", **arguments)
    paper = [report.before for report, _ in seen.pop("weights")]
    assert released[0] == pytest.approx(plain[0], rel=0.1)
    assert paper[0] != pytest.approx(plain[0], rel=0.1)


# Quality


def test_blocks_and_layers_are_both_nearer_to_float_than_rounding_to_nearest() -> None:
    model, data = residual()
    arguments = {"weight_bits": 2, "activation_bits": None, "calibration": data[:32]}
    nearest = quantize(model, method="brecq", **{**QUICK, "iterations": 0}, **arguments)
    blocks = quantize(model, method="brecq", **QUICK, **arguments)
    layers = quantize(model, method="brecq", blocks="layer3.0.downsample", **QUICK, **arguments)
    for learned in (blocks, layers):
        assert error(learned, model, data[:32]) < 0.6 * error(nearest, model, data[:32])
        assert error(learned, model, data[32:]) < 0.9 * error(nearest, model, data[32:])


def test_one_sample_is_enough_to_run_and_to_gain_on_it() -> None:
    model, data = residual()
    arguments = {"weight_bits": 2, "activation_bits": 4, "calibration": data[:1]}
    nearest = quantize(model, method="brecq", **{**QUICK, "iterations": 0}, **arguments)
    learned = quantize(model, method="brecq", **{**QUICK, "activation_iterations": 50}, **arguments)
    assert error(learned, model, data[:1]) < 0.6 * error(nearest, model, data[:1])


def test_calibration_data_that_is_not_finite_is_refused() -> None:
    model, data = residual()
    data[3, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="1 of 6144 values are NaN or infinite"):
        quantize(model, method="brecq", weight_bits=3, calibration=data, **QUICK)


# Activation phase


def test_the_activation_phase_leaves_weights_and_zero_points_and_lowers_each_units_error(
    seen: dict[str, list[tuple[UnitReport, UnitData]]],
) -> None:
    model, data = residual()
    arguments = {"method": "brecq", "weight_bits": 4, "activation_bits": 3, "calibration": data}
    without = quantize(model, **QUICK, **arguments)
    assert "activations" not in seen
    result = quantize(
        model, **{**QUICK, "activation_iterations": 300, "activation_learning_rate": 4e-3, "activation_inputs": "float"}, **arguments
    )
    first, second = bake_weights(without)[1], bake_weights(result)[1]
    assert all(torch.equal(first[name].decode(), second[name].decode()) for name in first)
    before, after = activation_quantizers(without), activation_quantizers(result)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name].zero_point, before[name].zero_point) for name in before)
    moved = [name for name in before if not torch.equal(after[name].scale, before[name].scale)]
    assert len(moved) >= 4
    reports = [report for report, _ in seen["activations"]]
    assert all(report.after < report.before for report in reports if not report.is_kept)
    assert sum(report.after < 0.995 * report.before for report in reports) >= 2


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_scales_learn_on_the_inputs_asked_for(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    learn = LearnScales.learn
    monkeypatch.setattr(LearnScales, "learn", lambda self, *args: asked.append(self.is_symmetric) or learn(self, *args))
    model, data = residual()
    options = {**QUICK, "iterations": 1, "activation_iterations": 30, "activation_inputs": inputs, "activation_learning_rate": 1e-2}
    arguments = {"method": "brecq", "weight_bits": 3, "activation_bits": 4, "calibration": data}
    result = quantize(model, **options, **arguments)
    assert asked
    assert all(is_symmetric == (inputs == "float") for is_symmetric in asked)
    other = quantize(model, **{**options, "activation_inputs": "float" if inputs == "quantized" else "quantized"}, **arguments)
    scales, others = (torch.stack([q.scale.flatten()[0] for q in activation_quantizers(m).values()]) for m in (result, other))
    assert not torch.equal(scales, others)


def test_the_rounding_phase_runs_before_activations_are_quantized() -> None:
    model, data = residual()
    arguments = {"method": "brecq", "weight_bits": 3, "calibration": data, **QUICK}
    with_activations, without = (quantize(model, activation_bits=bits, **arguments) for bits in (4, None))
    first, second = bake_weights(with_activations)[1], bake_weights(without)[1]
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def test_learned_activation_quantizers_have_at_most_two_to_the_b_levels_and_keep_them() -> None:
    model, data = residual()
    result = quantize(model, method="brecq", weight_bits=4, activation_bits=3, calibration=data, **{**QUICK, "activation_iterations": 30})
    x = torch.linspace(-20, 20, 5001)
    for name, quantizer in activation_quantizers(result).items():
        y = quantizer(x)
        assert y.unique().numel() <= 2**quantizer.bit_width, name
        assert torch.equal(quantizer(y), y), name


def test_the_power_of_the_range_search_is_that_of_the_activation_phase() -> None:
    assert Brecq().scale_objective().power == 2.4
    assert Brecq().rounding_objective().power == 2
    rows = torch.randn(2, 500).exp()
    assert not torch.equal(shrink_search(rows, 0, 7, symmetric=False, power=2.4)[0], shrink_search(rows, 0, 7, symmetric=False)[0])

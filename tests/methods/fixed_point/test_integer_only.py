from __future__ import annotations

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.formats.fixed_point.operators import accumulate_conv
from lowbit.formats.fixed_point.parameters import choose_qparams, quantize_bias, widened
from lowbit.formats.fixed_point.requantize import RequantizerKind, accumulator_scale, make_requantizer
from lowbit.methods.fixed_point.integer_only import (
    AffineActivation,
    FoldedWeight,
    IntegerOnly,
    MovingAverageActivation,
    RangeWeight,
)
from lowbit.models.resnet import resnet8
from lowbit.network import insert
from lowbit.spec import Granularity, LayerBits
from lowbit.testing import tiny, training

X = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 0.5


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4),
        )  # fmt: skip
        for norm in (model[1], model[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
    return model


def prepared(model: nn.Module | None = None, **options: object) -> nn.Module:
    asked = {"weight_bits": 8, "activation_bits": 8, **options}
    return lowbit.prepare(network() if model is None else model, method="integer_only", sample=X, **asked)  # type: ignore[arg-type]


# Weights


def test_affine_weights_leave_out_the_lowest_code_and_have_zero_among_the_others() -> None:
    quantizer, weight = RangeWeight(2), torch.tensor([-1.0, 0.0, 0.4, 2.0])
    encoded = quantizer.encode(weight)
    assert encoded.codes.tolist() == [1, 2, 2, 3]  # scale 1.5, zero point 1 + round(2 / 3)
    assert quantizer(weight).tolist() == [-1.5, 0.0, 0.0, 1.5]
    wide = RangeWeight(8).encode(weight)
    assert (int(wide.codes.min()), int(wide.codes.max())) == (1, 255)


def test_symmetric_weights_have_a_scale_for_each_channel_and_no_lowest_code() -> None:
    weight = torch.tensor([[-4.0, 1.0], [0.5, 0.3], [0.0, 0.0]])
    encoded = RangeWeight(4, code_type="int8", granularity=Granularity.channel()).encode(weight)
    assert encoded.codes.tolist() == [[-7, 2], [7, 4], [0, 0]]
    assert encoded.decode()[:, 0].tolist() == pytest.approx([-4.0, 0.5, 0.0])


def test_gradients_pass_the_rounding_of_weights_and_nothing_goes_through_their_range() -> None:
    weight = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True)
    RangeWeight(8, code_type="int8")(weight).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 2.0, 3.0]


# Activations


def test_ranges_follow_batches_after_their_step_and_stand_still_in_evaluation() -> None:
    quantizer = MovingAverageActivation(8, smoothing=0.5)
    quantizer.initialize(torch.tensor([1.0, 4.0]))
    assert (quantizer.lo.item(), quantizer.hi.item()) == (0.0, 4.0)
    quantizer.train()
    quantizer(torch.tensor([-2.0, 1.0]))
    quantizer(torch.tensor([0.0, 3.0]))
    assert quantizer.hi.item() == 4.0
    quantizer.project()  # after one batch: 2 / 11 of the old range
    assert (quantizer.lo.item(), quantizer.hi.item()) == pytest.approx((-2 * 9 / 11, 3 + 2 / 11))
    for _ in range(20):
        quantizer(torch.tensor([-1.0, 1.0]))
        quantizer.project()
    before = quantizer.hi.item()
    quantizer(torch.tensor([-1.0, 9.0]))
    quantizer.project()
    assert quantizer.hi.item() == pytest.approx((before + 9) / 2)
    quantizer.eval()
    quantizer(torch.tensor([100.0]))
    quantizer.project()
    assert quantizer.hi.item() == pytest.approx((before + 9) / 2)


def test_activations_wait_in_training_and_are_quantized_in_evaluation() -> None:
    quantizer = MovingAverageActivation(2, delay=0.5)
    quantizer.initialize(torch.tensor([0.0, 3.0]))
    x = torch.tensor([0.2, 1.6, 5.0])
    quantizer.set_progress(0.4)
    assert torch.equal(quantizer.train()(x), x)
    assert quantizer.eval()(x).tolist() == [0.0, 2.0, 3.0]
    quantizer.set_progress(0.5)
    assert quantizer.train()(x).tolist() == [0.0, 2.0, 3.0]


def test_both_code_types_have_the_same_levels_and_gradients_end_with_the_range() -> None:
    x = torch.linspace(-3, 5, 4001)
    found = []
    for code_type in ("uint8", "int8"):
        quantizer = MovingAverageActivation(8, code_type=code_type)  # type: ignore[arg-type]
        quantizer.initialize(torch.tensor([-1.0, 2.0]))
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.sum().backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, ((x >= -85 * 3 / 255) & (x <= 170 * 3 / 255)).float())
        found.append(y.detach())
        assert quantizer(torch.zeros(1)).item() == 0.0
    assert torch.equal(*found)


def test_calibrated_activations_have_the_parameters_of_tensorflow_lite() -> None:
    x = torch.tensor([-1.0, 0.3, 1.0])
    for code_type, zero_point in (("uint8", 128), ("int8", -1)):  # half to even would give 128 and 0
        quantizer = AffineActivation(8, code_type=code_type)  # type: ignore[arg-type]
        quantizer.initialize(x)
        assert quantizer.zero_point.item() == zero_point and quantizer.scale.item() == pytest.approx(2 / 255)


def test_the_papers_program_has_zero_points_of_its_own() -> None:
    quantizer = AffineActivation(8, zero_point_rule="gemmlowp")
    quantizer.initialize(torch.tensor([-1.0, 0.3, 1.0]))
    assert quantizer.zero_point.item() == 127


# The network


def test_norms_disappear_and_the_prepared_network_computes_nearly_what_the_float_one_does() -> None:
    model, qat = network().eval(), prepared()
    assert not any(isinstance(module, nn.BatchNorm2d) for name, module in qat.named_modules() if "quantizer" not in name)
    with insert.quantization_enabled(qat.eval(), weights=False, activations=False):
        torch.testing.assert_close(tiny.outputs(qat, X), tiny.outputs(model, X), rtol=1e-4, atol=1e-4)
    assert tiny.sqnr_db(tiny.outputs(model, X), tiny.outputs(qat, X)) > 25
    assert any(note == "batch norms folded into the layers before them: 2" for note in lowbit.summary(qat).notes)


def test_training_normalizes_by_the_batch_until_norms_freeze() -> None:
    model, qat = network().train(), prepared(freeze_norms=0.5).train()
    with torch.no_grad(), insert.quantization_enabled(qat, weights=False, activations=False):
        torch.testing.assert_close(qat(X), model(X), rtol=1e-3, atol=1e-3)
        assert torch.allclose(
            next(m for m in qat.modules() if isinstance(m, nn.BatchNorm2d)).running_mean, model[1].running_mean, atol=1e-6
        )
        for module in qat.modules():
            if isinstance(module, FoldedWeight):
                module.set_progress(0.5)
        torch.testing.assert_close(qat(X), model.eval()(X), rtol=1e-3, atol=1e-3)


def test_the_norms_parameters_are_trained_as_those_of_norms() -> None:
    run = training.run_of(prepared(), float_network=network())
    roles = [role for role, _ in run.roles()]
    assert roles.count("others.norms") == 4 and roles.count("weights") == 3 and "quantizers" not in roles


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(y) if float(y.detach().sum()) > 0 else self.head(-y)


def test_a_network_that_cannot_be_exported_keeps_its_norms_and_says_so() -> None:
    qat = prepared(Branching())
    assert isinstance(qat.norm, nn.BatchNorm2d)
    notes = lowbit.summary(qat).notes
    assert any(note.startswith("batch norms were not folded: ") for note in notes)
    assert any(
        note.startswith("sums, concatenations and what is pooled stay in float, so that the network is none of integers") for note in notes
    )
    assert not any("norm" in note for note in lowbit.summary(prepared(fold_norms=False)).notes)


def test_layers_left_in_float_keep_their_norm() -> None:
    policy = lowbit.BitPolicy.uniform(8, 8).keep_float("3")
    qat = prepared(policy=policy)
    assert isinstance(qat[1], nn.Identity) and isinstance(qat[4], nn.BatchNorm2d)


def test_the_papers_policy_treats_all_layers_alike_and_quantizes_sums() -> None:
    policy = IntegerOnly().default_policy(LayerBits(7, 6))
    assert policy.merges == 6 and policy.bits_for("end", nn.Linear(1, 1), position="first") == LayerBits(7, 6)


def test_a_residual_network_is_one_of_integers_without_further_settings() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    qat = lowbit.prepare(resnet8(), method="integer_only", weight_bits=8, activation_bits=8, sample=x)
    qat(x)  # norms see a batch
    network = lowbit.compile_integer(qat.eval(), sample=x)
    assert float((network(x) - qat(x)).detach().abs().max()) <= 3 * float(network.graph.output.grid.scale)
    floats = lowbit.prepare(resnet8(), method="integer_only", weight_bits=8, activation_bits=8, merge_bits="float", sample=x).eval()
    with pytest.raises(LayerError, match="merge_bits=8"):
        lowbit.compile_integer(floats, sample=x)


def test_its_quantizers_go_through_no_other_procedure() -> None:
    with pytest.raises(SpecError, match="inq"):
        prepared(procedure="inq")


@pytest.mark.parametrize("options", [{}, {"codes": "int8", "weight_granularity": "per_channel"}], ids=["paper", "tensorflow lite"])
def test_integers_compute_the_codes_of_the_simulation_but_for_ties(options: dict[str, str]) -> None:
    model = training.train(training.ready("integer_only", tiny.trained(), tiny.calibration(), weight_bits=8, activation_bits=8))
    if options:
        model = lowbit.prepare(
            tiny.trained(), method="integer_only", weight_bits=8, activation_bits=8, sample=tiny.calibration(), **options
        ).eval()  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}
    for name in ("conv1", "conv2"):
        model.get_submodule(name).register_forward_pre_hook(lambda _layer, args, name=name: seen.__setitem__(name, args[0]), prepend=True)
    tiny.outputs(model, tiny.held_out())
    first, second = (insert.input_quantizer(model.get_submodule(name)) for name in ("conv1", "conv2"))
    baked, codes = insert.bake_weights(model)
    layer, weight = baked.get_submodule("conv1"), codes["conv1.weight"]
    assert isinstance(first, MovingAverageActivation) and isinstance(second, MovingAverageActivation) and isinstance(layer, nn.Conv2d)
    x, expected = first.encode(seen["conv1"]), second.encode(seen["conv2"]).codes
    x_scale, w_scale, y_scale = x.decoder.scale, weight.decoder.scale.flatten(), second.parameters_of_grid()[0]  # type: ignore[attr-defined]
    zeros = [int(t.decoder.zero_point) if t.decoder.zero_point.numel() == 1 else 0 for t in (x, weight)]  # type: ignore[attr-defined]
    assert layer.bias is not None
    acc = accumulate_conv(
        x.codes, weight.codes, quantize_bias(layer.bias.detach(), accumulator_scale(x_scale, w_scale)),
        x_zero_point=zeros[0], w_zero_point=zeros[1], padding=layer.padding,  # type: ignore[arg-type]
    )  # fmt: skip
    zero_point = int(second.parameters_of_grid()[1])
    assert zero_point == second.qmin  # behind a ReLU, so that the clamp is the ReLU
    kinds: tuple[RequantizerKind, ...] = ("fixed_point", "dyadic", "onnx")
    for kind in kinds:
        got = make_requantizer(kind, x_scale, w_scale, y_scale, zero_point, second.qmin, second.qmax)(acc)
        difference = (got - expected.int()).abs()
        assert difference.max().item() <= 1, kind
        assert (difference > 0).double().mean().item() < 0.01, kind  # biases are rounded, so that a few values near ties differ


# After training


def test_calibrated_networks_have_folded_weights_in_whole_ranges() -> None:
    model = network().eval()
    quantized = lowbit.quantize(model, method="integer_only", weight_bits=8, activation_bits=8, calibration=X)
    layer = quantized[0]
    assert isinstance(quantized[1], nn.Identity)
    quantizer, weight = insert.weight_quantizer(layer), insert.float_weight(layer)
    assert isinstance(quantizer, RangeWeight) and quantizer.code_type == "int8"
    assert quantizer.encode(weight).codes.flatten(1).abs().amax(1).tolist() == [127] * 8
    inputs = insert.input_quantizer(layer)
    assert isinstance(inputs, AffineActivation)
    scale, zero_point = choose_qparams(*widened(X.min(), X.max()), -128, 127)
    assert inputs.scale.item() == scale.float().item() and inputs.zero_point.item() == zero_point.item()
    assert tiny.sqnr_db(tiny.outputs(model, X), tiny.outputs(quantized, X)) > 30


def test_weights_after_training_take_whole_ranges_alone() -> None:
    with pytest.raises(SpecError, match="weight_observer"):
        lowbit.quantize(TinyNet(), method="integer_only", calibration=X, weight_observer="mse")

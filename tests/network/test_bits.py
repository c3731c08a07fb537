from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.measure import layer_bits, model_size
from lowbit.network import insert
from lowbit.network.bits import asked_bits, get_bits, keep_bits, set_bits
from lowbit.network.record import record_of
from lowbit.spec import BitPolicy, LayerBits

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INNER, ENDS = ("conv1", "conv2"), ("stem", "head")


def prepared(method: str = "lsq", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.prepare(TinyNet().eval(), method=method, sample=X, **options).eval()  # type: ignore[arg-type]


def quantized(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return lowbit.quantize(TinyNet().eval(), method="round_to_nearest", calibration=X, **options)  # type: ignore[arg-type]


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def test_a_number_changes_all_but_the_first_and_last_layer() -> None:
    model = prepared()
    assert set(get_bits(model)) == {*INNER, *ENDS} and next(iter(get_bits(model))) == "stem"
    set_bits(model, 2)
    bits = get_bits(model)
    assert {bits[name] for name in INNER} == {LayerBits(2, 2)} and {bits[name] for name in ENDS} == {LayerBits(8, 8)}
    assert model.conv1.weight[0].unique().numel() <= 4  # type: ignore[union-attr, index]


@pytest.mark.parametrize("make", [prepared, quantized])
def test_there_and_back_changes_nothing(make: object) -> None:
    model = make(weight_bits=4, activation_bits=4)  # type: ignore[operator]
    before = outputs(model)
    set_bits(model, 2)
    assert not torch.equal(outputs(model), before)
    set_bits(model, None)
    set_bits(model, 4)
    assert torch.equal(outputs(model), before)


def test_none_is_the_float_network() -> None:
    model = prepared(weight_bits=2, activation_bits=2)
    with insert.quantization_enabled(model, weights=False, activations=False):
        expected = outputs(model)
    set_bits(model, None)
    assert torch.equal(outputs(model), expected)
    assert set(get_bits(model).values()) == {LayerBits(None, None)}
    assert insert.bake_weights(model)[1] == {}


def test_weights_alone_may_pass() -> None:
    model = prepared()
    set_bits(model, {"conv1": LayerBits(None, 3)})
    assert torch.equal(model.conv1.weight, insert.float_weight(model.conv1))  # type: ignore[arg-type]
    assert get_bits(model)["conv1"] == LayerBits(None, 3) and get_bits(model)["conv2"] == LayerBits(4, 4)


def test_patterns_change_what_matches_and_the_later_one_wins() -> None:
    model = prepared()
    set_bits(model, {"*": 8, "conv*": LayerBits(3, 5), "conv2": 2})
    assert get_bits(model) == {"stem": LayerBits(8, 8), "conv1": LayerBits(3, 5), "conv2": LayerBits(2, 2), "head": LayerBits(8, 8)}
    with pytest.raises(SpecError, match=r"bits for 'layer9.\*': no layer matches. The model has: stem, conv1, conv2, head"):
        set_bits(model, {"conv1": 4, "layer9.*": 4})
    assert get_bits(model)["conv1"] == LayerBits(3, 5)


def test_a_policy_says_all_layers_and_the_record_keeps_its_own_exceptions() -> None:
    model = prepared(policy=BitPolicy.uniform(4, 4).with_rule(match="conv2", weight=6))
    set_bits(model, 3)
    assert get_bits(model)["conv2"] == LayerBits(6, 3) and get_bits(model)["conv1"] == LayerBits(3, 3)
    set_bits(model, BitPolicy.uniform(5, 2, first_last=7))
    assert get_bits(model)["conv2"] == LayerBits(5, 2) and get_bits(model)["stem"] == LayerBits(7, 7)
    assert asked_bits(model)["conv2"] == LayerBits(6, 4)
    with pytest.raises(SpecError, match="matches no layer"):
        set_bits(model, BitPolicy.uniform(4, 4).with_rule(match="missing", weight=3))


def test_summary_size_and_record_tell_the_new_bits(tmp_path: Path) -> None:
    for model in (prepared(weight_bits=8), quantized(weight_bits=8, activation_bits=8)):
        before = model_size(model).layers["conv1"].weight_bytes
        set_bits(model, 2)
        assert layer_bits(model)["conv1"] == (2, 2)
        assert 4 * model_size(model).layers["conv1"].weight_bytes == before
        row = next(row for row in lowbit.summary(model).layers if row.name == "conv1")
        assert (row.weight_bits, row.activation_bits) == (2, 2)
        record = record_of(model)
        assert record is not None and record.table["conv1"].weight_bits == 2
        lowbit.export(model, tmp_path / "net.lowbit", sample=X)
        loaded = lowbit.load(tmp_path / "net.lowbit")
        assert layer_bits(loaded)["conv1"] == (2, 2)
        torch.testing.assert_close(outputs(loaded), outputs(model))
        set_bits(model, {"conv1": None})
        assert model_size(model).layers["conv1"].weight_bytes == 8 * 8 * 9 * 4
        assert next(row for row in lowbit.summary(model).layers if row.name == "conv1").weight_bits is None


def test_a_quantizer_at_the_output_of_an_earlier_module_is_found() -> None:
    class Modules(nn.Sequential):
        def __init__(self) -> None:
            layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)]
            super().__init__(*layers)

    model = lowbit.quantize(Modules().eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=X)
    assert insert.input_quantizer(model[2]) is None  # type: ignore[index]
    set_bits(model, {"2": LayerBits(4, 3)})
    quantizer = insert.output_quantizer(model[1])  # type: ignore[index]
    assert quantizer is not None and quantizer.bit_width == 3 and get_bits(model)["2"] == LayerBits(4, 3)
    assert insert.activation_quantizers(copy.deepcopy(model))["1.output"].bit_width == 3


def test_weights_are_fitted_to_a_new_width() -> None:
    model, direct = quantized(weight_bits=8, activation_bits=8), quantized(weight_bits=2, activation_bits=8)
    set_bits(model, {"conv1": LayerBits(2, 8), "conv2": LayerBits(2, 8)})
    assert torch.equal(model.conv1.weight, direct.conv1.weight)  # type: ignore[arg-type]


def test_layers_that_share_a_quantizer_must_agree() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
            self.left, self.right = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.stem(x))
            return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))

    model = lowbit.quantize(Twins().eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=X)
    with pytest.raises(SpecError, match="layers 'left' and 'right' share one activation quantizer, so they cannot have 4 and 8 bits"):
        set_bits(model, {"left": 4, "right": 8})
    assert get_bits(model)["left"] == LayerBits(8, 8)
    set_bits(model, {"left": LayerBits(4, 6), "right": LayerBits(8, 6)})
    assert get_bits(model)["right"] == LayerBits(8, 6)


def test_widths_that_a_method_or_quantizer_lacks_are_refused_and_nothing_changes() -> None:
    model = prepared("qil")
    with pytest.raises(SpecError, match="layer 'conv1': qil has weight bits 2, 3, 4, 5, 6, 7, 8, got 1"):
        set_bits(model, 1)
    assert get_bits(model)["conv1"] == LayerBits(4, 4)
    binary = prepared("dorefa", weight_bits=1, activation_bits=2)
    with pytest.raises(SpecError, match="layer 'conv1', weight: ScaledSignQuantizer has bit-widths 1, got 3"):
        set_bits(binary, {"conv*": 3})
    with pytest.raises(SpecError, match="from 1 to 8, got 9"):
        set_bits(model, 9)


def test_what_has_no_quantizer_cannot_be_asked_for_bits() -> None:
    model = prepared(activation_bits=None)
    set_bits(model, 3)
    assert get_bits(model)["conv1"] == LayerBits(3, None)
    with pytest.raises(SpecError, match="layer 'conv1': its input is in float and has no quantizer, asked for 4 bits"):
        set_bits(model, {"conv1": LayerBits(2, 4)})
    kept = prepared(policy=BitPolicy.uniform(4, 4).keep_float("conv2"))
    with pytest.raises(SpecError, match="layer 'conv2': its weight is in float"):
        set_bits(kept, BitPolicy.uniform(3, 3))
    set_bits(kept, 3)
    assert get_bits(kept)["conv2"] == LayerBits(None, None)


def test_outputs_change_where_the_policy_gave_them_a_quantizer() -> None:
    policy = BitPolicy.uniform(4, 4).with_rule(match="conv2", output=6)
    model = prepared(policy=policy)
    assert get_bits(model)["conv2"] == LayerBits(4, 4, 6) and get_bits(model)["conv1"] == LayerBits(4, 4)
    before = outputs(model)
    set_bits(model, {"conv2": LayerBits(4, 4, 2)})
    assert not torch.equal(outputs(model), before)
    assert get_bits(model)["conv2"].output == record_of(model).table["conv2"].output_bits == 2  # type: ignore[union-attr]
    set_bits(model, {"conv2": LayerBits(4, 4, 6)})
    assert torch.equal(outputs(model), before)
    with pytest.raises(SpecError, match="layer 'conv1': its output is in float and has no quantizer, asked for 3 bits"):
        set_bits(model, {"conv1": LayerBits(4, 4, 3)})


def test_a_float_network_has_nothing_to_change() -> None:
    with pytest.raises(LayerError, match="TinyNet has no quantizers"):
        set_bits(TinyNet(), 4)
    with pytest.raises(SpecError, match="does not say how it was quantized"):
        asked_bits(TinyNet())
    assert set(get_bits(TinyNet()).values()) == {LayerBits(None, None)}


def test_bits_can_change_between_steps_of_training() -> None:
    model = prepared("lsq", weight_bits=4, activation_bits=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for bits in (4, 2, 3, 2, 4):
        set_bits(model, bits)
        optimizer.zero_grad()
        model(X).square().mean().backward()
        scale = insert.weight_quantizer(model.conv1).scale  # type: ignore[union-attr, arg-type]
        assert scale.grad is not None and bool(torch.isfinite(scale.grad).all())  # type: ignore[union-attr, arg-type]
        optimizer.step()
    assert get_bits(model)["conv1"] == LayerBits(4, 4)


def test_a_record_asks_for_the_bits_that_a_method_ended_with() -> None:
    policy = BitPolicy.uniform(4, 4).with_rule(match="conv1", weight=3).with_rule(match="conv*", activation=2)
    model = prepared(policy=policy)
    record = record_of(model)
    keep_bits(model)
    assert record is not None and record_of(model).policy == BitPolicy.uniform(4, 4).with_rule(match="conv*", activation=2).with_rule(
        match="conv1", weight=3
    )  # type: ignore[union-attr]
    for bits in (2, 5, 4):
        set_bits(model, {"conv2": LayerBits(bits, 2)})
        keep_bits(model)
        record = record_of(model)
        assert record is not None and asked_bits(model) == get_bits(model)
        assert record.table["conv2"].weight_bits == bits
        assert [(rule.match, rule.weight, rule.activation) for rule in record.policy.rules] == [
            ("conv*", None, 2), ("conv1", 3, None), *([("conv2", bits, None)] if bits != 4 else []),
        ]  # fmt: skip
    model.lowbit_record = None  # type: ignore[assignment]
    keep_bits(model)
    assert record_of(model) is None

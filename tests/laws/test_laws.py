"""Laws that every registered post-training method keeps, on one tiny network."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from tests.laws import tiny
from tests.networks import settled
from torch import Tensor, nn

import lowbit
from lowbit.network.insert import activation_quantizers, bake_weights, float_weight, quantized_layers, weight_quantizer
from lowbit.quantizers import QTensor, Quantizer
from lowbit.quantizers.qtensor import SumDecoder
from lowbit.registry import get_method

every_method = pytest.mark.parametrize("name", tiny.POST_TRAINING)


def grids(model: nn.Module) -> list[tuple[str, Quantizer, Tensor]]:
    """Every quantizer with a tensor to quantize: its weight, or values that go past both ends of its range."""
    found: list[tuple[str, Quantizer, Tensor]] = []
    for name, layer in quantized_layers(model).items():
        quantizer = weight_quantizer(layer)
        assert quantizer is not None
        found.append((f"{name}.weight", quantizer, float_weight(layer).detach()))
    values = torch.cat([torch.zeros(4), torch.linspace(-40, 40, 2001), torch.randn(2003)]).reshape(4, 1, -1)
    return found + [(name, quantizer, values) for name, quantizer in activation_quantizers(model).items()]


def single_grids(encoded: QTensor) -> list[QTensor]:
    """The tensor itself, or where it is a sum of several low-bit tensors, each of them."""
    if not isinstance(encoded.decoder, SumDecoder):
        return [encoded]
    parts = zip(encoded.codes, encoded.decoder.parts, strict=True)
    return [QTensor(codes, decoder, encoded.bit_width) for codes, decoder in parts]


# 1. Codes say everything


@every_method
@pytest.mark.parametrize("weight_bits", [1, 2, 3, 4, 8])
def test_decoded_codes_are_the_forward_pass_on_at_most_two_to_the_b_levels(name: str, weight_bits: int) -> None:
    if weight_bits not in get_method(name).weight_bits:
        with pytest.raises(lowbit.errors.SpecError, match="weight bits"):
            tiny.quantized(name, weight_bits)
        return
    model = tiny.quantized(name, weight_bits)
    found = grids(model)
    assert len(found) >= 4 + 4
    widths = {where: quantizer.bit_width for where, quantizer, _ in found}
    assert widths["conv1.weight"] == widths["conv2.weight"] == weight_bits
    assert widths["stem.weight"] == widths["head.weight"] == 8
    for where, quantizer, values in found:
        with torch.no_grad():
            forward, encoded = quantizer(values), quantizer.encode(values)
        assert torch.equal(encoded.decode(), forward), where
        assert not encoded.codes.is_floating_point(), where
        for part in single_grids(encoded):
            levels = max(row.unique().numel() for row in quantizer.granularity.flatten(part.decode()))
            assert levels <= 2**quantizer.bit_width, f"{where}: {levels} levels"
            codes = part.codes.unique().numel()
            assert codes <= 2**quantizer.bit_width, f"{where}: {codes} codes"
            if quantizer.bit_width == 1 and where.endswith("weight"):
                assert levels == 2, where


@every_method
def test_layers_compute_with_what_their_quantizer_encodes(name: str) -> None:
    model = tiny.quantized(name)
    baked, codes = bake_weights(model)
    assert set(codes) == {f"{layer}.weight" for layer in ("stem", "conv1", "conv2", "head")}
    for parameter, code in codes.items():
        assert torch.equal(baked.get_parameter(parameter), code.decode()), parameter
    assert torch.equal(tiny.outputs(baked, tiny.held_out()), tiny.outputs(model, tiny.held_out()))


# 3. The result is an ordinary module


@every_method
def test_copies_pickles_and_state_dicts_compute_the_same(name: str, device: torch.device) -> None:
    model, images = tiny.quantized(name), tiny.held_out()[:32]
    expected = tiny.outputs(model, images)
    assert torch.equal(tiny.outputs(copy.deepcopy(model), images), expected)
    assert torch.equal(tiny.outputs(pickle.loads(pickle.dumps(model)), images), expected)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.7)
    assert not torch.equal(tiny.outputs(other, images), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(tiny.outputs(other, images), expected)

    moved = model.to(device)
    assert all(t.device.type == device.type for t in moved.state_dict().values())
    torch.testing.assert_close(tiny.outputs(moved, images.to(device)).cpu(), expected, rtol=1e-3, atol=1e-2)
    assert torch.equal(tiny.outputs(moved.cpu(), images), expected)


@every_method
def test_quantizing_leaves_the_given_network_alone(name: str) -> None:
    before = {key: value.clone() for key, value in tiny.trained().state_dict().items()}
    tiny.quantized(name)
    after = tiny.trained().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# 4. Odd layers and data


class Odd(nn.Module):
    """Stem, the odd layer, ReLU, mean over space, linear: the odd layer is neither first nor last."""

    def __init__(self, stem: nn.Module, odd: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.odd, self.head = stem, odd, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.odd(self.stem(x).relu()).relu()
        return self.head(y.flatten(2).mean(2))


def odd_network(case: str) -> tuple[nn.Module, Tensor]:
    """A network around one odd layer, and samples for it."""
    images = torch.randn(16, 3, 6, 6)
    stem = nn.Conv2d(3, 6, 3, padding=1)
    if case == "one_dimension":
        return Odd(nn.Conv1d(3, 6, 3), nn.Conv1d(6, 5, 3, dilation=2), 5), torch.randn(16, 3, 12)
    if case == "transposed_one_dimension":
        return Odd(nn.Conv1d(3, 6, 3), nn.ConvTranspose1d(6, 4, 3, stride=2), 4), torch.randn(16, 3, 8)
    if case == "three_dimensions":
        return Odd(nn.Conv3d(3, 6, 1), nn.Conv3d(6, 4, 2), 4), torch.randn(16, 3, 3, 3, 3)
    odd: nn.Module = {
        "depthwise": nn.Conv2d(6, 6, 3, groups=6),
        "grouped": nn.Conv2d(6, 9, 3, groups=3, bias=False),
        "dilated": nn.Conv2d(6, 6, 3, dilation=2),
        "transposed": nn.ConvTranspose2d(6, 5, 3, stride=2),
        "transposed_grouped": nn.ConvTranspose2d(6, 4, 2, groups=2),
        "odd_channels": nn.Conv2d(6, 7, (1, 3), stride=(2, 1)),
    }.get(case, nn.Conv2d(6, 6, 3))
    model = Odd(stem, odd, tiny_channels(odd))
    with torch.no_grad():
        if case == "zero_channel":
            model.odd.weight[2] = 0
            model.odd.weight[4] = 1e-30
        if case == "zero_layer":
            model.odd.weight.zero_()
        if case == "constant_weights":
            model.odd.weight.fill_(0.25)
    return model, images[:1] if case == "one_sample" else images


def tiny_channels(layer: nn.Module) -> int:
    """Output channels of a convolution."""
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return layer.out_channels


ODD = [
    "depthwise", "grouped", "dilated", "transposed", "transposed_grouped", "one_dimension", "transposed_one_dimension", "three_dimensions",
    "odd_channels", "zero_channel", "zero_layer", "constant_weights", "one_sample",
]  # fmt: skip


@every_method
@pytest.mark.parametrize("case", ODD)
def test_odd_layers_and_data_stay_finite_and_right(name: str, case: str) -> None:
    model, data = odd_network(case)
    result = tiny.quantize(name, model.eval(), data, weight_bits=8, iterations=5)
    expected, got = tiny.outputs(model, data), tiny.outputs(result, data)
    assert torch.isfinite(got).all()
    error = float((expected - got).norm() / (expected.norm()))
    assert error < 0.08, f"relative error {error:.3f} at 8 bits"


# 5. Lower precision and compilation


@every_method
def test_autocast_to_bfloat16_stays_near_float32(name: str) -> None:
    model, images = tiny.quantized(name, 8), tiny.held_out()[:64]
    expected = tiny.outputs(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tiny.outputs(model, images)
    assert tiny.sqnr_db(expected, got.float()) > 20


@every_method
def test_the_compiled_network_computes_the_same(name: str) -> None:
    """Captured in one graph and run through autograd's tracing; no C++ compiler is needed for that."""
    torch.compiler.reset()
    model, images = tiny.quantized(name), tiny.held_out()[:16]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(tiny.outputs(compiled, images), tiny.outputs(model, images), rtol=1e-4, atol=1e-4)


# 6. It is better than rounding


@every_method
def test_beats_rounding_to_nearest_by_the_margin_it_states(name: str) -> None:
    info = get_method(name)
    model, data, images = tiny.trained(), tiny.calibration(), tiny.held_out()
    expected = tiny.outputs(model, images)
    assert info.method is not None
    granularity = getattr(info.method, "weight_granularity", "per_channel")
    plain = lowbit.quantize(
        model, method="round_to_nearest", weight_bits=3, activation_bits=8, calibration=data, weight_granularity=granularity, seed=0
    )
    method = lowbit.quantize(model, method=name, weight_bits=3, activation_bits=8, calibration=data, seed=0, **tiny.budget(info, 600))
    gain = tiny.sqnr_db(expected, tiny.outputs(method, images)) - tiny.sqnr_db(expected, tiny.outputs(plain, images))
    assert gain >= info.margin_db, f"{name} gains {gain:.2f} dB over rounding to nearest, its file states {info.margin_db}"


def test_every_method_but_the_baseline_states_a_margin() -> None:
    assert [name for name in tiny.POST_TRAINING if get_method(name).margin_db <= 0] == ["round_to_nearest"]


# 7. The file is as small as the arithmetic says


@every_method
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_packed_bytes_match_the_arithmetic_and_decode_to_the_same_outputs(name: str, weight_bits: int, tmp_path: Path) -> None:
    if weight_bits not in get_method(name).weight_bits:
        pytest.skip(f"{name} does not support {weight_bits} weight bits")
    model, path = tiny.quantized(name, weight_bits), tmp_path / "tiny.lowbit"
    lowbit.export(model, path, sample=tiny.held_out()[:2])
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    _, codes = bake_weights(model)
    codes_and_tables = sum(
        (code.code_bits + 7) // 8 + sum(t.numel() * 4 for t in code.decoder.tensors().values()) for code in codes.values()
    )
    biases = sum(p.numel() * 4 for key, p in model.named_parameters() if key.endswith("bias"))
    tables = sum(t.numel() * 4 for q in activation_quantizers(model).values() for t in q.state_dict().values())
    stored = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    assert stored <= 1.02 * (codes_and_tables + biases + tables) + 128
    assert stored >= sum((code.code_bits + 7) // 8 for code in codes.values())
    torch.testing.assert_close(tiny.outputs(lowbit.load(path), tiny.held_out()), tiny.outputs(model, tiny.held_out()), rtol=1e-5, atol=1e-5)


# 8. The same seed, the same result


@every_method
def test_the_same_seed_gives_the_same_bits_and_leaves_global_randomness_alone(name: str) -> None:
    data = tiny.calibration()
    torch.manual_seed(11)
    first = tiny.quantize(name, tiny.trained(), data, weight_bits=4)
    after_first = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), after_first)
    torch.manual_seed(12)
    second = tiny.quantize(name, tiny.trained(), data, weight_bits=4)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@every_method
def test_odd_networks_with_batch_norm_settle(name: str) -> None:
    model = settled(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)), torch.randn(32, 3, 6, 6)
    )
    data = torch.randn(32, 3, 6, 6)
    result = tiny.quantize(name, model, data, weight_bits=8, iterations=5)
    assert tiny.sqnr_db(tiny.outputs(model, data), tiny.outputs(result, data)) > 25

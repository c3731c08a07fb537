"""What more than one kind of method is held to: codes, ordinary modules, packed files."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.formats.packed.tensor import PackedTensor
from lowbit.network.insert import activation_quantizers, bake_weights, quantized_weights
from lowbit.quantizers import QTensor, Quantizer
from lowbit.quantizers.qtensor import SumDecoder
from lowbit.testing import tiny
from lowbit.workflows.export import export
from lowbit.workflows.load import load

MethodRef = str | type  # a name, ``file.py:Class`` or a class


def grids(model: nn.Module) -> list[tuple[str, Quantizer, Tensor]]:
    """Every quantizer with a tensor to quantize: its weight, or values that go past both ends of its range."""
    found: list[tuple[str, Quantizer, Tensor]] = []
    for site in quantized_weights(model).values():
        assert site.quantizer is not None
        found.append((site.path, site.quantizer, site.original.detach()))
    values = torch.cat([torch.zeros(4), torch.linspace(-40, 40, 2001), torch.randn(2003)]).reshape(4, 1, -1)
    return found + [(name, quantizer, values) for name, quantizer in activation_quantizers(model).items()]


def single_grids(encoded: QTensor) -> list[QTensor]:
    """The tensor itself, or where it is a sum of several low-bit tensors, each of them."""
    if not isinstance(encoded.decoder, SumDecoder):
        return [encoded]
    parts = zip(encoded.codes, encoded.decoder.parts, strict=True)
    return [QTensor(codes, decoder, encoded.bit_width) for codes, decoder in parts]


def check_codes(model: nn.Module, inner_bits: int) -> None:
    """Decoded codes are the forward pass, on at most two to the b levels; inner layers have ``inner_bits``, both ends 8."""
    found = grids(model)
    widths = {where: quantizer.bit_width for where, quantizer, _ in found}
    assert widths["conv1.weight"] == widths["conv2.weight"] == inner_bits
    assert widths["stem.weight"] == widths["head.weight"] == 8
    for where, quantizer, values in found:
        check_grid(where, quantizer, values, is_weight=where.endswith("weight"))


def check_grid(where: str, quantizer: Quantizer, values: Tensor, *, is_weight: bool) -> None:
    """Decoded codes are the forward pass, on at most two to the b levels, two at 1 bit, and fit into their bits."""
    with torch.no_grad():
        forward, encoded = quantizer(values), quantizer.encode(values)
    assert torch.equal(encoded.decode(), forward), where
    assert torch.isfinite(forward).all(), where
    assert not encoded.codes.is_floating_point(), where
    for part in single_grids(encoded):
        levels = max(row.unique().numel() for row in quantizer.granularity.flatten(part.decode()))
        assert levels <= 2**quantizer.bit_width, f"{where}: {levels} levels"
        codes = part.codes.unique().numel()
        assert codes <= 2**quantizer.bit_width, f"{where}: {codes} codes"
        if quantizer.bit_width == 1 and is_weight:
            assert levels <= 2 if values.unique().numel() < 2 else levels == 2, where


def check_alone(where: str, quantizer: Quantizer, values: Tensor, *, is_weight: bool) -> None:
    """What a quantizer keeps without a network: its codes, packed and unpacked, its copies, pickles and state dict, and bfloat16."""
    check_grid(where, quantizer, values, is_weight=is_weight)
    with torch.no_grad():
        expected = quantizer(values)
        if is_weight:
            assert torch.equal(PackedTensor.of(quantizer.encode(values)).decode(), expected), where
        other = copy.deepcopy(quantizer)
        assert torch.equal(other(values), expected), where
        assert torch.equal(pickle.loads(pickle.dumps(quantizer))(values), expected), where
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.7)
        other.load_state_dict(quantizer.state_dict())
        assert torch.equal(other(values), expected), where
        low = values.bfloat16()
        error = (quantizer(low).float() - quantizer(low.float())).norm()
        assert error <= 2**-8 * quantizer(low.float()).norm(), where


def check_baked(model: nn.Module) -> None:
    """Layers compute with what their quantizer encodes."""
    baked, codes = bake_weights(model)
    assert set(codes) == {f"{layer}.weight" for layer in ("stem", "conv1", "conv2", "head")}
    for parameter, code in codes.items():
        assert torch.equal(baked.get_parameter(parameter), code.decode()), parameter
    assert torch.equal(tiny.outputs(baked, tiny.held_out()), tiny.outputs(model, tiny.held_out()))


def check_copies(model: nn.Module, other: nn.Module, device: torch.device) -> None:
    """Copies, pickles, a state dict loaded into ``other`` (which computes something else) and a move to ``device`` compute the same."""
    images = tiny.held_out()[:32]
    expected = tiny.outputs(model, images)
    assert torch.equal(tiny.outputs(copy.deepcopy(model), images), expected)
    assert torch.equal(tiny.outputs(pickle.loads(pickle.dumps(model)), images), expected)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert not torch.equal(tiny.outputs(other, images), expected)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(tiny.outputs(other, images), expected)

    moved = model.to(device)
    assert all(t.device.type == device.type for t in moved.state_dict().values())
    torch.testing.assert_close(tiny.outputs(moved, images.to(device)).cpu(), expected, rtol=1e-3, atol=1e-2)
    assert torch.equal(tiny.outputs(moved.cpu(), images), expected)


def check_packed(model: nn.Module, path: Path, *, rest: int) -> None:
    """The packed file holds codes, their tables and ``rest`` more bytes, and decodes to the same outputs."""
    export(model, path, sample=tiny.held_out()[:2])
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    _, codes = bake_weights(model)
    packed = sum((code.code_bits + 7) // 8 for code in codes.values())
    tables = sum(t.numel() * 4 for code in codes.values() for t in code.decoder.tensors().values())
    stored = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    assert stored <= 1.02 * (packed + tables + rest) + 128
    assert stored >= packed
    torch.testing.assert_close(tiny.outputs(load(path), tiny.held_out()), tiny.outputs(model, tiny.held_out()), rtol=1e-5, atol=1e-5)


def check_untouched(network: nn.Module, before: dict[str, Tensor]) -> None:
    """The state of ``network`` is what it was."""
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())

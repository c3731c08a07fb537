"""What a network costs by arithmetic: bits to store, multiplications to compute, bit operations.

Three numbers that are never mixed up: *stored* bits (codes x bits and tables), *computed* bits (the operand widths of the
multiplications) and measured time (``latency``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.measure.macs import count_macs
from lowbit.network.bits import get_bits
from lowbit.network.insert import (
    Coded,
    activation_quantizers,
    float_bias,
    site_name,
    weight_sites,
)
from lowbit.network.record import FloatSize, record_of
from lowbit.network.surgery.switchable_norm import SwitchableNorm, resting_norms
from lowbit.network.table import LayerRecord
from lowbit.quantizers import QTensor, Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.switchable import SwitchableQuantizer

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerSize:
    """Stored bytes of one layer, or of one of its several weights: dense codes (or float weights), the tables that decode them, and the bias."""

    weight_bytes: int
    table_bytes: int
    bias_bytes: int
    float_bytes: int  # the same layer in float32

    @property
    def total_bytes(self) -> int:
        """Codes, tables and bias."""
        return self.weight_bytes + self.table_bytes + self.bias_bytes


@dataclass(frozen=True)
class ModelSize:
    """Stored bytes of a network by layer; ``other_bytes`` are parameters and buffers outside of them (norms, biases of recurrent layers)."""

    layers: dict[str, LayerSize]
    other_bytes: int
    float_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything that has to be stored."""
        return sum(layer.total_bytes for layer in self.layers.values()) + self.other_bytes


@dataclass(frozen=True)
class LayerCompute:
    """Multiply-accumulates of one layer for one sample and the widths of their operands."""

    macs: float
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> float:
        """Bit operations: ``macs x weight bits x activation bits``, float counting as 32 bits."""
        return self.macs * self.weight_bits * self.activation_bits


def qtensor_bytes(codes: QTensor) -> tuple[int, int]:
    """Bytes of the densely packed codes and of the tables that decode them.

    Codes of all parts of a sum count. Tables are float32; integer zero points take one byte each, none where all are zero.
    """
    tables = 0
    for name, table in codes.decoder.tensors().items():
        if name.rpartition(".")[2] == "zero_point":
            tables += table.numel() if bool(table.any()) else 0
        else:
            tables += table.numel() * 4
    return math.ceil(codes.code_bits / 8), tables


def model_size(model: nn.Module) -> ModelSize:
    """Stored bytes by arithmetic: codes x bits + tables + biases for quantized layers, the tensors' own bytes for all else.

    A tensor that several modules share counts once, for the first of them; where their quantizers give it different codes, each
    layer stores its own. The tables of weight quantizers count with their layer, those of activation quantizers (a scale and
    a zero point each) under ``other_bytes``. Of a network with several widths it is what the current one takes.
    """
    layers: dict[str, LayerSize] = {}
    float_network = float_size(model)
    counted: set[int] = set()
    stored: dict[int, list[QTensor | None]] = {}
    for name, (weight, bias, codes) in _stored_layers(model).items():
        weight_bytes, table_bytes = 0, 0
        if weight is not None and not any(_are_same(codes, other) for other in stored.get(id(weight), [])):
            weight_bytes, table_bytes = (_bytes(weight), 0) if codes is None else qtensor_bytes(codes)
            stored.setdefault(id(weight), []).append(codes)
        float_bytes = 0 if weight is None or name in float_network.tied else weight.numel() * 4
        bias_bytes = _bytes(bias) if bias is not None and id(bias) not in counted else 0
        layers[name] = LayerSize(weight_bytes, table_bytes, bias_bytes, float_bytes + bias_bytes)
        counted |= {id(weight), id(bias)}
    counted |= _grid_tensors(model) | _resting_tensors(model)
    rest = sum(_bytes(t) for t in _tensors(model) if id(t) not in counted)
    grids = sum(_grid_bytes(q) for q in activation_quantizers(model).values())
    return ModelSize(layers, rest + grids, float_network.total_bytes)


def float_size(model: nn.Module) -> FloatSize:
    """Size of the network in float32, with the norms of one width; for a loaded network, the size that its file records."""
    if isinstance(model, Coded) and model.float_size is not None:
        return model.float_size
    weights: dict[int, Tensor] = {}
    tied = []
    for name, weight in _float_weights(model).items():
        if id(weight) in weights:
            tied.append(name)
        weights[id(weight)] = weight
    counted = weights.keys() | _grid_tensors(model) | _resting_tensors(model)
    rest = sum(_bytes(t) for t in _tensors(model) if id(t) not in counted)
    return FloatSize(sum(weight.numel() * 4 for weight in weights.values()) + rest, tuple(tied))


def _float_weights(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, Coded):
        return {name: weight for name, (weight, _, _) in _coded_layers(model).items() if weight is not None}
    return {name: site.original for name, site in weight_sites(model).items()}


def _grid_tensors(model: nn.Module) -> set[int]:
    """The tensors of quantizers, by their ids."""
    return {id(t) for module in model.modules() if isinstance(module, Quantizer) for t in _tensors(module)}


def _resting_tensors(model: nn.Module) -> set[int]:
    """The tensors of norms of other widths than the current one that it does not share, by their ids."""
    resting = {id(t) for norm in resting_norms(model) for t in _tensors(norm)}
    return resting - {id(t) for module in model.modules() if isinstance(module, SwitchableNorm) for t in _tensors(module.current)}


def _are_same(first: QTensor | None, second: QTensor | None) -> bool:
    """Whether a file needs to store only one of two forms of a weight; ``None`` is the float one."""
    if first is None or second is None:
        return first is second
    tables, others = first.decoder.tensors(), second.decoder.tensors()
    return (
        first.bit_width == second.bit_width
        and first.decoder.kind == second.decoder.kind
        and torch.equal(first.codes, second.codes)
        and tables.keys() == others.keys()
        and all(torch.equal(table, others[name]) for name, table in tables.items())
    )


_Layer = tuple[Tensor | None, Tensor | None, QTensor | None]


def _stored_layers(model: nn.Module) -> dict[str, _Layer]:
    """Weight, bias and codes of each layer; no weight where a loaded network keeps it under the name of an equal one."""
    if isinstance(model, Coded):
        return _coded_layers(model)
    found: dict[str, _Layer] = {}
    for name, site in weight_sites(model).items():
        weight, quantizer = site.original, site.quantizer
        bias = None if site.is_weight_only else float_bias(site.layer)
        found[name] = (weight, bias, None if quantizer is None or not quantizer.enabled else quantizer.encode(weight.detach()))
    return found


def _coded_layers(model: nn.Module) -> dict[str, _Layer]:
    assert isinstance(model, Coded)
    tensors, codes = dict(model.named_parameters()), model.weight_codes()
    found: dict[str, _Layer] = {}
    for name in dict.fromkeys([*_recorded(model), *map(site_name, codes)]):
        weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
        path = name if name in tensors else weight  # one of a layer's several weights goes by the name of its parameter
        found[name] = (tensors.get(path), tensors.get(bias), codes.get(path))
    return found


def _recorded(model: nn.Module) -> dict[str, LayerRecord]:
    record = record_of(model)
    return {} if record is None else {row.name: row for row in record.table}


def _grid_bytes(quantizer: Quantizer) -> int:
    quantizer = quantizer.current if isinstance(quantizer, SwitchableQuantizer) else quantizer
    return sum(_bytes(getattr(quantizer, name)) for name in quantizer.tables) if isinstance(quantizer, TableQuantizer) else 0


def _tensors(module: nn.Module | None) -> list[Tensor]:
    """Parameters and buffers that ``state_dict`` would save, each once."""
    if module is None:
        return []
    return list({id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def compute_cost(model: nn.Module, sample: object) -> dict[str, LayerCompute]:
    """Multiply-accumulates and operand widths of each layer for one sample; a float operand counts 32 bits."""
    bits = layer_bits(model)
    return {
        name: LayerCompute(macs, *(FLOAT_BITS if width is None else width for width in bits[name]))
        for name, macs in count_macs(model, sample).items()
    }


def layer_bits(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """Weight bits and input activation bits of each layer; ``None`` means float.

    Those of a loaded network are what its file recorded.
    """
    rows = _recorded(model)
    if isinstance(model, Coded):
        held = {name: None if codes is None else codes.bit_width for name, (_, _, codes) in _coded_layers(model).items()}
        return {name: (rows[name].weight_bits, rows[name].activation_bits) if name in rows else (bits, None) for name, bits in held.items()}
    return {name: (bits.weight, bits.activation) for name, bits in get_bits(model).items()}


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a float network, shared ones once."""
    return sum(_bytes(t) for t in _tensors(model))

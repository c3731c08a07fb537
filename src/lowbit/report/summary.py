"""``lowbit.summary``: the layers of a network, their quantization and their stored bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from torch import nn

from lowbit.measure.cost import compute_cost, layer_bits, model_size
from lowbit.measure.layer_noise import LayerNoise
from lowbit.network.insert import Coded, site_name, weight_sites
from lowbit.network.layers import layer_kind
from lowbit.network.record import record_of
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.quantizers.qtensor import AffineDecoder, Decoder
from lowbit.report.formatting import format_bits, format_bytes, format_db
from lowbit.report.results import LayerResult

WIDTH = 160  # characters of a printed table where there is no terminal


@dataclass(frozen=True)
class Summary:
    """A network layer by layer; printable as it is, and by rich as a table.

    Attributes:
        model: Class of the network.
        method: Method that quantized it; empty for a float network.
        layers: Layers in execution order if a quantization recorded it, else in definition order.
        stored_bytes, float_bytes: Computed size of packed codes, tables, biases and everything else; the same network in float32.
        other_bytes: The part of ``stored_bytes`` outside the layers (norms, embeddings, activation grids).
        notes: Remarks about the whole network.
        others: What holds parameters besides the layers (norms, single parameters), and why it stays in float.
    """

    model: str
    method: str
    layers: tuple[LayerResult, ...]
    stored_bytes: int
    float_bytes: int
    other_bytes: int
    notes: tuple[str, ...] = ()
    others: tuple[LayerResult, ...] = ()

    def __rich__(self) -> RichTable:
        title = f"{self.model}, {self.method}" if self.method else self.model
        ratio = f" ({self.float_bytes / self.stored_bytes:.1f}x smaller)" if 0 < self.stored_bytes < self.float_bytes else ""
        caption = f"stored {format_bytes(self.stored_bytes)}, in float32 {format_bytes(self.float_bytes)}{ratio}"
        lines = [caption, f"outside the layers {format_bytes(self.other_bytes)}", *self.notes]
        table = RichTable(title=Text(title), title_justify="left", caption=Text("\n".join(lines)), caption_justify="left")
        has_noise = any(layer.sqnr_db is not None for layer in self.layers)
        has_outputs = any(layer.output_bits is not None for layer in self.layers)
        bits = ("W bits", "A bits", *(["out bits"] if has_outputs else []))
        for column in ("layer", "kind", "weight", *bits, "quantizer", "size", *(["SQNR"] if has_noise else []), "status"):
            table.add_column(column, justify="right" if column in (*bits, "size", "SQNR") else "left", overflow="fold")
        for layer in (*self.layers, *self.others):
            cells = [
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                format_bits(layer.weight_bits),
                format_bits(layer.activation_bits),
                *([format_bits(layer.output_bits)] if has_outputs else []),
            ]
            cells += [", ".join(filter(None, (layer.quantizer, layer.granularity.replace("_", " ")))), format_bytes(layer.stored_bytes)]
            cells += [format_db(layer.sqnr_db)] if has_noise else []
            cells.append(f"{layer.status}: {layer.reason}" if layer.reason else layer.status)
            table.add_row(*map(Text, cells))
        return table

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre style='white-space:pre;font-family:monospace'>{code}</pre>")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, force_jupyter=False)
        console.print(self)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def summary(model: nn.Module, *, sample: object = None, noise: Mapping[str, LayerNoise] | None = None) -> Summary:
    """Describe a network: float, quantized, or loaded from a ``.lowbit`` file.

    Args:
        model: The network; it is not changed.
        sample: Inputs of one call; if given, each layer's multiply-accumulates and bit operations are counted.
        noise: Noise of each layer, as returned by ``measure.layer_noise``.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> found = lowbit.summary(model)
        >>> found.stored_bytes, [layer.shape for layer in found.layers]
        (848, [(16, 8), (4, 16)])
    """
    record = record_of(model)
    size = model_size(model)
    return Summary(
        type(model).__name__,
        "" if record is None else record.method,
        tuple(layer_results(model, sample=sample, noise=noise)),
        size.total_bytes,
        size.float_bytes,
        size.other_bytes,
        () if record is None else tuple(record.table.notes),
        () if record is None else tuple(other_results(model)),
    )


def other_results(model: nn.Module) -> list[LayerResult]:
    """One ``LayerResult`` for everything else that holds parameters, as the record of ``model`` lists it."""
    record = record_of(model)
    tensors = dict(model.named_parameters())
    found = []
    for row in [] if record is None else record.table.others:
        held = [tensor for name, tensor in tensors.items() if name == row.name or name.rpartition(".")[0] == row.name]
        size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        shape = tuple(held[0].shape) if len(held) == 1 else ()
        found.append(
            LayerResult(
                row.name, row.kind, None, None, status=row.status, reason=row.reason, shape=shape, stored_bytes=size, float_bytes=size
            )
        )
    return found


def layer_results(model: nn.Module, *, sample: object = None, noise: Mapping[str, LayerNoise] | None = None) -> list[LayerResult]:
    """One ``LayerResult`` for each convolution, linear layer and embedding, and for each weight of other layers; see ``summary`` for the arguments."""
    if isinstance(model, Coded):
        return _coded_results(model)
    record, sites = record_of(model), weight_sites(model)
    recorded = {} if record is None else {row.name: row for row in record.table if row.name in sites}
    bits, size = layer_bits(model), model_size(model)
    cost = {} if sample is None else compute_cost(model, sample)
    results = []
    for name in [*recorded, *(name for name in sites if name not in recorded)]:
        quantizer = sites[name].quantizer
        weight_bits, activation_bits = bits[name]
        lost = (noise or {}).get(name)
        row = recorded.get(name)
        results.append(
            LayerResult(
                name,
                layer_kind(sites[name].layer),
                weight_bits,
                activation_bits,
                sqnr_db=None if lost is None else lost.output_sqnr_db,
                status="skipped" if quantizer is None else "done",
                reason=row.reason if row is not None else "not quantized" if quantizer is None else "",
                weight_sqnr_db=None if lost is None else lost.weight_sqnr_db,
                shape=tuple(sites[name].original.shape),
                quantizer="" if quantizer is None else quantizer_word(quantizer),
                granularity="" if quantizer is None else str(quantizer.granularity),
                stored_bytes=size.layers[name].total_bytes,
                float_bytes=size.layers[name].float_bytes,
                macs=cost[name].macs if name in cost else None,
                bops=cost[name].bops if name in cost else None,
                output_bits=None if row is None else row.output_bits,
            )
        )
    return results


def _coded_results(model: nn.Module) -> list[LayerResult]:
    """The layers of a loaded network, as its file records them."""
    assert isinstance(model, Coded)
    record, bits, size = record_of(model), layer_bits(model), model_size(model)
    rows = {} if record is None else {row.name: row for row in record.table}
    codes = {site_name(name): code for name, code in model.weight_codes().items()}
    results = []
    for name, (weight_bits, activation_bits) in bits.items():
        row, code = rows.get(name), codes.get(name)
        results.append(
            LayerResult(
                name,
                "" if row is None else row.kind,
                weight_bits,
                activation_bits,
                status="done" if row is None else row.status,
                reason="the file does not record the activation bits" if row is None else row.reason,
                shape=() if code is None else tuple(code.shape),
                quantizer="" if code is None else decoder_word(code.decoder),
                granularity="" if code is None else str(code.decoder.granularity),
                stored_bytes=size.layers[name].total_bytes,
                float_bytes=size.layers[name].float_bytes,
                output_bits=None if row is None else row.output_bits,
            )
        )
    return results


def decoder_word(decoder: Decoder) -> str:
    """``quantizer_word`` for codes alone: evenly spaced levels are called symmetric where every zero point is 0."""
    if isinstance(decoder, AffineDecoder):
        return f"uniform {'affine' if bool(decoder.zero_point.any()) else 'symmetric'}"
    return decoder.kind.replace("_", " ")


def quantizer_word(quantizer: Quantizer) -> str:
    """``uniform symmetric``, ``uniform affine``, ``codebook``, ``binary``, ..."""
    word = type(quantizer).__name__.removesuffix("Quantizer")
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in word).strip()
    if isinstance(quantizer, UniformQuantizer):
        return f"{spaced} {'symmetric' if quantizer.symmetric else 'affine'}"
    return spaced

"""What was done to a network, carried by the network itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lowbit.network.table import LayerTable
from lowbit.spec import BitPolicy, LayerBits

_ATTRIBUTE = "lowbit_record"


@dataclass(frozen=True)
class QuantizationRecord:
    """Method, options, policy, seed and the table of layers of one quantization, and the widths between which the network switches.

    Attributes:
        switches: From the highest on; empty where the network was trained for one width.
        measured: What a method measured of layers in training, by the name of the measure and the layer's.
        switching: Whether the ``network`` switches as a whole, or each ``layer``.
        tied: Layers whose bits always are those of another one, and which that is.
    """

    method: str
    options: Mapping[str, object]
    policy: BitPolicy
    seed: int
    table: LayerTable
    switches: tuple[LayerBits, ...] = ()
    switching: Literal["network", "layer"] = "network"
    tied: Mapping[str, str] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class FloatSize:
    """What a network takes in float32.

    Attributes:
        total_bytes: Its parameters and buffers, tensors that several modules share once.
        tied: The weights, by the names of their sites, that are the same tensor as an earlier one.
    """

    total_bytes: int
    tied: tuple[str, ...] = ()


def attach_record(model: nn.Module, record: QuantizationRecord) -> None:
    """Let ``model`` carry ``record`` (copies and pickles keep it)."""
    setattr(model, _ATTRIBUTE, record)


def record_of(model: nn.Module) -> QuantizationRecord | None:
    """The record that ``model`` carries, or ``None``."""
    return getattr(model, _ATTRIBUTE, None)

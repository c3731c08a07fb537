"""Time of layers by models of hardware for few bits, where there is none to measure on.

Each counts the cycles of one unit that always has work; memory and control are left out. An array of ``n`` units takes an ``n``-th, so that
times of layers and widths relate to each other as they would there, and shares of a budget are the same. Hardware of this kind has no floats:
a float operand counts as one of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product

from lowbit.errors import SpecError, unknown_name
from lowbit.measure.cost import FLOAT_BITS
from lowbit.measure.latency_table import LatencyTable
from lowbit.spec import LayerBits, switch_name

_WIDTHS = (*range(1, 9), None)
ALL_WIDTHS = tuple(LayerBits(weight, activation) for weight, activation in product(_WIDTHS, _WIDTHS))
BRICK, UNIT = 2, 8  # bits of an operand of a BitBrick and of a Fusion Unit
BRICKS = (UNIT // BRICK) ** 2  # in a Fusion Unit


def bit_serial(macs: float, weight_bits: int, activation_bits: int) -> float:
    """Cycles of a bit-serial unit: ``macs * weight_bits * activation_bits``, one product of two bits in each.

    Source: Umuroglu et al. 2018, "BISMO: A Scalable Bit-Serial Matrix Multiplication Overlay for Reconfigurable Computing", section II: a product
    of matrices of ``w`` and ``a`` bits is a sum of ``w * a`` products of matrices of bits.

    >>> bit_serial(100, 4, 2)
    800.0
    """
    _check(macs, weight_bits, activation_bits)
    return float(macs * weight_bits * activation_bits)


def bit_fusion(macs: float, weight_bits: int, activation_bits: int) -> float:
    """Cycles of a Fusion Unit: ``macs * (w / 2) * (a / 2) / 16`` with ``w`` and ``a`` the operands' bits, filled up to 2, 4 or 8.

    Its 16 BitBricks multiply 2 by 2 bits each, and ``(w / 2) * (a / 2)`` of them make one product: 1 product in a cycle at 8 x 8 bits, 4 at 4 x 4 and
    at 8 x 2, 16 at 2 x 2 and below. Wider operands are filled up to a multiple of 8 and take several cycles.

    Source: Sharma et al. 2018, "Bit Fusion: Bit-Level Dynamically Composable Architecture for Accelerating Deep Neural Networks", section III.

    >>> bit_fusion(64, 8, 8), bit_fusion(64, 3, 4), bit_fusion(64, 1, 1)
    (64.0, 16.0, 4.0)
    """
    _check(macs, weight_bits, activation_bits)
    return float(macs * (_filled(weight_bits) // BRICK) * (_filled(activation_bits) // BRICK) / BRICKS)


MODELS: dict[str, Callable[[float, int, int], float]] = {"bit_serial": bit_serial, "bit_fusion": bit_fusion}


def analytic_table(name: str, macs: Mapping[str, float], widths: Iterable[LayerBits] = ALL_WIDTHS) -> LatencyTable:
    """The table of a model of hardware.

    Args:
        name: ``bit_serial`` or ``bit_fusion``.
        macs: Multiply-accumulates of each layer, such as ``count_macs`` gives.
        widths: Pairs of widths that it is to have for every layer; default: all.

    Raises:
        UnknownNameError: There is no such model.

    >>> analytic_table("bit_serial", {"fc": 10}, [LayerBits(2, 3), LayerBits(1, None)]).times
    {'fc': {'2/3': 60.0, '1/float': 320.0}}
    """
    if name not in MODELS:
        raise unknown_name("model of hardware", name, MODELS)
    cycles, pairs = MODELS[name], list(widths)
    return LatencyTable(
        "cycles",
        {
            layer: {switch_name(bits): cycles(count, bits.weight or FLOAT_BITS, bits.activation or FLOAT_BITS) for bits in pairs}
            for layer, count in macs.items()
        },
        facts={"model": name},
    )


def _filled(bits: int) -> int:
    """Bits that an operand takes."""
    return next((width for width in (2, 4, 8) if bits <= width), -(-bits // UNIT) * UNIT)


def _check(macs: float, weight_bits: int, activation_bits: int) -> None:
    if not (0 <= macs < float("inf") and weight_bits >= 1 and activation_bits >= 1):
        raise SpecError(
            f"cycles need macs from 0 and operands of at least 1 bit, got {macs} macs, {weight_bits} and {activation_bits} bits"
        )

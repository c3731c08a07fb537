"""Which bit-widths a picture shows."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.registry import MethodInfo

SHOWN_BITS = (1, 2, 4)


def shown_bits(supported: range) -> list[int]:
    """1, 2 and 4 bits, or those of ``supported`` that are nearest to them.

    >>> shown_bits(range(2, 9)), shown_bits(range(1, 2))
    ([2, 4], [1])
    """
    return sorted({min(supported, key=lambda bits: (abs(bits - wanted), bits)) for wanted in SHOWN_BITS})


def named_bits(bits: int) -> str:
    """``1 bit``, ``2 bits``."""
    return f"{bits} bit{'s' * (bits > 1)}"


def unsupported(info: MethodInfo) -> Iterator[str]:
    """A sentence for each operand about the widths of ``SHOWN_BITS`` that the method does not have."""
    for operand, bits in (("weights", info.weight_bits), ("activations", info.activation_bits)):
        if bits is None:
            yield f"Leaves {operand} in float."
        elif missing := [str(wanted) for wanted in SHOWN_BITS if wanted not in bits]:
            yield f"Has no {operand} of {' or '.join(missing)} bit{'s' * (missing != ['1'])}."

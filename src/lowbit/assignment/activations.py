"""Quantizers of what the searched layers read, where the search chooses those widths too."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.assignment.problem import SearchProblem
from lowbit.measure.sensitivity import input_quantizers
from lowbit.quantizers import Quantizer
from lowbit.spec import LayerBits

InputOf = Callable[[str, LayerBits], Quantizer | None]


def searched_inputs(problem: SearchProblem) -> InputOf:
    """The function that gives a layer's input quantizer at these bits; ``None`` where its choices have one activation width.

    With one width, what it costs the network is the same whatever bits the weights get. Ranges are those of all batches in the float
    network. A quantizer has the width it was last asked for.
    """
    several = [name for name, widths in problem.choices.items() if len({bits.activation for bits in widths}) > 1]
    quantizers = input_quantizers(problem.model, several, problem.batches, problem.task.predict) if several else {}

    def at(name: str, bits: LayerBits) -> Quantizer | None:
        quantizer = quantizers.get(name)
        if quantizer is not None:
            quantizer.set_bit_width(bits.activation)
        return quantizer

    return at

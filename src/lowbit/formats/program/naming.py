"""Assigns the inputs of a call to the input names of a graph."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import DataError
from lowbit.inputs import Inputs


def name_inputs(names: list[str], inputs: Inputs) -> dict[str, Tensor]:
    """Map the input names of a file to the inputs of a call: keyword inputs by name, the others in order.

    Raises:
        DataError: The number or the names of the inputs do not match.
    """
    named = {name: tensor for name, tensor in inputs.kwargs.items() if name in names}
    rest = [name for name in names if name not in named]
    if len(named) != len(inputs.kwargs) or len(rest) != len(inputs.args):
        given = [*(f"input {index}" for index in range(len(inputs.args))), *inputs.kwargs]
        raise DataError(f"the file expects the inputs {', '.join(names) or 'none'}; got {', '.join(given) or 'none'}")
    return named | dict(zip(rest, inputs.args, strict=True))

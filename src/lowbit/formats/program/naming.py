"""Inputs of a call by the names that a graph gives them."""

from __future__ import annotations

from torch import Tensor

from lowbit.errors import DataError
from lowbit.inputs import Inputs


def name_inputs(names: list[str], inputs: Inputs) -> dict[str, Tensor]:
    """Inputs by the names that a file gives them: keyword inputs by their own, the others in order.

    Raises:
        DataError: Their number or names do not fit.
    """
    named = {name: tensor for name, tensor in inputs.kwargs.items() if name in names}
    rest = [name for name in names if name not in named]
    if len(named) != len(inputs.kwargs) or len(rest) != len(inputs.args):
        given = [*(f"input {index}" for index in range(len(inputs.args))), *inputs.kwargs]
        raise DataError(f"the file takes {', '.join(names) or 'no input'}; given were {', '.join(given) or 'none'}")
    return named | dict(zip(rest, inputs.args, strict=True))

"""The picture of a method, by its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lowbit.pages.rounded import rounded_picture
from lowbit.pages.searched import searched_picture
from lowbit.pages.synthesized import synthesized_picture
from lowbit.pages.trained import trained_picture
from lowbit.plotting import Picture
from lowbit.registry import Kind, MethodInfo, find_method

_MAKERS: Mapping[Kind, Callable[[MethodInfo], Picture]] = {
    "training": trained_picture,
    "post_training": rounded_picture,
    "search": searched_picture,
    "synthesis": synthesized_picture,
}


def method_picture(method: object, kind: Kind | None = None) -> Picture:
    """What a method does, drawn from its own quantizers, searches or samples on the embedded networks; takes some seconds.

    Args:
        method: The name of a method, ``path/to/file.py:Class``, a class, or an object of one.
        kind: Which one, where methods of several kinds have this name.

    Raises:
        UnknownNameError: No such method.
        MissingExtraError: scikit-learn, which brings the data, is not installed.
    """
    info = find_method(method, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _MAKERS[info.kind](info)

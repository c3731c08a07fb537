"""Results as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def to_json(data: object, *, ascii_only: bool = False) -> str:
    """Strict JSON: NaN and infinities become ``null``; objects that JSON does not know become their text."""
    return json.dumps(_plain(data), allow_nan=False, ensure_ascii=ascii_only, indent=2)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)

"""What the options of a command ask for: bits of each layer, hyper-parameters of the method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowbit.cli.options import key_values
from lowbit.errors import SpecError
from lowbit.options import build_method
from lowbit.registry import Kind, find_method
from lowbit.spec import BitPolicy, LayerBits, parse_bits

DEFAULT_BITS = LayerBits(8, 8)


def make_policy(
    path: Path | None,
    weight_bits: str | None,
    activation_bits: str | None,
    *,
    first_last: str | None = None,
    keep: list[str] | None = None,
    only: list[str] | None = None,
    default: LayerBits = DEFAULT_BITS,
) -> BitPolicy:
    """The bit policy that the options describe; ``None`` is an option that was not given, ``default`` the bits then.

    Raises:
        SpecError: Bits out of range, or a policy file together with options that it replaces.
    """
    if path is not None:
        given = {
            "--weight-bits": weight_bits,
            "--activation-bits": activation_bits,
            "--first-last-bits": first_last,
            "--only": only or None,
        }
        clashing = [name for name, value in given.items() if value is not None]
        if clashing:
            raise SpecError(f"--policy {path} says the bits of every layer; leave out {', '.join(clashing)}, or change the file.")
        policy = BitPolicy.from_yaml(path)
    else:
        weight = default.weight if weight_bits is None else parse_bits(weight_bits, "--weight-bits")
        activation = default.activation if activation_bits is None else parse_bits(activation_bits, "--activation-bits")
        if only:
            policy = BitPolicy.uniform(None, None, first_last=None)
            for pattern in only:
                policy = policy.with_rule(match=pattern, weight=weight or "float", activation=activation or "float")
        else:
            ends = None if first_last == "same" else 8 if first_last is None else parse_bits(first_last, "--first-last-bits")
            policy = BitPolicy.uniform(weight, activation, first_last=ends)
    for pattern in keep or []:
        policy = policy.keep_float(pattern)
    return policy


def make_settings(method: str, shortcuts: Mapping[str, object], pairs: list[str] | None, kind: Kind = "post_training") -> dict[str, object]:
    """Hyper-parameters of ``method`` from options of their own (``None``: not given) and from ``--option`` pairs.

    Raises:
        UnknownNameError: No such method, or the method has no such hyper-parameter (names the methods that do).
        SpecError: A value of the wrong type, or a name given twice.
    """
    settings: dict[str, object] = {name: value for name, value in shortcuts.items() if value is not None}
    for name, value in key_values(pairs or [], "--option").items():
        if name in settings:
            raise SpecError(f"--option {name}={value}: {name} was given as an option of its own too, with {settings[name]!r}")
        settings[name] = value
    build_method(find_method(method, kind), settings)  # unknown names and wrong types fail here, before anything is loaded
    return settings

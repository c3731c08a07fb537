"""Orderings that are claimed, for example in papers: one method better than another."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from lowbit.errors import SpecError
from lowbit.reading import entries_of, line_of

_FORM = re.compile(r"(?P<better>.+?)\s+>=?\s+(?P<worse>.+?)\s+at\s+(?P<bits>\S+)")


@dataclass(frozen=True)
class Ordering:
    """One method better than another at some bits.

    Attributes:
        claim: ``lsq > dorefa at 2/2``; with ``>=`` no difference agrees with it too.
        source: Where it is published.
        note: What is to be known about the finding here, for example what was tried.

    Example:
        >>> ordering = Ordering("ewgs > ewgs (ste) at 2/2")
        >>> ordering.better, ordering.worse, ordering.bits, ordering.is_strict
        ('ewgs', 'ewgs (ste)', '2/2', True)
    """

    claim: str
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        self._part("better")

    @property
    def better(self) -> str:
        """Label of the method that is claimed to be better."""
        return self._part("better")

    @property
    def worse(self) -> str:
        """Label of the other one."""
        return self._part("worse")

    @property
    def bits(self) -> str:
        """Bits of weights and activations."""
        return self._part("bits")

    @property
    def is_strict(self) -> bool:
        """Whether it says better, and not better or equal."""
        return " >= " not in self.claim

    def _part(self, name: str) -> str:
        found = _FORM.fullmatch(self.claim.strip())
        if found is None:
            raise SpecError(f"{self.claim!r} is no claim. Write METHOD > METHOD at BITS, for example lsq > dorefa at 2/2.")
        return found[name]

    @staticmethod
    def parse(value: object, where: str = "") -> Ordering:
        """An ordering from its claim or from a mapping of its fields.

        Raises:
            SpecError: It is no claim.
            UnknownNameError: A field that orderings do not have.
        """
        if isinstance(value, Ordering):
            return value
        given = {"claim": value} if isinstance(value, str) else entries_of(value, "claim", [f.name for f in fields(Ordering)], where)
        try:
            return Ordering(**given)
        except SpecError as error:
            raise SpecError(f"{where}{line_of(value, 'claim')}: {error}") from None

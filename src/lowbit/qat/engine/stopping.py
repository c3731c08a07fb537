"""When a run saves its state, and how it is stopped from outside."""

from __future__ import annotations

import re
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

from lowbit.errors import SpecError


class Terminated(SystemExit):
    """The run was asked to end (SIGTERM), has saved its state, and leaves with exit code 143.

    Attributes:
        message: What has happened, for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class SaveEvery:
    """Interval between saves of the state within an epoch, in seconds or in steps."""

    seconds: float | None = None
    steps: int | None = None

    @staticmethod
    def parse(text: str | float) -> SaveEvery:
        """``300s``, ``10m``, ``2h``, or a number of steps such as ``500``.

        Raises:
            SpecError: Anything else.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
        if found is None or float(found[1]) <= 0 or (not found[2] and not float(found[1]).is_integer()):
            raise SpecError(f"save_every: {text!r}, expected a time such as 300s, 10m or 2h, or a number of steps such as 500")
        if found[2]:
            return SaveEvery(seconds=float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])
        return SaveEvery(steps=int(float(found[1])))


class StopSignals:
    """Within the context SIGTERM and Ctrl-C are noted, so that a step is finished before the run leaves; a second Ctrl-C is not.

    Attributes:
        number: The signal that came.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

"""The command line: parse, call the public function, print."""

from __future__ import annotations

from lowbit.cli.app import app, main

__all__ = ["app", "main"]

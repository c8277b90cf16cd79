"""What is asked of stored measurements, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MET, MISSED, NOT_MEASURED, NOT_REACHABLE = "met", "missed", "not yet measured", "not reachable here"

Results = dict[str, Any]  # one device's file


@dataclass(frozen=True)
class Verdict:
    """What became of a bar: its state, the number and what else a reader should know."""

    state: str
    measured: str = ""
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """``what`` has to reach ``required``; ``check`` tells from one device's results whether it does."""

    what: str
    required: str
    check: Callable[[Results], Verdict]

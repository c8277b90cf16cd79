"""What a mutant is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    kind: str
    what: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}"

"""Files that are complete at every moment."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """`text` to `path` through a temporary file beside it."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)

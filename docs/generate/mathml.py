"""A ```math fence as MathML, which browsers draw by themselves: no script to fetch."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def block(source: str, language: str, css_class: str, options: dict, md: Any, **_: Any) -> str:
    """One formula a line."""
    lines = [line for line in source.strip().splitlines() if line.strip()]
    return "".join(f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in lines)

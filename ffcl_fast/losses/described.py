"""What ``repr`` shows of a loss."""

from __future__ import annotations

from torch import nn

# Shown where they are not this.
_USUAL = {"decoupled": False, "distributed": None, "backend": "auto"}


def described(module: nn.Module, *options: str) -> str:
    """``option=value`` of ``options``, and of what all losses have in common where it is not as usual."""
    unusual = (name for name, usual in _USUAL.items() if getattr(module, name, usual) != usual)
    values = ((name, getattr(module, name)) for name in (*options, *unusual))
    return ", ".join(f"{name}={value!r}" if isinstance(value, str) else f"{name}={value}" for name, value in values)

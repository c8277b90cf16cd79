"""Fused contrastive and Forward-Forward losses that never materialise the similarity matrix."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import distributed, functional, nn
    from .cached import cached_step
    from .losses import (
        ClipLoss,
        GoodnessLoss,
        InfoNCELoss,
        LayerwiseLoss,
        NTXentLoss,
        PairCosineLoss,
        Queue,
        SigLipLoss,
        SupConLoss,
    )

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "GoodnessLoss",
    "InfoNCELoss",
    "LayerwiseLoss",
    "NTXentLoss",
    "PairCosineLoss",
    "Queue",
    "SigLipLoss",
    "SupConLoss",
    "cached_step",
    "distributed",
    "functional",
    "nn",
]

_SUBMODULES = ("distributed", "functional", "losses", "nn")


def __getattr__(name: str):
    # on first use, so that `ffcl --help` does not wait for torch
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name in __all__:
        home = ".cached" if name == "cached_step" else ".losses"
        value = globals()[name] = getattr(import_module(home, __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

"""CPU tensors: the C++ kernels of csrc/, and plain PyTorch over row panels where they were not built."""

from __future__ import annotations

from torch import Tensor

from .. import native
from .contrast import contrast_backward, contrast_forward, contrast_state_size
from .goodness import (
    goodness_backward,
    goodness_forward,
    goodness_many,
    goodness_many_backward,
    linear_goodness,
    pair_cosine_backward,
    pair_cosine_forward,
    pool_goodness_backward,
    pool_goodness_forward,
    scale_,
)
from .similarity import cache_size, siglip, similarity_backward, similarity_forward

__all__ = [
    "cache_size",
    "contrast_backward",
    "contrast_forward",
    "contrast_state_size",
    "goodness_backward",
    "goodness_forward",
    "goodness_many",
    "goodness_many_backward",
    "linear_goodness",
    "pair_cosine_backward",
    "pair_cosine_forward",
    "pool_goodness_backward",
    "pool_goodness_forward",
    "scale_",
    "siglip",
    "similarity_backward",
    "similarity_forward",
]

_COMPILED = ("contrast_forward", "contrast_backward")  # without a path in plain PyTorch here


def unavailable(op: str, x: Tensor) -> str | None:
    """Why ``op`` cannot run for tensors like ``x``, or None."""
    if x.device.type != "cpu":
        return "it takes CPU tensors only"
    if op in _COMPILED and not native.usable(x):
        return native.problem or f"the compiled kernels take no {x.dtype}"
    return None if op in globals() else "the CPU backend has no such operator"

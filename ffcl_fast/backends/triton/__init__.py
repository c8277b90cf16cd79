"""Triton kernels: NVIDIA sm_80 and later, AMD gfx942 and later, and the CPU through Triton's interpreter.

``TRITON_INTERPRET=1``, set before triton is imported, runs every kernel on CPU tensors: slow, for checking.
"""

from __future__ import annotations

import functools
import os
import shutil

import torch
from torch import Tensor

from ..panels_similarity import cache_size  # noqa: F401  part of a backend

try:
    import triton  # noqa: F401
except ImportError as error:  # a machine without it uses the other backends
    _MISSING: str | None = f"triton cannot be imported: {error}"
else:
    _MISSING = None

if _MISSING is None:
    from .class_positives import add_class_positives, class_odds, class_sums  # noqa: F401
    from .config import MAX_WIDTH
    from .goodness import goodness_backward, goodness_forward  # noqa: F401
    from .goodness_many import goodness_many, goodness_many_backward  # noqa: F401
    from .linear_goodness import linear_goodness  # noqa: F401
    from .normalize import normalize_backward, normalize_forward  # noqa: F401
    from .pair_cosine import pair_cosine_backward, pair_cosine_forward, scale_  # noqa: F401
    from .pool_goodness import pool_goodness_backward, pool_goodness_forward  # noqa: F401
    from .positives import add_positives_, positive_odds  # noqa: F401
    from .siglip import siglip  # noqa: F401
    from .similarity_backward import similarity_backward  # noqa: F401
    from .similarity_forward import similarity_forward  # noqa: F401

MAX_ELEMENTS = 2**31 - 1  # of a sample: places in a row are 32-bit numbers
_SIMILARITY = ("similarity_forward", "similarity_backward", "siglip", "positive_odds", "add_positives_", "class_sums",
               "class_odds", "add_class_positives")


def unavailable(op: str, x: Tensor) -> str | None:
    """Why operator `op` cannot run for tensors like `x`, or None."""
    if _MISSING is not None:
        return _MISSING
    if op not in globals():
        return "not written as a Triton kernel"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "its kernels take float32, float16 and bfloat16"
    if op not in _SIMILARITY and x.shape[1:].numel() > MAX_ELEMENTS:
        return f"a sample may have at most {MAX_ELEMENTS} elements, these have {x.shape[1:].numel()}"
    if x.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported"
    elif x.device.type != "cuda":
        return "its kernels run on CUDA and ROCm devices"
    elif not _new_enough(x.device):
        return "its kernels need compute capability 8.0 or later"
    if op in _SIMILARITY and x.shape[1] > MAX_WIDTH:
        return f"embeddings may be at most {MAX_WIDTH} wide, these are {x.shape[1]}"
    return None


def doubtful(x: Tensor) -> str | None:
    """Why a launch would probably fail although :func:`unavailable` finds nothing, or None."""
    return _without_compiler() if x.is_cuda else None


@functools.cache
def _without_compiler() -> str | None:
    found = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    return None if found else "Triton compiles what launches its kernels, and there is no C compiler (CC, gcc, clang)"


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)

"""The choice of a backend: the one place that decides which implementation runs, and why.

A backend is a module that has functions named as the operators in :mod:`ffcl_fast.ops` (same arguments, without
``backend``), a ``cache_size(q, k)`` and an ``unavailable(op, tensor)`` that returns why it cannot run, or None.
Adding one is its file and a line in ``BACKENDS``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

_log = logging.getLogger("ffcl_fast.backends")

# name a user types -> module that implements it
BACKENDS = {
    "cpu": "ffcl_fast.backends.cpu",  # C++ kernels; `panels` where they were not built
    "triton": "ffcl_fast.backends.triton",
    "cuda": "ffcl_fast.backends.cuda",
    "panels": "ffcl_fast.backends.panels",  # plain PyTorch over row panels, any device, bounded memory
    "reference": "ffcl_fast.reference",
}
NAMES = ("auto", *BACKENDS)


def get(backend: str, op: str, x: Tensor) -> ModuleType:
    """The module that runs operator ``op`` for tensors like ``x``.

    Raises ValueError for an unknown name and RuntimeError where a backend named by the caller cannot run ``op``.
    """
    name = backend
    if backend == "auto":
        name, reason = choose(op, x.device.type, x.dtype)
        _log.debug("%s on %s %s: %s (%s)", op, x.device.type, x.dtype, name, reason)
    module = load(name)
    problem = module.unavailable(op, x)
    if problem:
        raise RuntimeError(f"backend={backend!r} cannot run {op} on {x.device.type} {x.dtype}: {problem}")
    return module


def choose(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """``(backend, reason)`` that ``"auto"`` stands for."""
    if dtype == torch.float64:
        return "reference", "float64 is for checking"
    if device == "cpu":
        return "cpu", "CPU tensors"
    return "panels", "no stored GPU measurement confirms a kernel for this device yet"


@functools.cache
def load(name: str) -> ModuleType:
    """Import the backend called ``name``."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return importlib.import_module(BACKENDS[name])

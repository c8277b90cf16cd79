"""The choice of a backend: the one place that decides which implementation runs, and why.

A backend is a module that has functions named as the operators in :mod:`ffcl_fast.ops` (same arguments, without
``backend``), a ``cache_size(q, k)``, an ``unavailable(op, tensor)`` that returns why it cannot run, or None, and maybe
a ``doubtful(tensor)``: why ``"auto"`` had better not take it, or None. The backends for GPUs leave each other's
backward pass the same cache.
Adding one is its file and a line in ``BACKENDS``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

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
FALLBACK = "panels"  # what "auto" takes where its choice cannot run


@dataclass(frozen=True)
class Confirmed:
    """Kernels that a stored measurement shows to be right and fast: what ``"auto"`` may choose on a GPU."""

    backend: str
    ops: tuple[str, ...]
    capability: tuple[int, int]  # the compute capability of the GPU that was measured
    dtypes: tuple[torch.dtype, ...]
    widest: int  # largest size of a row, the last dimension, that the tests on that GPU found right
    evidence: str  # where the measurement is stored
    narrowest: int = 0  # smallest size of a row for which they are the fastest, as called
    fewest: int = 0  # smallest number of rows, and of columns of S, for which they are
    by_ids: bool = True  # also where pairs are left out by id
    alone: bool = True  # also where k is q


class Pairs(NamedTuple):
    """What the choice of a similarity operator's backend looks at beside one tensor."""

    by_ids: bool = False  # pairs are left out by id
    cols: int = 0  # of S
    alone: bool = False  # k is q


_UNKNOWN = Pairs()

_H200 = "benchmarks/results/gpu-nvidia-h200.json"
_HALVES = (torch.bfloat16, torch.float16)
# One row for each family of kernels that a GPU's tests and times have confirmed; the first that fits and runs is taken.
# Timed was bfloat16; float16, right there too, runs like instructions. float32, longer rows and the pooling, grouped
# and scoring kernels are right on that GPU as well, but nobody has timed them or their like yet.
CONFIRMED: tuple[Confirmed, ...] = (
    # Its tiles are for embeddings whose products take longer than their exponentials (slower at 128, twice as fast at
    # 200), and all of them are masked where pairs are left out by id.
    Confirmed("cuda", ("similarity_forward",), (9, 0), _HALVES, 4096, _H200, 200, 8192, by_ids=False),
    # By a twentieth. At 8192 rows it was slower, for small operations before the first panel: now two kernels.
    Confirmed("cuda", ("similarity_backward",), (9, 0), _HALVES, 512, _H200, 512, 65536, by_ids=False, alone=False),
    *(Confirmed("triton", ops, (9, 0), _HALVES, widest, _H200) for ops, widest in (
        (("similarity_forward", "similarity_backward", "positive_odds", "add_positives_", "siglip"), 4096),
        (("class_sums", "class_odds", "add_class_positives"), 4096),
        (("normalize_forward", "normalize_backward"), 4096),
        (("goodness_forward", "goodness_backward"), 16384),
        (("pair_cosine_forward", "pair_cosine_backward", "scale_"), 200704),
    )),
    # Slower than Triton's, many times as fast as plain PyTorch: where Triton cannot run.
    Confirmed("cuda", ("similarity_forward", "similarity_backward"), (9, 0), _HALVES, 4096, _H200),
)  # fmt: skip


def get(backend: str, op: str, x: Tensor, pairs: Pairs = _UNKNOWN) -> ModuleType:
    """The module that runs operator ``op`` for tensors like ``x``, a similarity operator for such ``pairs``.

    Raises ValueError for an unknown name and RuntimeError where a backend named by the caller cannot run ``op``.
    """
    name = backend
    if backend == "auto":
        name, reason = _auto(op, x, pairs)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s of %s on %s %s: %s (%s)", op, tuple(x.shape), x.device.type, x.dtype, name, reason)
    module = load(name)
    problem = module.unavailable(op, x)
    if problem:
        raise RuntimeError(f"backend={backend!r} cannot run {op} on {x.device.type} {x.dtype}: {problem}")
    return module


def cache_size(backend: str, q: Tensor, k: Tensor | None) -> int:
    """Elements of what similarity_forward by ``backend`` keeps; also where torch.compile does not know sizes yet."""
    if backend != "auto":
        return get(backend, "similarity_forward", q).cache_size(q, k)
    # Without a shape: whichever is taken on a GPU, it is the same.
    return load(choose("similarity_forward", q.device.type, q.dtype)[0]).cache_size(q, k)


def choose(
    op: str,
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int] = (),
    capability: tuple[int, int] | None = None,
    pairs: Pairs = _UNKNOWN,
) -> tuple[str, str]:
    """``(backend, reason)`` that ``"auto"`` stands for, from the first tensor's type of device, dtype and shape, the
    GPU's compute capability (None: unknown, or no NVIDIA GPU), and what is known of a similarity operator's pairs."""
    return next(choices(op, device, dtype, shape, capability, pairs))


def choices(
    op: str,
    device: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    capability: tuple[int, int] | None,
    pairs: Pairs,
) -> Iterator[tuple[str, str]]:
    """What :func:`choose` returns, and after it what ``"auto"`` stands for where that cannot run."""
    if dtype == torch.float64:
        yield "reference", "float64 is for checking"
    elif device == "cpu":
        yield "cpu", "CPU tensors"
    else:
        for row in CONFIRMED:
            known = op in row.ops and dtype in row.dtypes and capability == row.capability
            if not known or not shape or (pairs.by_ids and not row.by_ids) or (pairs.alone and not row.alone):
                continue
            if row.narrowest <= shape[-1] <= row.widest and (not row.fewest or row.fewest <= min(shape[0], pairs.cols)):
                yield row.backend, f"confirmed by {row.evidence}"
        yield FALLBACK, "no stored GPU measurement confirms a kernel for this device, dtype and shape yet"


def fuses(backend: str, x: Tensor) -> bool:
    """Whether ``backend`` has the contrast operators for tensors like ``x``: a loss in one call, without copies."""
    return backend in ("auto", "cpu") and native.usable(x)


def normalizes(backend: str, x: Tensor) -> bool:
    """Whether ``backend`` has a kernel that L2-normalises rows like ``x``'s: ``"auto"`` where one is confirmed."""
    if backend == "auto":
        return _confirmed("normalize_forward", x) == "triton"
    return backend == "triton"


def positives(backend: str, x: Tensor, op: str = "positive_odds") -> str | None:
    """The backend whose kernels serve the positives of rows like ``x`` beside ``backend``'s products, or None; ``op``
    is one of the operators on them.

    The CUDA C++ kernels, which have none, are joined by Triton's where Triton is installed.
    """
    if torch.compiler.is_compiling():  # torch.compile fuses what plain PyTorch does with the positives
        return None
    if backend == "auto":
        backend = _confirmed(op, x)
    if backend == "triton" or (backend == "cuda" and load("triton").unavailable(op, x) is None):
        return "triton"
    return None


def _confirmed(op: str, x: Tensor) -> str:
    """What ``"auto"`` takes for ``op`` on a GPU; ``FALLBACK`` elsewhere and where its choice cannot run."""
    # torch.compile fuses plain PyTorch with its surroundings, and cannot trace the questions below.
    if not x.is_cuda or torch.compiler.is_compiling():
        return FALLBACK
    return _auto(op, x)[0]


def _auto(op: str, x: Tensor, pairs: Pairs = _UNKNOWN) -> tuple[str, str]:
    """The first ``(backend, reason)`` of :func:`choices` that can run on this machine, and of those before it why not;
    ``FALLBACK`` where none can."""
    problems: list[str] = []
    for name, reason in choices(op, x.device.type, x.dtype, x.shape, _capability(x.device), pairs):
        module = load(name)
        problem = module.unavailable(op, x)
        if problem is None and hasattr(module, "doubtful"):  # what only who names the backend may try
            problem = module.doubtful(x)
        if not problem:
            return name, "; ".join((reason, *problems))
        problems.append(f"{name} was chosen, {reason}, but is not taken here: {problem}")
    return FALLBACK, "; ".join(problems)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else None


@functools.cache
def load(name: str) -> ModuleType:
    """Import the backend called ``name``."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return importlib.import_module(BACKENDS[name])

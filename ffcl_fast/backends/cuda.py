"""CUDA tensors: the kernels of csrc/*.cu, where ffcl_fast was built with nvcc.

``"auto"`` takes the normalisers of wide embeddings from here on compute capability 9.0, and the gradients of the
largest batches; the rest was right on an H200, but on the whole slower than Triton's. The goodness family is here, the
similarity operators are in :mod:`.cuda_similarity`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from . import native
from .panels_similarity import cache_size  # noqa: F401  part of a backend

HALVES = (torch.bfloat16, torch.float16)
MAX_WIDTH = 4096  # of embeddings
MAX_ELEMENTS = 2**30 - 1  # of a sample: places in a row, and a block's steps past its end, are 32-bit numbers
MAX_ROWS = 2**31 - 1 - 4096  # of the similarity kernels, which count rows in 32 bits
DEVICE = "cuda"  # the device type whose tensors the kernels take


class Chip(NamedTuple):
    """What kernels are chosen by."""

    capability: int  # 80, 90, 100, ...
    processors: int


emulated = Chip(90, 2)  # what stands behind other tensors in tests


@functools.cache
def chip(device: torch.device) -> Chip:
    if device.type != "cuda":
        return emulated
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.major * 10 + properties.minor, properties.multi_processor_count)


def runs_on(capability: int, archs: Sequence[str]) -> bool:
    """Whether code compiled for ``archs``, as CMake writes them, runs on a chip: machine code on later ones of its
    generation, PTX (which "-real" leaves out) on all later ones, either with an "a" on no other."""
    for arch in archs:
        number, letters, kind = re.fullmatch(r"(\d+)([af]?)(-\w+)?", arch).groups()
        own = int(number)
        if own == capability or (letters == "f" and own // 10 == capability // 10 and own <= capability):
            return True
        if not letters and own <= capability and (kind != "-real" or own // 10 == capability // 10):
            return True
    return False


@functools.cache  # asked at every call of an operator
def _built_for(capability: int) -> bool:
    return runs_on(capability, native.module.build_info()["cuda_archs"])


def unavailable(op: str, x: Tensor) -> str | None:
    """Why ``op`` cannot run for tensors like ``x``, or None."""
    if op not in _OPERATORS:
        return "not written in CUDA"
    if op not in _SIMILARITY and x.shape[1:].numel() > MAX_ELEMENTS:
        return f"a sample may have at most {MAX_ELEMENTS} elements, these have {x.shape[1:].numel()}"
    if native.module is None:
        return native.problem
    if not native.module.cuda_built():
        return "ffcl_fast was built without the CUDA kernels (no nvcc was found, or FFCL_CUDA=0)"
    if x.device.type != DEVICE:
        return "it takes CUDA tensors only"
    if x.is_cuda and torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    if chip(x.device).capability < 80:
        return "its kernels need compute capability 8.0 or later"
    if x.is_cuda and not _built_for(chip(x.device).capability):
        return f"ffcl_fast was built for other chips (FFCL_CUDA_ARCHS) than capability {chip(x.device).capability / 10}"
    if op in _SIMILARITY:
        if x.dtype not in HALVES:
            return "its tensor-core kernels take bfloat16 and float16"
        if isinstance(x.shape[0], int) and x.shape[0] > MAX_ROWS:  # torch.compile may not know yet
            return f"there may be at most {MAX_ROWS} rows, not {x.shape[0]}"
        return None if x.shape[1] <= MAX_WIDTH else f"embeddings may be at most {MAX_WIDTH} wide, not {x.shape[1]}"
    return None if x.dtype in native.DTYPES else "it takes float32, bfloat16 and float16"


def doubtful(x: Tensor) -> str | None:
    """Why another backend is faster for tensors like ``x`` although :func:`unavailable` finds nothing, or None."""
    if chip(x.device).capability == 90 and not native.module.sm90_built():
        return "ffcl_fast was built without the kernels for sm_90a (FFCL_CUDA_ARCHS), the ones that were measured"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Goodness
# ---------------------------------------------------------------------------------------------------------------------


def goodness_forward(h, mean, relu, normalize, eps):
    h = rows_of(h)
    goodness = h.new_empty(h.shape[0], dtype=torch.float32)
    out = h.new_empty(h.shape if normalize else (0, h.shape[1]))
    run("goodness_forward", _rows(h, mean, relu, eps), goodness, out if normalize else None, h=h)
    return goodness, out


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    if grad_goodness is None and grad_out is None:
        return torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    h, goodness, grad_goodness, grad_out = rows_of(h), dense(goodness), dense(grad_goodness), dense(grad_out)
    dh = h.new_empty(h.shape)
    run("goodness_backward", _rows(h, mean, relu, eps), goodness, grad_goodness, grad_out, dh, h=h)
    return dh


def goodness_many(h, mean, relu):
    h = [rows_of(x) for x in h]
    goodness = h[0].new_empty(sum(x.shape[0] for x in h), dtype=torch.float32)
    for part in _launches(h, None, mean, relu):
        run("goodness_many", part, goodness, **{f"h[{i}]": x for i, x in enumerate(h)})
    return goodness


def goodness_many_backward(h, grad_goodness, mean, relu):
    h, grad_goodness = [rows_of(x) for x in h], dense(grad_goodness)
    dh = [x.new_empty(x.shape) for x in h]
    for part in _launches(h, dh, mean, relu):
        run("goodness_many_backward", part, grad_goodness, **{f"h[{i}]": x for i, x in enumerate(h)})
    return dh


def pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2):
    h1, h2 = rows_of(h1), rows_of(h2)
    loss = h1.new_empty(h1.shape[0], dtype=torch.float32)
    coefficients = h1.new_empty((h1.shape[0], 3), dtype=torch.float32)
    d1, d2 = _pair_gradients(h1, need_1, need_2)
    outputs = loss, coefficients, d1 if need_1 else None, d2 if need_2 else None
    run("pair_cosine_forward", _pair(h1, h2, relu), dense(target), margin, scale, *outputs, h1=h1, h2=h2)
    return loss, coefficients, d1, d2


def pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2):
    h1, h2 = rows_of(h1), rows_of(h2)
    d1, d2 = _pair_gradients(h1, need_1, need_2)
    outputs = d1 if need_1 else None, d2 if need_2 else None
    run("pair_cosine_backward", _pair(h1, h2, relu), dense(coefficients), dense(grad), *outputs, h1=h1, h2=h2)
    return d1, d2


def scale_(x, factor):
    whole = x.contiguous()
    run("scale", whole, whole.numel(), native.DTYPES[x.dtype], factor.float(), *where(x), x=x)
    if whole is not x:
        x.copy_(whole)


def pool_goodness_forward(h, mean, relu):
    goodness = h.new_empty(h.shape[0], dtype=torch.float32)
    pooled = h.new_empty(h.shape[:2], dtype=torch.float32)
    run("pool_goodness_forward", _maps(h, mean, relu), goodness, pooled, h=h)
    return goodness, pooled


def pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu):
    dh = ops.empty_pooled_like(h)
    run("pool_goodness_backward", _maps(h, mean, relu), *map(dense, (pooled, grad_goodness, grad_pooled)), dh, h=h)
    return dh


def similarity_forward(*arguments):
    return cuda_similarity.similarity_forward(*arguments)


def similarity_backward(*arguments):
    return cuda_similarity.similarity_backward(*arguments)


_SIMILARITY = {"similarity_forward", "similarity_backward"}
_OPERATORS = _SIMILARITY | {
    "goodness_forward",
    "goodness_backward",
    "goodness_many",
    "goodness_many_backward",
    "pair_cosine_forward",
    "pair_cosine_backward",
    "scale_",
    "pool_goodness_forward",
    "pool_goodness_backward",
}


# ---------------------------------------------------------------------------------------------------------------------
# From tensors to arguments
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """``x`` itself where its rows are contiguous, however far apart they are; else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def run(kernel: str, *arguments, **tensors: Tensor) -> None:
    """Call the native function of ``kernel``; a tensor goes as its address, None as 0.

    ``tensors`` are what the exceptions describe, of one dtype and device. Raises ValueError or RuntimeError, see
    :func:`_check`.
    """
    first, *others = tensors.values()
    device = first.device
    if any(x.dtype != first.dtype or x.device != device for x in others):
        _check(1, kernel, **tensors)
    given = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in arguments]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _check(getattr(native.module, f"{kernel}_cuda")(*given), kernel, **tensors)


def where(x: Tensor) -> tuple[int, int]:
    """The device's ordinal and the current stream of ``x``."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _rows(h: Tensor, mean: bool, relu: bool, eps: float):
    return native.module.GoodnessRows(
        h.data_ptr(), *h.shape, h.stride(0), native.DTYPES[h.dtype], relu, mean, eps, *where(h)
    )


def _launches(h: list[Tensor], dh: list[Tensor] | None, mean: bool, relu: bool):
    """The arguments of each launch for the layers ``h``."""
    layers, first = [], 0
    for i, x in enumerate(h):
        layers.append((x.data_ptr(), 0 if dh is None else dh[i].data_ptr(), *x.shape, x.stride(0), first))
        first += x.shape[0]
    most = native.module.MANY_LAYERS
    for i in range(0, len(layers), most):
        yield native.module.GoodnessMany(layers[i : i + most], native.DTYPES[h[0].dtype], relu, mean, *where(h[0]))


def _pair(h1: Tensor, h2: Tensor, relu: bool):
    return native.module.PairRows(
        h1.data_ptr(), h2.data_ptr(), *h1.shape, h1.stride(0), h2.stride(0), native.DTYPES[h1.dtype], relu, *where(h1)
    )


def _pair_gradients(h1: Tensor, need_1: bool, need_2: bool) -> tuple[Tensor, Tensor]:
    d1, d2 = (h1.new_empty(h1.shape if need else (0, h1.shape[1])) for need in (need_1, need_2))
    return d1, d2


def _maps(h: Tensor, mean: bool, relu: bool):
    last = h.stride(2) != 1
    return native.module.PoolMaps(
        h.data_ptr(), *h.shape, h.stride(0), last, native.DTYPES[h.dtype], relu, mean, *where(h)
    )


def _check(status: int, kernel: str, **tensors: Tensor) -> None:
    """Raise RuntimeError naming the kernel, what it was given and CUDA's reason; ValueError for refused arguments."""
    if status == 0:
        return
    given = ", ".join(f"{name}: {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
    if status == 1:
        raise ValueError(f"CUDA kernel {kernel} refused its arguments ({given})")
    if status == 3:
        raise RuntimeError(f"CUDA kernel {kernel} was not built into ffcl_fast._native ({given})")
    raise RuntimeError(f"CUDA kernel {kernel} failed: {native.module.cuda_error(status)} ({given})")


from . import cuda_similarity  # noqa: E402  it needs what is above

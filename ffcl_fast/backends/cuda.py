"""CUDA tensors: the kernels of csrc/*.cu, where ffcl_fast was built with nvcc.

Never what ``"auto"`` means: no measurement on a GPU confirms these kernels yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def unavailable(op: str, x: Tensor) -> str | None:
    """Why ``op`` cannot run for tensors like ``x``, or None."""
    if op not in _OPERATORS:
        return "not written in CUDA"
    if native.module is None:
        return native.problem
    if not native.module.cuda_built():
        return "ffcl_fast was built without the CUDA kernels (no nvcc was found, or FFCL_CUDA=0)"
    if x.device.type != "cuda":
        return "it takes CUDA tensors only"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    return None if x.dtype in native.DTYPES else "it takes float32, bfloat16 and float16"


def cache_size(q: Tensor, k: Tensor | None) -> int:
    return 0


def goodness_forward(h, mean, relu, normalize, eps):
    goodness = h.new_empty(h.shape[0], dtype=torch.float32)
    out = h.new_empty(h.shape if normalize else (0, h.shape[1]))
    status = native.module.goodness_forward_cuda(
        _rows(h, mean, relu, eps), goodness.data_ptr(), out.data_ptr() if normalize else 0
    )
    _check(status, "goodness_forward", h=h)
    return goodness, out


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    if grad_goodness is None and grad_out is None:
        return torch.zeros(h.shape, dtype=h.dtype, device=h.device)
    dh = h.new_empty(h.shape)
    status = native.module.goodness_backward_cuda(
        _rows(h, mean, relu, eps),
        goodness.data_ptr(),
        0 if grad_goodness is None else grad_goodness.data_ptr(),
        0 if grad_out is None else grad_out.data_ptr(),
        dh.data_ptr(),
    )
    _check(status, "goodness_backward", h=h)
    return dh


_OPERATORS = ("goodness_forward", "goodness_backward")


def _rows(h: Tensor, mean: bool, relu: bool, eps: float):
    stream = torch.cuda.current_stream(h.device).cuda_stream
    return native.module.GoodnessRows(
        h.data_ptr(), *h.shape, h.stride(0), native.DTYPES[h.dtype], relu, mean, eps, h.device.index, stream
    )


def _check(status: int, kernel: str, **tensors: Tensor) -> None:
    """Raise RuntimeError naming the kernel, what it was given and CUDA's reason; ValueError for refused arguments."""
    if status == 0:
        return
    given = ", ".join(f"{name}: {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in tensors.items())
    if status == 1:
        raise ValueError(f"CUDA kernel {kernel} refused its arguments ({given})")
    raise RuntimeError(f"CUDA kernel {kernel} failed: {native.module.cuda_error(status)} ({given})")

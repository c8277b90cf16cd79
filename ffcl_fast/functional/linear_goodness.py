"""Goodness of a linear layer without storing its activation: scoring, and training where memory is what is short."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import ops as ops  # registers torch.ops.ffcl_fast
from . import _checks
from .goodness import is_mean
from .similarity import differentiable_once

_ops = torch.ops.ffcl_fast
_PANEL = {"cpu": 1 << 20}  # elements of the activation that the backward pass holds: a CPU's caches
_GPU_PANEL = 1 << 24


def linear_goodness(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: str = "sum_squares",
    *,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Goodness of ``linear(x, weight, bias)``, as :func:`~ffcl_fast.functional.goodness` of it would be.

    Forward-Forward classifies by a forward pass for each candidate label and keeps the label of the largest goodness
    (Hinton 2022): the last activation is only ever squared and added, so it is not stored. The backward pass makes it
    again, a panel of rows at a time: one more matrix product than autograd takes over a stored activation.

    Args:
        x: (N, K) inputs.
        weight: (H, K), of x's dtype.
        bias: (H,) or None.
        kind, relu, backend: as in :func:`~ffcl_fast.functional.goodness`; ``relu`` is applied to the layer's output.

    Returns:
        (N,) float32 (float64 for float64 inputs). Under autocast the product runs in autocast's dtype.

    Raises:
        TypeError: no floating-point tensors, or of different dtypes.
        ValueError: shapes that do not fit, different devices, or another argument out of its range.
    """
    _checks.embeddings("x", x)
    _checks.embeddings("weight", weight)
    _checks.alike("weight", weight, "x", x)
    if bias is not None:
        _checks.embeddings("bias", bias, dim=1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape {(weight.shape[0],)}, got {tuple(bias.shape)}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on the device of x: got {bias.device} and {x.device}")
        if _checks.compute_dtype(bias) != _checks.compute_dtype(x):
            raise TypeError(f"bias must have the dtype of x: got {bias.dtype} and {x.dtype}")
    mean = is_mean(kind)
    _checks.backend(backend)
    dtype = _checks.compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return _LinearGoodness.apply(x.to(dtype), weight.to(dtype), bias, mean, relu, backend)


class _LinearGoodness(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, relu, backend):
        ctx.save_for_backward(x, weight, bias)
        ctx.options = mean, relu
        return _ops.linear_goodness(x, weight, bias, mean, relu, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        mean, relu = ctx.options
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        acc, (width, inputs) = ops.accumulator_dtype(x), weight.shape
        # On a CPU as in the forward pass; with AMX, PyTorch's bfloat16 products also read past odd rows: 0 NaN is NaN.
        dtype = acc if x.device.type == "cpu" else x.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        dx = torch.empty_like(x) if need_x else None
        dweight = x.new_zeros(width, inputs, dtype=acc) if need_weight else None
        dbias = x.new_zeros(width, dtype=acc) if need_bias else None
        step = max(1, _PANEL.get(x.device.type, _GPU_PANEL) // width)
        factor = grad.to(acc)[:, None] * (2 / width if mean else 2)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, x.shape[0], step):
                rows = slice(i, i + step)
                inputs_of_rows = x[rows].to(dtype)
                y = F.linear(inputs_of_rows, weight, bias)
                dy = (y.relu_() if relu else y).to(acc) * factor[rows]
                if dbias is not None:
                    dbias += dy.sum(0)
                dy = dy.to(dtype)
                if dx is not None and dtype == x.dtype:
                    torch.mm(dy, weight, out=dx[rows])
                elif dx is not None:
                    dx[rows] = dy @ weight
                if dweight is not None:
                    dweight += dy.T @ inputs_of_rows
        return dx, *(None if d is None else d.to(x.dtype) for d in (dweight, dbias)), None, None, None

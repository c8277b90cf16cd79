"""Goodness of many layers' activations: one launch forward and one backward, where a backend groups them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops as ops  # registers torch.ops.ffcl_fast
from . import _checks
from .goodness import check_activation, flatten, is_mean
from .similarity import differentiable_once

_ops = torch.ops.ffcl_fast


def goodness_many(
    activations: Sequence[Tensor], kind: str = "sum_squares", *, relu: bool = False, backend: str = "auto"
) -> list[Tensor]:
    """:func:`~ffcl_fast.functional.goodness` of every tensor of a list.

    Args:
        activations: (N_i, ...) tensors of one dtype and device, of any shapes and memory formats.
        kind, relu, backend: as in :func:`~ffcl_fast.functional.goodness`.

    Returns:
        A list of (N_i,) tensors, float32 (float64 for float64 activations).

    Raises:
        TypeError: no list, an element that ``goodness`` would refuse, or several dtypes.
        ValueError: an empty list or tensor, several devices, or another argument out of its range.
    """
    g = goodness_of_all(activations, kind, relu=relu, backend=backend)
    return list(g.split([h.shape[0] for h in activations]))


def goodness_of_all(activations: Sequence[Tensor], kind: str, *, relu: bool, backend: str) -> Tensor:
    """What :func:`goodness_many` returns as one tensor, the samples of a list's tensors one after the other."""
    if not isinstance(activations, list | tuple):
        raise TypeError(f"activations must be a list of tensors; got {type(activations).__name__}")
    if not activations:
        raise ValueError("activations must hold at least one tensor; got none")
    for i, h in enumerate(activations):
        check_activation(h, f"activations[{i}]")
    first = activations[0]
    for i, h in enumerate(activations):
        if h.dtype != first.dtype:
            raise TypeError(f"activations must have one dtype; got {first.dtype} and, at {i}, {h.dtype}")
        if h.device != first.device:
            raise ValueError(f"activations must be on one device; got {first.device} and, at {i}, {h.device}")
    mean = is_mean(kind)
    _checks.backend(backend)
    return _GoodnessMany.apply(mean, relu, backend, *(flatten(h)[0] for h in activations))


class _GoodnessMany(Function):
    @staticmethod
    def forward(ctx, mean, relu, backend, *h):
        ctx.save_for_backward(*h)
        ctx.options = mean, relu, backend
        return _ops.goodness_many(h, mean, relu, backend)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        h, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        some = [x for x, need in zip(h, needed, strict=True) if need]
        if len(some) < len(h):
            parts = grad.split([x.shape[0] for x in h])
            grad = torch.cat([g for g, need in zip(parts, needed, strict=True) if need])
        dh = iter(_ops.goodness_many_backward(some, grad.contiguous(), *ctx.options))
        return None, None, None, *(next(dh) if need else None for need in needed)

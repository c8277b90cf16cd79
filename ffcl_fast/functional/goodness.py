"""Goodness of activations: the differentiable functions over the operators of :mod:`ffcl_fast.ops`.

An activation h is (N, ...): one sample a row, every other dimension belongs to it, in any memory format. Results are
float32 (float64 for float64 inputs). Everything is memory-bound, so each function reads its input once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import ops as ops  # registers torch.ops.ffcl_fast
from . import _checks
from .similarity import differentiable_once

KINDS = ("sum_squares", "mean_squares")
_ops = torch.ops.ffcl_fast


def goodness(
    h: Tensor,
    kind: str = "sum_squares",
    *,
    relu: bool = False,
    groups: int | None = None,
    over: str = "all",
    backend: str = "auto",
) -> Tensor:
    """Sum or mean of squares of every sample's activation: Hinton 2022's goodness.

    Args:
        h: (N, ...) activations, or pre-activations where ``relu``.
        kind: ``"sum_squares"``: g = sum h^2; ``"mean_squares"``: g = mean h^2.
        relu: apply ReLU first, in the same pass.
        groups: split dimension 1 (the channels) into this many equal, consecutive groups and give each its own
            goodness: the "channel groups" of CwComp, one group a class. The channels must divide evenly.
        over: ``"all"``: every non-batch dimension; ``"channels"``: dimension 1 only, one value a position.
        backend: ``"auto"`` or one of :data:`ffcl_fast.backends.NAMES`.

    Returns:
        (N,); (N, groups) with ``groups``; (N, ...) without dimension 1 for ``over="channels"``.

    Raises:
        TypeError: ``h`` is no dense tensor of float16, bfloat16, float32 or float64, or ``groups`` no whole number.
        ValueError: ``h`` is empty or has fewer than two dimensions, or another argument is not one of the above.
    """
    check_activation(h, "h")
    mean = is_mean(kind)
    _checks.choice("over", over, ("all", "channels"))
    _checks.backend(backend)
    if over == "channels":
        if groups is not None:
            raise ValueError("groups cannot be used with over='channels'")
        rows = h.movedim(1, -1)
        shape, rows = rows.shape[:-1], rows.reshape(-1, h.shape[1])
    elif groups is not None:
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"groups must be a whole number; got {type(groups).__name__}")
        if groups < 1 or h.shape[1] % groups:
            raise ValueError(f"groups must divide h's {h.shape[1]} channels (dimension 1); got {groups}")
        shape, rows = (h.shape[0], groups), h.reshape(h.shape[0] * groups, -1)
    else:
        shape, rows = h.shape[:1], flatten(h)[0]
    g, _ = _Goodness.apply(_dense(rows), mean, relu, False, 0.0, backend)
    return g.reshape(shape)


def goodness_normalize(h: Tensor, eps: float = 1e-6, *, relu: bool = False, backend: str = "auto") -> Tensor:
    """``h / (norm(h) / sqrt(d) + eps)``, d elements a sample: what a Forward-Forward layer hands to the next one.

    The next layer sees only the activation's direction, so it cannot read this layer's goodness off its length (Hinton
    2022; "goodness decoupling"). A sample of zeros stays zeros.

    Args:
        h: (N, ...) activations, or pre-activations where ``relu``.
        eps: added to the root mean square, > 0.
        relu: apply ReLU first, in the same pass.
        backend: as in :func:`goodness`.

    Returns:
        Tensor of h's shape and dtype. Raises as :func:`goodness` does.
    """
    return goodness_and_normalize(h, "mean_squares", eps, relu=relu, backend=backend)[1]


def goodness_and_normalize(
    h: Tensor, kind: str = "sum_squares", eps: float = 1e-6, *, relu: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`goodness` (N,) and :func:`goodness_normalize` (h's shape and dtype) from one read of ``h``."""
    check_activation(h, "h")
    check_eps(eps)
    _checks.backend(backend)
    rows, restore = flatten(h)
    g, out = _Goodness.apply(rows, is_mean(kind), relu, True, float(eps), backend)
    return g, restore(out)


def pool_goodness(
    h: Tensor, kind: str = "sum_squares", *, relu: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Global average pool of (N, C, ...) and the goodness of the result, from one read of ``h``.

    Args:
        h: (N, C, ...) activations in either memory format (contiguous, channels last), or pre-activations where
            ``relu`` (which is applied before pooling).
        kind, relu, backend: as in :func:`goodness`.

    Returns:
        goodness (N,) of the pooled activations and those themselves, (N, C), both float32.

    Raises:
        TypeError, ValueError: as :func:`goodness`; also for ``h`` of fewer than three dimensions.
    """
    check_activation(h, "h", dims=3)
    _checks.backend(backend)
    return _PoolGoodness.apply(_maps(h), is_mean(kind), relu, backend)


# --- validation and memory layout ------------------------------------------------------------------------------------


def check_activation(h: Tensor, name: str, dims: int = 2) -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``h`` is a non-empty (N, ...) float tensor."""
    if not isinstance(h, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(h).__name__}")
    if h.dtype not in _checks.FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {h.dtype}")
    _checks.dense(name, h)
    if h.dim() < dims:
        raise ValueError(f"{name} must have a batch and at least {dims - 1} more dimensions; got {tuple(h.shape)}")
    if _checks.is_empty(h):
        raise ValueError(f"{name} must not be empty; got {tuple(h.shape)}")


def check_number(value: float, name: str, minimum: float | None = None) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError if it is below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if minimum is not None and not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def check_eps(value: float) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is positive."""
    check_number(value, "eps")
    if not value > 0:
        raise ValueError(f"eps must be positive; got {value}")


def is_mean(kind: str) -> bool:
    """Whether a goodness of this ``kind`` is a mean; ValueError for an unknown one."""
    _checks.choice("kind", kind, KINDS)
    return kind == "mean_squares"


def channels_last(h: Tensor) -> bool:
    """Whether each sample of ``h`` (N, C, ...) is stored channels last, and not also channels first."""
    if h.dim() < 3 or h[0].is_contiguous():
        return False
    return h[0].movedim(0, -1).is_contiguous()


def flatten(h: Tensor, last: bool | None = None):
    """``h`` as dense rows (N, D), in the order of its memory where possible, and the function that undoes it.

    Goodness and cosine do not depend on the order of a sample's elements, so channels-last activations need no copy.
    ``last`` forces that order, for the partner of a tensor that has it.
    """
    if channels_last(h) if last is None else last:
        moved = h.movedim(1, -1)
        return _dense(moved.flatten(1)), lambda rows: rows.unflatten(1, moved.shape[1:]).movedim(-1, 1)
    return _dense(h.flatten(1)), lambda rows: rows.reshape(h.shape)


def _dense(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _maps(h: Tensor) -> Tensor:
    """``h`` as (N, C, L), dense in either order."""
    if channels_last(h):
        return h.movedim(1, -1).flatten(1, -2).transpose(1, 2)
    maps = h.flatten(2)
    return maps if maps[0].is_contiguous() else maps.contiguous()


def _vector(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A small gradient as the kernels want it: dense, in the accumulator's dtype."""
    return None if grad is None else grad.to(dtype).contiguous()


# --- autograd --------------------------------------------------------------------------------------------------------


class _Goodness(Function):
    @staticmethod
    def forward(ctx, h, mean, relu, normalize, eps, backend):
        g, out = _ops.goodness_forward(h, mean, relu, normalize, eps, backend)
        ctx.save_for_backward(h, g)
        ctx.options = mean, relu, eps, backend
        ctx.normalize = normalize
        ctx.set_materialize_grads(False)
        if not normalize:
            ctx.mark_non_differentiable(out)
        return g, out

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_goodness, grad_out):
        h, g = ctx.saved_tensors
        if not ctx.normalize:
            grad_out = None
        if grad_out is not None:
            grad_out = grad_out.to(h.dtype).contiguous()
        return _ops.goodness_backward(h, g, _vector(grad_goodness, g.dtype), grad_out, *ctx.options), *[None] * 5


class _PoolGoodness(Function):
    @staticmethod
    def forward(ctx, h, mean, relu, backend):
        g, pooled = _ops.pool_goodness_forward(h, mean, relu, backend)
        ctx.save_for_backward(h, pooled)
        ctx.options = mean, relu, backend
        ctx.set_materialize_grads(False)
        return g, pooled

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_goodness, grad_pooled):
        h, pooled = ctx.saved_tensors
        grads = _vector(grad_goodness, pooled.dtype), _vector(grad_pooled, pooled.dtype)
        return _ops.pool_goodness_backward(h, pooled, *grads, *ctx.options), None, None, None

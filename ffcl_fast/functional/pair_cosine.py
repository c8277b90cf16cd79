"""FFCL's local loss: the cosine embedding loss of two flattened activations, gradient included in its one visit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from .. import backends
from .. import ops as ops  # registers torch.ops.ffcl_fast
from ..backends import native
from ..backends.cpu import goodness as cpu_goodness
from . import _checks
from .goodness import channels_last, check_activation, check_number, flatten
from .similarity import differentiable_once, handed_out

_ops = torch.ops.ffcl_fast


def pair_cosine(
    h1: Tensor,
    h2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    reduction: str = "mean",
    *,
    weight: float = 1.0,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``1 - cos(h1, h2)`` for a pair with target 1, ``max(0, cos(h1, h2) - margin)`` for one with target -1.

    The value and gradient of :func:`torch.nn.functional.cosine_embedding_loss` on ``h1.flatten(1), h2.flatten(1)``,
    1e-12 added to each squared norm included; FFCL's local loss (Ahamed et al. 2023).

    Args:
        h1, h2: (N, ...) activations of equal shape, in any memory format, or pre-activations where ``relu``.
        target: (N,) of 1 and -1, any real dtype, on the same device.
        margin: cosine up to which a negative pair costs nothing.
        reduction: ``"mean"`` over N, ``"sum"`` or ``"none"``.
        weight: factor on the loss and its gradient. It costs nothing here, whereas multiplying the result (by other
            than 1) costs a pass over the stored gradient.
        relu: apply ReLU to both first, in the same pass.
        backend: ``"auto"`` or one of :data:`ffcl_fast.backends.NAMES`.

    Returns:
        float32 (float64 for float64 inputs): 0-dimensional, or (N,) for ``"none"``.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: empty or different shapes, an unknown reduction, or, where the check needs no device
            synchronisation (CPU, not under ``torch.compile``), a target other than 1 and -1. Elsewhere such a pair
            contributes 0, as in PyTorch.
    """
    target = _check(h1, h2, target, margin, reduction, weight, backend)
    dtype = torch.promote_types(h1.dtype, h2.dtype)
    last = channels_last(h1)
    a, b = flatten(h1.to(dtype), last)[0], flatten(h2.to(dtype), last)[0]
    rows = a.shape[0]
    # The gradient is made during the forward pass, for the upstream gradient 1 that reducing to a scalar usually gets.
    # float16 could underflow before its loss scale is applied; a compiler cannot see that the upstream gradient is 1,
    # and needs the recomputing backward for its own sake (saving two gradients costs more memory than reading twice).
    needs_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if reduction != "none" and needs_grad and dtype != torch.float16 and not torch.compiler.is_compiling():
        scale = float(weight) / rows if reduction == "mean" else float(weight)
        return _ReducedPairCosine.apply(a, b, target, float(margin), relu, scale, backend)
    loss = _PairCosine.apply(a, b, target, float(margin), relu, backend)
    loss = _checks.reduce(loss, reduction)
    return loss if weight == 1.0 else loss * weight


pair_cosine.folds_weight = True  # for `layerwise`


def pair_cosine_gradient(
    h: Tensor, target: Tensor, margin: float = 0.0, *, relu: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The mean of :func:`pair_cosine` over the pairs (h[i], h[N + i]) and its gradient, outside autograd, for local
    training: of two halves of one tensor, autograd would join the gradients by a copy.

    h: (2N, ...). Returns the loss, 0-dimensional, and the gradient in h's shape, dtype and memory format. Raises as
    :func:`pair_cosine` does.
    """
    check_activation(h, "h")
    h = h.detach()
    if h.shape[0] % 2:
        raise ValueError(f"h must hold pairs, an even number of rows; got {h.shape[0]}")
    h1, h2 = h.chunk(2)
    target = _check(h1, h2, target, margin, "mean", 1.0, backend)
    rows, restore = flatten(h)
    a, b = rows.chunk(2)
    scale = 1.0 / a.shape[0]
    if native.usable(h) and backends.get(backend, "pair_cosine_forward", a).__name__ == backends.BACKENDS["cpu"]:
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        loss, _ = cpu_goodness.pair_cosine_into(a, b, target, float(margin), relu, scale, *gradient.chunk(2))
    else:
        loss, _, *parts = _ops.pair_cosine_forward(a, b, target, float(margin), relu, scale, True, True, backend)
        gradient = torch.cat(parts)
    return loss.sum() * scale, restore(gradient)


def _check(
    h1: Tensor, h2: Tensor, target: Tensor, margin: float, reduction: str, weight: float, backend: str
) -> Tensor:
    """Raise as :func:`pair_cosine` says; return ``target`` in the accumulator's dtype."""
    check_activation(h1, "h1")
    check_activation(h2, "h2")
    if h1.shape != h2.shape:
        raise ValueError(f"h1 and h2 must have the same shape; got {tuple(h1.shape)} and {tuple(h2.shape)}")
    if h1.device != h2.device:
        raise ValueError(f"h1 and h2 must be on the same device; got {h1.device} and {h2.device}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    if target.is_complex():
        raise TypeError(f"target must be real; got {target.dtype}")
    if target.shape != h1.shape[:1]:
        raise ValueError(f"target must have shape {(h1.shape[0],)}, one value a pair; got {tuple(target.shape)}")
    if target.device != h1.device:
        raise ValueError(f"target must be on h1's device, {h1.device}; got {target.device}")
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.backend(backend)
    check_number(margin, "margin")
    check_number(weight, "weight")
    wide = torch.promote_types(h1.dtype, h2.dtype) == torch.float64
    target = target.detach().to(torch.float64 if wide else torch.float32).contiguous()
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((target.abs() == 1).all()):
        wrong = target[target.abs() != 1][0].item()
        raise ValueError(f"target must hold only 1 (equal classes) and -1 (different classes); got {wrong:g}")
    return target


def _total(loss: Tensor, scale: float) -> Tensor:
    """The sum of ``loss`` (N,) times ``scale``: a long one on a GPU in two steps, which is three times as fast as one
    reduction; the mean without a launch for the factor."""
    rows = loss.numel()
    mean = scale == 1.0 / rows
    if loss.is_cuda and rows >= 1 << 14 and rows % 256 == 0:
        loss = loss.view(-1, 256)
        loss = loss.mean(1) if mean else loss.sum(1)
    return loss.mean() if mean else loss.sum() * scale


class _PairCosine(Function):
    """Loss (N,) of each pair; the backward pass reads both activations again."""

    @staticmethod
    def forward(ctx, h1, h2, target, margin, relu, backend):
        loss, coefficients, _, _ = _ops.pair_cosine_forward(h1, h2, target, margin, relu, 1.0, False, False, backend)
        ctx.save_for_backward(h1, h2, coefficients)
        ctx.options = relu, backend
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        h1, h2, coefficients = ctx.saved_tensors
        relu, backend = ctx.options
        need_1, need_2 = ctx.needs_input_grad[:2]
        grad = grad.to(coefficients.dtype).contiguous()
        d1, d2 = _ops.pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2, backend)
        return d1 if need_1 else None, d2 if need_2 else None, None, None, None, None


class _ReducedPairCosine(Function):
    """scale * sum of the losses, 0-dimensional, with the gradients made in the same visit.

    The first backward pass hands those gradients out, scaled in place by the upstream gradient (nothing else refers to
    them); a later one, which needs ``retain_graph``, makes them anew.
    """

    @staticmethod
    def forward(ctx, h1, h2, target, margin, relu, scale, backend):
        need_1, need_2 = ctx.needs_input_grad[:2]
        loss, coefficients, d1, d2 = _ops.pair_cosine_forward(
            h1, h2, target, margin, relu, scale, need_1, need_2, backend
        )
        ctx.save_for_backward(h1, h2, coefficients)
        ctx.gradients = [d1 if need_1 else None, d2 if need_2 else None]
        ctx.options = relu, scale, backend
        return _total(loss, scale)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        h1, h2, coefficients = ctx.saved_tensors  # also raises, as everywhere, for a second pass without the graph
        relu, scale, backend = ctx.options
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None:
            return *handed_out(gradients, grad, backend), None, None, None, None, None
        need_1, need_2 = ctx.needs_input_grad[:2]
        grad = (grad * scale).to(coefficients.dtype).expand(h1.shape[0]).contiguous()
        d1, d2 = _ops.pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2, backend)
        return d1 if need_1 else None, d2 if need_2 else None, None, None, None, None, None

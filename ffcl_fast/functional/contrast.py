"""Softmax contrast, the loss that InfoNCE, NT-Xent and CLIP share, as one autograd function over the operators.

Where the backend has the contrast operators the whole loss is one call each way; elsewhere rows are normalised and
joined first, and the positives added to what the similarity operators give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, ops
from . import _checks
from .similarity import apart, batched, differentiable_once, grad_wanted, prepare, row_dot, scale_grad

# Where the positive of row i is.
KEYS = ops.POSITIVE_GIVEN  # k_i
STACKED = ops.POSITIVE_STACKED  # q holds two views one after the other: rows i and i + N/2 belong together
INTERLEAVED = ops.POSITIVE_INTERLEAVED  # rows 2i and 2i + 1 belong together

_SOFTPLUS_THRESHOLD = 50.0  # beyond it softplus(x) = x to double precision; torch's default of 20 errs by 1e-10


def contrast(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    *,
    tail: Tensor | None = None,
    positive: Tensor | None = None,
    unit_q: bool = False,
    unit_k: bool = False,
    pairing: int = KEYS,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude: int = ops.EXCLUDE_NONE,
    both: bool = False,
    decoupled: bool = False,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of each row's positive against its negatives; (N,) in the accumulator dtype, () where reduced. No
    checks.

    ``exclude`` must leave the positives out of S. With p_i the positive logit and lse_i the normaliser of the
    negatives, row i has softplus(lse_i - p_i) = -log(exp p_i / (exp p_i + exp lse_i)): no normaliser that holds the
    positive is rounded before the subtraction, so the loss and its gradient stay accurate where they are small.

    Args:
        q, k: (N, D) and (M, D) of one dtype, or k None for q itself (``pairing`` STACKED or INTERLEAVED then).
        scale: 0-dim, accumulator dtype.
        tail: more rows of q, (N', D); what is said of q holds for both, one after the other.
        positive: (N, D) positives; None: where ``pairing`` says.
        unit_q: divide the rows of q, tail and positive by max(their length, 1e-12) first; unit_k: those of k.
        both: add the same loss of the columns, whose positives are the rows (N == M).
        decoupled: lse_i - p_i, the positive left out of the normaliser (DCL, Yeh et al. 2022); 0 without negatives.
        reduction: "none", "sum" or "mean", which with ``both`` is that over 2N losses.
    """
    if fused(backend, q, tail, k, positive) and (pairing == KEYS) == (k is not None):
        order, group = (None, None) if pairing == KEYS else _pairs(q, tail, pairing)
        kind = ops.CONTRAST_DECOUPLED if decoupled else ops.CONTRAST_SOFTPLUS
        ids = (row_ids, apart(col_ids, row_ids))
        save = grad_wanted(q, tail, k, positive, scale)
        if save and unit_q:
            q, tail, positive = kept(q), kept(tail), kept(positive)
        if save and unit_k:
            k = kept(k)
        tail, k, positive = apart(tail, q), apart(k, q), apart(positive, q, k)
        options = (exclude, order, group, unit_q, unit_k, both, kind, save, backend)
        return _reduced(_Fused.apply(q, tail, k, positive, scale, *ids, *options)[0], reduction, both)
    q = prepare(q if tail is None else torch.cat((q, tail)), unit_q, backend)
    k = None if k is None else prepare(k, unit_k, backend)
    positive = None if positive is None else prepare(positive, unit_q, backend)
    save = grad_wanted(q, k, positive, scale)
    k, positive, col_ids = apart(k, q), apart(positive, q, k), apart(col_ids, row_ids)
    beside = backends.positives(backend, q)
    if beside and (pairing == KEYS) == (k is not None):
        options = (exclude, pairing, both, decoupled, save, reduction, backend, beside)
        return _ContrastByKernels.apply(q, k, positive, scale, row_ids, col_ids, *options)
    options = (exclude, pairing, both, decoupled, save, backend)
    return _reduced(_Contrast.apply(q, k, positive, scale, row_ids, col_ids, *options), reduction, both)


def _reduced(loss: Tensor, reduction: str, both: bool) -> Tensor:
    loss = _checks.reduce(loss, reduction)
    return loss / 2 if both and reduction == "mean" else loss


def kept(x: Tensor | None) -> Tensor | None:
    """``x``, or a copy of it where it has no gradient: a queue or a teacher's output may be written to before the
    backward pass, or come from inference mode, as the originals allow, which keep the normalised rows."""
    return x if x is None or x.requires_grad else x.detach().clone()


def fused(backend: str, *tensors: Tensor | None) -> bool:
    """Whether the contrast operators take these: their backend, one dtype, and that of the products."""
    first = tensors[0]
    if not backends.fuses(backend, first) or _checks.compute_dtype(first) != first.dtype:
        return False
    return all(x is None or x.dtype == first.dtype for x in tensors)


def class_contrast(z: Tensor, order: Tensor, group: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """SupCon's losses (N,) of the rows of z (N, D), and how many positives each has (N,); only where :func:`fused`.

    ``order`` (N,) lists the rows class by class, ``group`` (N,) is the class of each entry of it, both int64.
    """
    options = (ops.EXCLUDE_SAME_ID, order, group, False, False, False, ops.CONTRAST_MEAN, grad_wanted(z, scale))
    return _Fused.apply(z, None, None, None, scale, None, None, *options, backend)


def _pairs(q: Tensor, tail: Tensor | None, pairing: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``group`` of classes of two rows each."""
    rows = q.shape[0] + (0 if tail is None else tail.shape[0])
    order = torch.arange(rows, device=q.device)
    group = order // 2
    return (order.view(2, -1).T.reshape(-1) if pairing == STACKED else order), group


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, positive, scale, row_ids, col_ids, exclude, pairing, both, decoupled, save, backend):
        if ctx.needs_input_grad[3]:
            scale = ops.away_from_zero(scale)
        row_lse, col_lse, cache = torch.ops.ffcl_fast.similarity_forward.default(
            q, k, scale, row_ids, col_ids, exclude, both, save, backend
        )
        logit = _positive_dot(q, k, positive, pairing) * scale
        odds, col_odds = log_odds(row_lse, col_lse if both else None, logit)
        logit = logit.to(row_lse.dtype)
        ctx.save_for_backward(q, k, positive, scale, row_ids, col_ids, row_lse, col_lse, cache, logit, odds, col_odds)
        ctx.exclude, ctx.pairing, ctx.decoupled, ctx.backend = exclude, pairing, decoupled, backend
        loss = odds_loss(odds, decoupled)
        return loss + odds_loss(col_odds, decoupled) if both else loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, k, positive, scale, row_ids, col_ids, row_lse, col_lse, cache, logit, odds, col_odds = ctx.saved_tensors
        need_q, need_k, _, need_scale = ctx.needs_input_grad[:4]
        row_grad = odds_grad(grad, odds, ctx.decoupled)
        col_grad = odds_grad(grad, col_odds, ctx.decoupled) if col_odds is not None else None
        dq, dk = torch.ops.ffcl_fast.similarity_backward.default(
            q, k, scale, row_ids, col_ids, ctx.exclude, row_lse, col_lse, row_grad,
            row_lse.new_empty(0) if col_grad is None else col_grad, cache,
            need_q or need_scale, need_k, ctx.backend,
        )  # fmt: skip
        # What the positive logits get: the opposite of their rows' (and columns') share.
        share = row_grad if col_grad is None else row_grad + col_grad
        gradients = _with_positives(q, k, positive, scale, ctx.pairing, share, logit, dq, dk, ctx.needs_input_grad)
        return *gradients, *(None,) * 8


def _with_positives(
    q: Tensor,
    k: Tensor | None,
    positive: Tensor | None,
    scale: Tensor,
    pairing: int,
    share: Tensor,
    logit: Tensor,
    dq: Tensor,
    dk: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, positive and scale that are ``needed``, from the normalisers' part dq and dk, which is
    changed, and ``share`` (N,), the gradient of the loss by the opposite of each positive's logit."""
    need_q, need_k, need_positive, need_scale = needed[:4]
    weight = share * -scale
    dscale = scale_grad(q, k, dq, scale) - (share * logit).sum() / scale if need_scale else None
    dpositive = None
    if positive is not None:
        weight = weight[:, None]
        if need_q or need_scale:
            dq.addcmul_(weight, positive)
        if need_positive:
            dpositive = (weight * q).to(q.dtype)
    elif pairing == KEYS:
        weight = weight[:, None]
        if need_q or need_scale:
            dq.addcmul_(weight, k)
        if need_k:
            dk.addcmul_(weight, q)
    elif need_q or need_scale:
        first, second = _views(q, pairing)
        d_first, d_second = _views(dq, pairing)
        one, other = _views(weight, pairing)
        weight = (one + other)[:, None]
        d_first.addcmul_(weight, second)
        d_second.addcmul_(weight, first)
    return dq if need_q else None, dk if need_k else None, dpositive, dscale


class _ContrastByKernels(torch.autograd.Function):
    """As :class:`_Contrast`, which is also how it is checked: the positives by the operators of backend ``beside``.

    The reduction belongs to it: on a GPU each operation that autograd would do for a mean and a half is a launch.
    """

    @staticmethod
    def forward(
        ctx, q, k, positive, scale, row_ids, col_ids, exclude, pairing, both, decoupled, save, reduction, backend,
        beside,
    ):  # fmt: skip
        if ctx.needs_input_grad[3]:
            scale = ops.away_from_zero(scale)
        row_lse, col_lse, cache = torch.ops.ffcl_fast.similarity_forward.default(
            q, k, scale, row_ids, col_ids, exclude, both, save, backend
        )
        loss, slope, col_slope, logit = torch.ops.ffcl_fast.positive_odds.default(
            q, k if positive is None else positive, scale, row_lse, col_lse, pairing, decoupled, beside
        )
        saved = (row_lse, col_lse, cache, slope, col_slope, logit)
        ctx.save_for_backward(q, k, positive, scale, row_ids, col_ids, *saved)
        ctx.exclude, ctx.pairing, ctx.backend, ctx.beside = exclude, pairing, backend, beside
        # What a row's loss weighs in the reduced one.
        ctx.weight = 1.0 if reduction != "mean" else 0.5 / loss.shape[0] if both else 1.0 / loss.shape[0]
        return loss if reduction == "none" else loss.sum().mul_(ctx.weight)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, k, positive, scale, row_ids, col_ids, row_lse, col_lse, cache, slope, col_slope, logit = ctx.saved_tensors
        need_q, need_k, need_positive, need_scale = ctx.needs_input_grad[:4]
        if grad.dim() == 0:
            grad = (grad * ctx.weight).expand_as(slope)
        col_grad = grad * col_slope if col_slope.numel() else col_slope
        dq, dk = torch.ops.ffcl_fast.similarity_backward.default(
            q, k, scale, row_ids, col_ids, ctx.exclude, row_lse, col_lse, grad * slope, col_grad, cache,
            need_q or need_scale, need_k, ctx.backend,
        )  # fmt: skip
        if batched(grad):  # an operator that changes its arguments has no batching rule
            share = grad * (slope + col_slope if col_slope.numel() else slope)
            tensors = q, k, positive, scale, ctx.pairing, share, logit, dq, dk
            return *_with_positives(*tensors, ctx.needs_input_grad), *(None,) * 10
        d_positive = dk if positive is None else q.new_zeros(q.shape if need_positive else (0, q.shape[1]))
        inner = torch.ops.ffcl_fast.add_positives_.default(
            q, k if positive is None else positive, scale, grad, slope, col_slope, logit, dq, d_positive, ctx.pairing,
            ctx.beside,
        )  # fmt: skip
        dscale = inner.sum() / scale if need_scale else None
        dpositive = d_positive if need_positive else None
        return (dq if need_q else None, dk if need_k else None, dpositive, dscale, *(None,) * 10)


def _views(x: Tensor, pairing: int) -> tuple[Tensor, Tensor]:
    """The rows of the first and of the second view, as views of ``x``."""
    if pairing == INTERLEAVED:
        return x[0::2], x[1::2]
    half = x.shape[0] // 2
    return x[:half], x[half:]


def _positive_dot(q: Tensor, k: Tensor | None, positive: Tensor | None, pairing: int) -> Tensor:
    if positive is None and pairing == KEYS:
        positive = k
    if positive is not None:
        return row_dot(q, positive, torch.float64)
    dots = row_dot(*_views(q, pairing), torch.float64)
    return torch.cat((dots, dots)) if pairing == STACKED else dots.repeat_interleave(2)


def odds_loss(odds: Tensor, decoupled: bool) -> Tensor:
    if decoupled:
        return odds.masked_fill(odds == -torch.inf, 0.0)
    return F.softplus(odds, threshold=_SOFTPLUS_THRESHOLD)


def odds_grad(grad: Tensor, odds: Tensor, decoupled: bool) -> Tensor:
    return grad * (odds != -torch.inf if decoupled else torch.sigmoid(odds))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, tail, k, positive, scale, *options):
        """``options``: the further arguments of contrast_forward, in its order."""
        if ctx.needs_input_grad[4]:  # a parameter may be changed in place, clamped say, before the backward pass
            scale = scale.clone()
        loss, count, state = torch.ops.ffcl_fast.contrast_forward.default(q, tail, k, positive, scale, *options)
        row_ids, col_ids, exclude, order, group, *ctx.kind, _, ctx.backend = options
        ctx.save_for_backward(q, tail, k, positive, scale, row_ids, col_ids, order, group, count, state)
        ctx.exclude = exclude
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        return loss, count

    @staticmethod
    @differentiable_once
    def backward(ctx, grad, _):
        q, tail, k, positive, scale, row_ids, col_ids, order, group, count, state = ctx.saved_tensors
        need_q, need_tail, need_k, need_positive, need_scale = ctx.needs_input_grad[:5]
        if grad is None:
            return (None,) * 16
        dq, dk, d_positive, d_scale = torch.ops.ffcl_fast.contrast_backward.default(
            q, tail, k, positive, scale, row_ids, col_ids, ctx.exclude, order, group, *ctx.kind, count, state, grad,
            need_q or need_tail, need_k, need_positive, need_scale, ctx.backend,
        )  # fmt: skip
        split = q.shape[0]
        return (
            (dq if tail is None else dq[:split]) if need_q else None,
            dq[split:] if need_tail else None,
            dk if need_k else None,
            d_positive if need_positive else None,
            d_scale if need_scale else None,
            *(None,) * 11,
        )


def log_odds(row_lse: Tensor, col_lse: Tensor | None, logit: Tensor) -> tuple[Tensor, Tensor | None]:
    """The normalisers minus the positives' float64 logits, in the accumulator dtype.

    In float64 up to the difference: at a scale of 33 each rounding of a logit to float32 costs 1e-6 of the loss.
    """
    # An infinite logit is an overflow of the inputs: NaN, as in a softmax, and not a loss of 0.
    odds = torch.add(row_lse - logit, logit, alpha=0.0).to(row_lse.dtype)
    return odds, None if col_lse is None else (col_lse - logit).to(row_lse.dtype)

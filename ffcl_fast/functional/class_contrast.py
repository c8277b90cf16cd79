"""SupCon's losses where kernels serve the positives: class sums in place of pair lists, in a few launches each way."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .similarity import differentiable_once, grad_wanted

_ops = torch.ops.ffcl_fast


def class_contrast_by_kernels(
    z: Tensor, group: Tensor, row_ids: Tensor | None, sums: Tensor, counts: Tensor, scale: Tensor, backend: str,
    beside: str,
) -> Tensor:  # fmt: skip
    """(N,) losses of the rows of z (N, D), 0 for a row without positives. No checks.

    ``group`` (N,) is the class of each row, in [0, classes); ``sums`` (classes, D) and ``counts`` (classes,) are those
    of the operator ``class_sums`` of z. ``row_ids`` (N,) are equal for a row and itself, and for a row and its positive
    where it has one only; None where none has. ``beside`` is the backend of the operators on positives.
    """
    save = grad_wanted(z, scale)
    return _ClassContrast.apply(z, group, row_ids, sums, counts, scale, save, backend, beside)


class _ClassContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, group, row_ids, sums, counts, scale, save, backend, beside):
        if ctx.needs_input_grad[5]:
            scale = ops.away_from_zero(scale)
        exclude = ops.EXCLUDE_DIAGONAL if row_ids is None else ops.EXCLUDE_SAME_ID
        row_lse, _, cache = _ops.similarity_forward.default(
            z, None, scale, row_ids, None, exclude, False, save, backend
        )
        loss, slope, logit = _ops.class_odds.default(z, sums, counts, group, scale, row_lse, beside)
        ctx.save_for_backward(z, group, row_ids, sums, counts, scale, row_lse, cache, slope, logit)
        ctx.options = exclude, backend, beside
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        z, group, row_ids, sums, counts, scale, row_lse, cache, slope, logit = ctx.saved_tensors
        exclude, backend, beside = ctx.options
        share = grad * slope
        none = row_lse.new_empty(0)
        dz, _ = _ops.similarity_backward.default(
            z, None, scale, row_ids, None, exclude, row_lse, none, share, none, cache, True, False, backend
        )
        taken, _ = _ops.class_sums.default(z, group, share, sums.shape[0], beside)
        dz, inner = _ops.add_class_positives.default(z, sums, taken, counts, group, scale, share, logit, dz, beside)
        dscale = inner.sum() / scale if ctx.needs_input_grad[5] else None
        return dz if ctx.needs_input_grad[0] else None, None, None, None, None, dscale, None, None, None

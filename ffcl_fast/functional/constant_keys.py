"""Contrast with keys that get no gradient, a queue or a memory bank, which may change before the backward pass.

With lse_i the normaliser of row i over the keys k_j and p_i its positive logit, the loss softplus(lse_i - p_i) has

    dloss/dq_i = sigmoid(lse_i - p_i) (scale sum_j exp(S_ij - lse_i) k_j - scale positive_i)

whose sum over the keys does not depend on the incoming gradient. It is made right after the normalisers, as SigLIP's
gradients are, and (N, D) of it is kept in place of the (M, D) keys: nothing reads them later, so they can be written
over at once and no copy has to protect them. The work is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .contrast import log_odds, odds_grad, odds_loss
from .similarity import apart, differentiable_once, grad_wanted, row_dot


def contrast_constant(
    q: Tensor, keys: Tensor, scale: Tensor, positive: Tensor, *, decoupled: bool = False, backend: str = "auto"
) -> Tensor:
    """As :func:`.contrast.contrast` with constant keys (M, D); q and its positives are (N, D). No checks."""
    save = grad_wanted(q, positive, scale)
    return _ContrastConstant.apply(q, keys.detach(), apart(positive, q), scale, decoupled, save, backend)


class _ContrastConstant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, keys, positive, scale, decoupled, save, backend):
        need_q, _, _, need_scale = ctx.needs_input_grad[:4]
        if need_scale:
            scale = ops.away_from_zero(scale)
        pull = save and (need_q or need_scale)
        row_lse, col_lse, cache = torch.ops.ffcl_fast.similarity_forward.default(
            q, keys, scale, None, None, ops.EXCLUDE_NONE, False, pull, backend
        )
        logit = row_dot(q, positive, torch.float64) * scale
        odds, _ = log_odds(row_lse, None, logit)
        mean_key = inner = None
        if pull:
            mean_key, _ = torch.ops.ffcl_fast.similarity_backward.default(
                q, keys, scale, None, None, ops.EXCLUDE_NONE, row_lse, col_lse, torch.ones_like(row_lse),
                row_lse.new_empty(0), cache, True, False, backend,
            )  # fmt: skip
            inner = ((row_dot(q, mean_key, torch.float64) - logit) / scale).to(row_lse.dtype) if need_scale else None
        ctx.save_for_backward(q, positive, scale, odds, mean_key, inner)
        ctx.decoupled = decoupled
        return odds_loss(odds, decoupled)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad):
        q, positive, scale, odds, mean_key, inner = ctx.saved_tensors
        need_q, _, need_positive, need_scale = ctx.needs_input_grad[:4]
        weight = odds_grad(grad, odds, ctx.decoupled)
        dscale = (weight * inner).sum() if need_scale else None
        weight = weight[:, None]
        dq = dpositive = None
        if need_q:
            dq = (weight * torch.addcmul(mean_key.to(weight.dtype), positive, -scale)).to(q.dtype)
        if need_positive:
            dpositive = (weight * -scale * q).to(q.dtype)
        return dq, None, dpositive, dscale, None, None, None

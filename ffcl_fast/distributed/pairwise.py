"""SigLIP's sum over pairs and SupCon's sums over classes, across processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..functional.class_sums import class_sums
from ..functional.similarity import row_dot, siglip_needs
from .exchange import all_reduce, gather_rows, reduce_scatter_rows
from .meeting import Meeting


def sigmoid_loss(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, meeting: Meeting, backend: str) -> Tensor:
    """SigLIP's loss summed over the pairs of this process's ``q`` (n, D) with the ``k`` of all, (). No checks.

    Gradients are made in the same pass, so the incoming gradient must be the same on every process.
    """
    return _AcrossSigLip.apply(q, k, scale, bias, meeting, torch.is_grad_enabled(), backend)


class _AcrossSigLip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale, bias, meeting, grad_enabled, backend):
        need_q, need_k, need_scale, need_bias = ctx.needs_input_grad[:4]
        if need_scale:
            scale = ops.away_from_zero(scale)
        own, others = siglip_needs(*(grad_enabled and need for need in ctx.needs_input_grad[:4]))
        acc = ops.accumulator_dtype(q)
        q, k = q.contiguous(), k.contiguous()
        loss, dbias = q.new_zeros((), dtype=torch.float64), scale.new_zeros(())
        dq = q.new_zeros(q.shape if own else 0, dtype=acc)

        def pairs(block: Tensor, positives: bool) -> Tensor:
            part, d, dk, db = torch.ops.ffcl_fast.siglip.default(q, block, scale, bias, positives, own, others, backend)
            loss.add_(part)
            if own:
                dq.add_(d)
            dbias.add_(db)
            return dk.to(acc)

        if meeting.strategy == "gather":
            everyone, mine = gather_rows(k, meeting.keys, meeting.group), meeting.own(meeting.keys)
            total = q.new_empty(everyone.shape, dtype=acc) if others else None
            for cols in (slice(0, mine.start), mine, slice(mine.stop, everyone.shape[0])):
                if cols.stop > cols.start:
                    part = pairs(everyone[cols], cols == mine)
                    if total is not None:
                        total[cols] = part
                    del part
            dk = None if total is None else reduce_scatter_rows(total, meeting.keys, meeting.group)
        else:

            def visit(step: int, owner: int, payload: list[Tensor]) -> Tensor | None:
                part = pairs(payload[0], step == 0)
                return part if others else None

            dk = meeting.ring.rotate([k], meeting.keys, meeting.world - 1, visit, Tensor.add_)
        dscale = row_dot(q, dq).sum() / scale if own and need_scale else None
        ctx.save_for_backward(
            dq.to(q.dtype) if own and need_q else None, dk, dscale, dbias if (own or others) and need_bias else None
        )
        ctx.dtype = k.dtype
        return loss.to(acc)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dq, dk, dscale, dbias = ctx.saved_tensors
        dk = None if dk is None else (dk * grad).to(ctx.dtype)
        return (
            *(None if d is None else d * grad for d in (dq,)),
            dk,
            *(None if d is None else d * grad for d in (dscale, dbias)),
            None,
            None,
            None,
        )


def class_sum(x: Tensor, group: Tensor, classes: int, meeting: Meeting) -> Tensor:
    """The total over all processes of each row's class: x (b, D), class numbers ``group`` (b,) below ``classes``."""
    return _ClassSum.apply(x, group, classes, meeting)


class _ClassSum(torch.autograd.Function):
    """A symmetric map: the gradient of the sum over processes of their losses is its own value at the gradients."""

    @staticmethod
    def forward(ctx, x, group, classes, meeting):
        ctx.save_for_backward(group)
        ctx.classes, ctx.meeting = classes, meeting
        return _class_sum(x, group, classes, meeting)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _class_sum(grad.contiguous(), *ctx.saved_tensors, ctx.classes, ctx.meeting), None, None, None


def _class_sum(x: Tensor, group: Tensor, classes: int, meeting: Meeting) -> Tensor:
    # A table of classes at a time, none larger than a block of rows: memory does not grow with classes or processes.
    height = min(classes, max(meeting.rows))
    out = torch.empty_like(x)
    for first in range(0, classes, height):
        inside = (group >= first) & (group < first + height)
        slot = torch.where(inside, group - first, height)  # the last row takes the rows of other classes
        table = class_sums(x, slot, height + 1)
        all_reduce(table[:height], meeting.group)
        out = torch.where(inside[:, None], table[slot], out)
    return out


class _MeanGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group)
        return total / torch.distributed.get_world_size(ctx.group), None


def mean_grad(x: Tensor, group) -> Tensor:
    """``x``, whose gradient becomes the mean over processes: the same on all of them, with DDP around it or not."""
    return _MeanGrad.apply(x, group) if x.requires_grad else x

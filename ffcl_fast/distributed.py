"""Gathering embeddings from every process, with the gradients that open_clip's and lightly's losses give them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``x`` (n, D) of every process, one below the other in the order of ranks: (world * n, D), no gradient.

    Every process must call it with the same shape and dtype.
    """
    world = dist.get_world_size(group)
    x = x.detach().contiguous()
    out = x.new_empty((world * x.shape[0], *x.shape[1:]))
    dist.all_gather(list(out.chunk(world)), x, group=group)
    return out


def gather_with_grad(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As :func:`gather`; the gradient of ``x`` is the sum over processes of the gradients of their copies of it."""
    return _Gather.apply(x, group)


def gather_own_grad(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As :func:`gather`, with this process's own rows attached to the graph and the others constant."""
    parts = list(gather(x, group).chunk(dist.get_world_size(group)))
    parts[dist.get_rank(group)] = x
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        return gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        # all_reduce and not reduce_scatter: every backend of torch.distributed has it.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.rows
        return grad[first : first + ctx.rows], None

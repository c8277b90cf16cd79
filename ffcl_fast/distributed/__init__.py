"""Losses over processes: gathers with the gradients of open_clip's and lightly's, and what the exact losses stand on.

``losses.py`` has the contract of the exact losses, ``similarity.py`` the two ways they go, gather and ring,
``meeting.py`` what the processes check together first, ``exchange.py`` what is sent.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import LostRank, gather_rows, told

STRATEGIES = ("auto", "gather", "ring")

__all__ = [
    "STRATEGIES",
    "LostRank",
    "gather",
    "gather_own_grad",
    "gather_uneven",
    "gather_with_grad",
    "rank",
    "world_size",
]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes of ``group`` (None: the default one), 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in ``group`` (None: the default one), 0 where there is none."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``x`` (n, D) of every process, one below the other in the order of ranks: (world * n, D), no gradient.

    Every process must call it with the same shape and dtype.
    """
    world = dist.get_world_size(group)
    x = x.detach().contiguous()
    out = x.new_empty((world * x.shape[0], *x.shape[1:]))
    with told("gathering embeddings", group):
        dist.all_gather(list(out.chunk(world)), x, group=group)
    return out


def gather_uneven(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As :func:`gather`, of processes with different numbers of rows: (sum of them, D), no gradient."""
    rows = x.new_tensor([x.shape[0]], dtype=torch.int64)
    return gather_rows(x, gather(rows, group).tolist(), group)


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

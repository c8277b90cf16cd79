"""MoCo's queue of keys (He et al. 2020) as ``negative_keys``, read where it lies."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed
from ..distributed.losses import gather_keys
from ..functional import _checks
from ..functional.similarity import normalized


class Queue(nn.Module):
    """The last ``size`` keys, unit rows (size, dim), random at first, in ``state_dict`` as ``bank`` and ``position``.

    Pass it as ``InfoNCELoss``'s ``negative_keys`` and enqueue the batch's keys at any time of the step:

        loss = criterion(query, key, queue)
        queue.enqueue(key)
        loss.backward()

    The loss reads it where it lies and makes its gradient in the same pass, so no copy is made and a later backward
    pass is right whatever has been enqueued since.

    Args:
        size: keys held.
        dim: their width.
        dtype: of the keys; that of the embeddings, or autocast's, for them to be used without a cast.
        gather: enqueue the keys of every process, in the order of ranks, so that all hold the same queue. Without a
            process group nothing changes.
        group: the processes; None for all.

    Raises:
        ValueError: a size or dim below 1.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        gather: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.size, self.dim, self.gather, self.group = size, dim, gather, group
        self.bank: Tensor
        self.position: Tensor
        self.register_buffer("bank", normalized(torch.randn(size, dim), dtype or torch.get_default_dtype()))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @property
    def keys(self) -> Tensor:
        """(size, dim) the keys, not a copy."""
        return self.bank

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Let ``keys`` (n, dim), normalised here, replace the oldest ones; n may be 0, and differ between processes.

        Across processes wrong arguments of one, NaN or infinity, and queues that differ raise on all, before any key is
        replaced; a process that is gone raises :class:`ffcl_fast.distributed.LostRank`.

        Raises:
            TypeError: not a tensor of float16, bfloat16, float32 or float64.
            ValueError: another width.
        """

        def check() -> Tensor:
            if not isinstance(keys, Tensor) or keys.dtype not in _checks.FLOATING:
                kind = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
                raise TypeError(f"keys must be a tensor of float16, bfloat16, float32 or float64, got {kind}")
            _checks.dense("keys", keys)
            if keys.dim() != 2 or keys.shape[1] != self.dim:
                raise ValueError(f"keys must have shape (n, {self.dim}), got {tuple(keys.shape)}")
            return normalized(keys.detach(), self.bank.dtype)

        if self.gather and distributed.world_size(self.group) > 1:
            keys = gather_keys("queue", (("keys", keys),), check, self.size, self.position, self.group)
        else:
            keys = check()
        skipped = max(0, keys.shape[0] - self.size)
        keys = keys[skipped:].to(self.bank)
        # Positions as a tensor: reading the number would stall an accelerator.
        places = (self.position + skipped + torch.arange(keys.shape[0], device=keys.device)) % self.size
        self.bank.index_copy_(0, places, keys)
        self.position.copy_((self.position + skipped + keys.shape[0]) % self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"

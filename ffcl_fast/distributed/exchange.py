"""What the losses send between processes: collectives over rows of uneven number, a ring, and an error that all hear.

A rank that is gone shows as soon as its connection breaks, at the latest after the process group's own timeout
(``init_process_group(timeout=...)``); either way the others raise :class:`LostRank`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# Named so since PyTorch 2.14; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class LostRank(RuntimeError):
    """A collective of a loss did not finish: another process has died, raised, or not come in time."""


@contextmanager
def told(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Turn what a backend says about a failed collective into :class:`LostRank`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LostRank(
            f"{what} did not finish on rank {dist.get_rank(group)}: another process of the {dist.get_world_size(group)}"
            f" has died, has raised, or did not come within the process group's timeout ({reason})"
        ) from error


def of_backend(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says ``error``: that a process is gone or silent."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def gather_rows(x: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """``x`` (rows[rank], ...) of every process one below the other in the order of ranks: (sum of rows, ...)."""
    most = max(rows)
    x = _padded(x.detach(), most)
    out = x.new_empty((most * len(rows), *x.shape[1:]))
    with told("gathering embeddings", group):
        _all_gather(out, x, group=group)
    if min(rows) == most:
        return out
    return torch.cat([part[:n] for part, n in zip(out.split(most), rows, strict=True)])


def reduce_scatter_rows(x: Tensor, rows: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """This process's rows of the sum over processes of ``x`` (sum of rows, ...): (rows[rank], ...)."""
    most = max(rows)
    if min(rows) != most:
        x = torch.cat([_padded(part, most) for part in x.split(list(rows))])
    out = x.new_empty((most, *x.shape[1:]))
    with told("returning gradients to their owners", group):
        _reduce_scatter(out, x.contiguous(), group=group)
    return out[: rows[dist.get_rank(group)]]


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat((x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))))


def all_reduce(x: Tensor, group: dist.ProcessGroup | None, op=dist.ReduceOp.SUM) -> Tensor:
    """``x``, reduced in place over the processes."""
    with told("reducing sums", group):
        dist.all_reduce(x, op=op, group=group)
    return x


def all_reduce_lse(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log of the sum over processes of exp(x): the largest first, so that nothing overflows. -inf counts as 0."""
    largest = all_reduce(x.clone(), group, dist.ReduceOp.MAX)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    return all_reduce((x - shift).exp_(), group).log_().add_(shift)


class Ring:
    """Blocks of rows that go round the processes of ``group``, from each to the one on its left (rank - 1)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def start(self, tensors: Sequence[Tensor], rows: int, hops: int = 1) -> Callable[[], list[Tensor]]:
        """Send ``tensors`` ``hops`` to the left, or right where negative, and expect as many with ``rows`` rows.

        The returned function waits and returns what came; until then neither side may be written to.
        """
        tensors = [x.contiguous() for x in tensors]
        received = [x.new_empty((rows, *x.shape[1:])) for x in tensors]
        to, source = (self._global((self.rank + sign * hops) % self.world) for sign in (-1, 1))
        operations = [dist.P2POp(dist.isend, x, to, self.group) for x in tensors]
        operations += [dist.P2POp(dist.irecv, x, source, self.group) for x in received]
        with told("passing embeddings round the ring", self.group):
            works = dist.batch_isend_irecv(operations)

        def wait() -> list[Tensor]:
            with told("passing embeddings round the ring", self.group):
                for work in works:
                    work.wait()
            del tensors[:]
            return received

        return wait

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group or dist.group.WORLD, rank)

    def rotate(
        self,
        payload: Sequence[Tensor],
        rows: Sequence[int],
        steps: int,
        compute: Callable[[int, int, list[Tensor]], Tensor | None],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor | None:
        """Let every process's ``payload`` (rows[rank], ...) visit this one and ``steps`` more to its left.

        ``compute(step, owner, payload)`` runs while the next payload is on its way. What it returns for a block, (rows
        of the owner, ...) or None, travels with the block, is merged with what the next process returns (``merge`` may
        write into its first argument), and goes home at the end: returned is what the others, and ``compute`` here at
        step 0, had to say about this process's rows.
        """
        payload, arriving, part = list(payload), None, None
        for step in range(steps + 1):
            owner = (self.rank + step) % self.world
            following = rows[(owner + 1) % self.world]
            last = step == steps
            coming = None if last else self.start(payload, following)
            part = compute(step, owner, payload)
            if part is not None:
                if arriving is not None:
                    part = merge(part, arriving()[0])
                arriving = None if last else self.start([part], following)
            if coming is not None:
                payload = coming()
        if part is None:
            return None
        return self.start([part], rows[self.rank], -steps)()[0]

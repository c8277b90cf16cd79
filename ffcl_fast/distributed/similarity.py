"""Normalisers of S = scale q k^T whose rows and columns are spread over processes, and their gradients.

Process r holds anchors q_r and keys k_r and answers for the rows of q_r and the columns of k_r. Two ways to the same
numbers (docs/large_batches.md, "Losses across processes"):

- gather: every process holds all keys, runs its rows against them in one pass that gives both sums, and combines column
  sums by an all-reduce in (max, sum) form; the gradients of the keys go home by a reduce-scatter.
- ring: blocks of keys visit every process, the next one being on its way while a product runs; column sums and
  gradients of keys travel with their block. Memory is two blocks and their gradients, however many processes there are.

Where the anchors are the keys, S is symmetric: each pair of blocks is computed by one of its two owners, half the work.

Backward gives the gradient of the sum over processes of what their losses returned, see ``losses.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..functional.similarity import scale_grad
from .exchange import all_reduce_lse, gather_rows, reduce_scatter_rows
from .meeting import Meeting


def lse(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    meeting: Meeting,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    across: bool = False,
    both: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Normalisers of this process's rows (n,) and, if ``both``, columns (m,), over the blocks of all processes.

    k None means q. Pairs of equal ``row_ids`` (n,) and ``col_ids`` (m,) are left out; unless ``across`` such pairs are
    known to lie in this process's own block only. No checks.
    """
    both = both and k is not None
    out = _AcrossLSE.apply(q, k, scale, row_ids, row_ids if k is None else col_ids, across, both, meeting, backend)
    return out if both else (out, None)


class _AcrossLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale, row_ids, col_ids, across, both, meeting, backend):
        if ctx.needs_input_grad[2]:
            scale = ops.away_from_zero(scale)
        q = q.contiguous()
        k = None if k is None else k.contiguous()
        # The rank's number in the group, not the pointer: saved so that backward asks nothing of the forward's tensors.
        ctx.work = _Blocks(scale, across, both, meeting, backend, k is None)
        run = _gather_forward if meeting.strategy == "gather" else _ring_forward
        row, col, gathered = run(ctx.work, q, k, row_ids, col_ids)
        ctx.save_for_backward(q, k, row_ids, col_ids, row, col, *gathered)
        acc = ops.accumulator_dtype(q)
        return (row.to(acc), col.to(acc)) if both else row.to(acc)

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad, col_grad=None):
        q, k, row_ids, col_ids, row, col, *gathered = ctx.saved_tensors
        work = ctx.work
        need_q, need_k, need_scale = ctx.needs_input_grad[:3]
        sides = [_Side(row, row_grad)] + ([_Side(col, col_grad)] if work.both else [])
        run = _gather_backward if work.meeting.strategy == "gather" else _ring_backward
        dq, dk = run(work, q, k, row_ids, col_ids, sides, gathered, need_q or need_scale, need_k)
        dscale = scale_grad(q, k, dq, work.scale) if need_scale else None
        return (
            dq.to(q.dtype) if need_q else None,
            dk.to(k.dtype) if need_k and k is not None else None,
            dscale,
            *(None,) * 6,
        )


class _Side:
    """Normalisers kept in float64 as the accumulator dtype and a weight: exp(S - lse) grad = exp(S - lse') weight."""

    def __init__(self, lse: Tensor, grad: Tensor) -> None:
        self.lse = lse.to(grad.dtype)
        rest = (lse - self.lse).nan_to_num_(nan=0.0)  # -inf: no pair, no gradient
        self.weight = (grad * torch.exp(-rest)).to(grad.dtype)


class _Blocks:
    """The operators on one block of S; ids count only in blocks where equal ones can be."""

    def __init__(self, scale, across, both, meeting: Meeting, backend, symmetric: bool) -> None:
        self.scale, self.across, self.both, self.meeting, self.backend = scale, across, both, meeting, backend
        self.symmetric = symmetric

    def _ids(self, row_ids, col_ids, own: bool):
        if row_ids is None or not (own or self.across):
            return None, None, ops.EXCLUDE_NONE
        return row_ids, col_ids, ops.EXCLUDE_SAME_ID

    def forward(self, q, k, row_ids, col_ids, own: bool, both: bool) -> tuple[Tensor, Tensor]:
        row_ids, col_ids, exclude = self._ids(row_ids, col_ids, own)
        row, col, _ = torch.ops.ffcl_fast.similarity_forward.default(
            q, k, self.scale, row_ids, None if k is None else col_ids, exclude, both, False, self.backend
        )
        return row.double(), col.double()

    def backward(self, q, k, row_ids, col_ids, own: bool, row: _Side, col: _Side | None, need_q, need_k):
        row_ids, col_ids, exclude = self._ids(row_ids, col_ids, own)
        none = row.lse.new_empty(0)
        dq, dk = torch.ops.ffcl_fast.similarity_backward.default(
            q, k, self.scale, row_ids, None if k is None else col_ids, exclude, row.lse,
            none if col is None else col.lse, row.weight, none if col is None else col.weight,
            torch.empty(0, dtype=torch.float32, device=q.device), need_q, need_k, self.backend,
        )  # fmt: skip
        return dq.to(row.lse.dtype), dk.to(row.lse.dtype)


def half_steps(world: int) -> int:
    """How many neighbours' blocks a process computes where S is symmetric."""
    return world // 2


def halved(rank: int, owner: int, step: int, rows: tuple[int, ...]) -> tuple[slice, slice]:
    """(own rows, the owner's rows) of the part of a symmetric S that ``rank`` computes at ``step``.

    The process opposite in an even ring meets this one at the same step: one takes the first half of the lower one's
    rows, the other the rest.
    """
    whole = slice(0, rows[rank]), slice(0, rows[owner])
    if len(rows) % 2 or step != len(rows) // 2:
        return whole
    if rank < owner:
        return slice(0, rows[rank] // 2), whole[1]
    return whole[0], slice(rows[owner] // 2, rows[owner])


def _cut(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def _empty(*parts: slice) -> bool:
    return any(part.stop <= part.start for part in parts)


# --- gather ----------------------------------------------------------------------------------------------------------


def _gather_forward(work: _Blocks, q, k, row_ids, col_ids):
    meeting, group = work.meeting, work.meeting.group
    keys = meeting.keys
    everyone = gather_rows(q if k is None else k, keys, group)
    all_ids = None
    if row_ids is not None and (work.across or not work.symmetric):
        all_ids = gather_rows(col_ids, keys, group)
    saved = (everyone, all_ids)
    if not work.symmetric:
        row, col = work.forward(q, everyone, row_ids, all_ids, True, work.both)
        if work.both:
            return row, all_reduce_lse(col, group)[meeting.own(keys)], saved
        return row, None, saved
    total = q.new_full((everyone.shape[0],), -torch.inf, dtype=torch.float64)
    total[meeting.own(keys)] = work.forward(q, None, row_ids, None, True, False)[0]
    for mine, rows, cols in _symmetric_parts(meeting):
        row, col = work.forward(q[mine], everyone[cols], _cut(row_ids, mine), _cut(all_ids, cols), False, True)
        total[rows] = torch.logaddexp(total[rows], row)
        total[cols] = torch.logaddexp(total[cols], col)
    return all_reduce_lse(total, group)[meeting.own(keys)], None, saved


def _gather_backward(work: _Blocks, q, k, row_ids, col_ids, sides, gathered, need_q, need_k):
    meeting, group = work.meeting, work.meeting.group
    everyone, all_ids = gathered
    keys = meeting.keys
    row = sides[0]
    if not work.symmetric:
        col = _gathered(sides[1], keys, group) if work.both else None
        dq, dk = work.backward(q, everyone, row_ids, all_ids, True, row, col, need_q, need_k)
        return dq, reduce_scatter_rows(dk, keys, group) if need_k else None
    everywhere = _gathered(row, keys, group)
    total = q.new_zeros(everyone.shape, dtype=row.lse.dtype)
    total[meeting.own(keys)] = work.backward(q, None, row_ids, None, True, row, None, True, False)[0]
    for mine, rows, cols in _symmetric_parts(meeting):
        dq, dk = work.backward(
            q[mine], everyone[cols], _cut(row_ids, mine), _cut(all_ids, cols), False,
            _part(everywhere, rows), _part(everywhere, cols), True, True,
        )  # fmt: skip
        total[rows] += dq
        total[cols] += dk
    return reduce_scatter_rows(total, keys, group), None


def _symmetric_parts(meeting: Meeting):
    """(own rows counted from 0, the same among all rows, the other's among all rows) this process computes."""
    rank, world, rows = meeting.rank, meeting.world, meeting.keys
    first = meeting.own(rows).start
    for step in range(1, half_steps(world) + 1):
        owner = (rank + step) % world
        mine, other = halved(rank, owner, step, rows)
        start = sum(rows[:owner])
        if not _empty(mine, other):
            yield (
                mine,
                slice(first + mine.start, first + mine.stop),
                slice(start + other.start, start + other.stop),
            )


def _side_of(lse: Tensor, weight: Tensor) -> _Side:
    side = _Side.__new__(_Side)
    side.lse, side.weight = lse, weight
    return side


def _gathered(side: _Side, rows, group) -> _Side:
    both = gather_rows(torch.stack((side.lse, side.weight), 1), rows, group)
    return _side_of(both[:, 0].contiguous(), both[:, 1].contiguous())


def _part(side: _Side, rows: slice) -> _Side:
    return _side_of(side.lse[rows], side.weight[rows])


# --- ring ------------------------------------------------------------------------------------------------------------


def _steps(work: _Blocks) -> int:
    return half_steps(work.meeting.world) if work.symmetric else work.meeting.world - 1


def _travelling(block: Tensor, ids: Tensor | None, work: _Blocks) -> list[Tensor]:
    # ids stay at home where no other block can hold equal ones
    return [block] if ids is None or not work.across else [block, ids]


def _ring_forward(work: _Blocks, q, k, row_ids, col_ids):
    meeting, row = work.meeting, None

    def compute(step, owner, payload):
        nonlocal row
        if step == 0:  # inside the rotation, so that the first block is on its way meanwhile
            row, col = work.forward(q, k, row_ids, col_ids, True, work.both)
            return col if work.both else None
        block, ids = payload[0], payload[1] if len(payload) > 1 else None
        if not work.symmetric:
            r, c = work.forward(q, block, row_ids, ids, False, work.both)
            row = torch.logaddexp(row, r)
            return c if work.both else None
        mine, other = halved(meeting.rank, owner, step, meeting.keys)
        part = q.new_full((block.shape[0],), -torch.inf, dtype=torch.float64)
        if not _empty(mine, other):
            r, c = work.forward(q[mine], block[other], _cut(row_ids, mine), _cut(ids, other), False, True)
            row[mine] = torch.logaddexp(row[mine], r)
            part[other] = c
        return part

    payload = _travelling(q if k is None else k, col_ids, work)
    home = meeting.ring.rotate(payload, meeting.keys, _steps(work), compute, torch.logaddexp)
    if work.symmetric:
        return torch.logaddexp(row, home), None, ()
    return row, home, ()


def _ring_backward(work: _Blocks, q, k, row_ids, col_ids, sides, gathered, need_q, need_k):
    meeting = work.meeting
    row = sides[0]
    visitor = row if work.symmetric else (sides[1] if work.both else None)
    dq = None

    def compute(step, owner, payload):
        nonlocal dq
        if step == 0:
            col = None if work.symmetric else visitor
            dq, dk = work.backward(q, k, row_ids, col_ids, True, row, col, need_q or work.symmetric, need_k)
            return dk if need_k and not work.symmetric else None
        block, *rest = payload
        col = _side_of(*rest[0].unbind(1)) if visitor is not None else None
        if col is not None:
            col.lse, col.weight = col.lse.contiguous(), col.weight.contiguous()
        ids = rest[-1] if work.across and row_ids is not None else None
        if not work.symmetric:
            d, dk = work.backward(q, block, row_ids, ids, False, row, col, need_q, need_k)
            if need_q:
                dq.add_(d)
            return dk if need_k else None
        mine, other = halved(meeting.rank, owner, step, meeting.keys)
        if _empty(mine, other):
            return q.new_zeros(block.shape, dtype=row.lse.dtype)
        d, dk = work.backward(
            q[mine], block[other], _cut(row_ids, mine), _cut(ids, other), False,
            _part(row, mine), _part(col, other), True, True,
        )  # fmt: skip
        dq[mine] += d
        if dk.shape == block.shape:
            return dk
        part = q.new_zeros(block.shape, dtype=row.lse.dtype)
        part[other] = dk
        return part

    payload = [q if k is None else k]
    if visitor is not None:
        payload.append(torch.stack((visitor.lse, visitor.weight), 1))
    if work.across and row_ids is not None:
        payload.append(row_ids if k is None else col_ids)
    home = meeting.ring.rotate(payload, meeting.keys, _steps(work), compute, Tensor.add_)
    if work.symmetric:
        return dq.add_(home), None
    return dq, home

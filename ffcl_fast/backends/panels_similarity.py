"""Similarity and SigLIP in plain PyTorch over tiles of S: any device, no host synchronisation on accelerators.

Workspace is a few tiles (:func:`tile_of`) whatever N and M are, plus a float32 copy of the gradients for float16 and
bfloat16 inputs. Bound by the matrix product at large D and by the element-wise passes over a tile at small D.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .mixed_products import mixed_product


class Tile(NamedTuple):
    """How S is cut."""

    elements: int
    columns: int
    self_rows: int  # where S is symmetric: few, so that little is wasted on the diagonal's tiles


CPU_TILE = Tile(1 << 20, 4096, 256)  # 4 MiB of float32: a tile and its exponential stay in the L2 and L3 caches
# 64 MiB. No cache holds that; but an operation on a small tile is done before the host has launched the next.
ACCELERATOR_TILE = Tile(1 << 24, 8192, 2048)


def tile_of(device: torch.device) -> Tile:
    return CPU_TILE if device.type == "cpu" else ACCELERATOR_TILE


# Where |S| <= bound is known, e = exp(S - offset) with one offset for all pairs serves rows and columns at once. With
# these two the smallest e is exp(-2 * 65 + 44) = exp(-86), still a normal float32, and a sum of 2^32 stays finite.
_LARGEST_BOUND = 65.0
_HEADROOM = 44.0


@dataclass
class _Tiles:
    """S = scale q k^T a tile at a time."""

    q: Tensor
    k: Tensor | None
    scale: Tensor
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    exclude: int = ops.EXCLUDE_NONE

    def __post_init__(self) -> None:
        self.symmetric = self.k is None
        if self.k is None:
            self.k, self.col_ids = self.q, self.row_ids
        self.acc = ops.accumulator_dtype(self.q)
        # Sums over many tiles: float64 costs nothing here, they are vectors. MPS has no float64.
        self.wide = torch.float64 if self.q.device.type != "mps" else self.acc

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of every tile; where S is symmetric, of those on and above the diagonal."""
        n, m = self.q.shape[0], self.k.shape[0]
        tile = tile_of(self.q.device)
        step = min(m, tile.columns)
        # Off the CPU, where tiles are large, copies of a narrow tile's rows are to be no larger either.
        widest = step if self.q.device.type == "cpu" else max(step, self.q.shape[1])
        height = tile.self_rows if self.symmetric else max(1, tile.elements // max(1, widest))
        for i in range(0, n, height):
            rows = slice(i, min(i + height, n))
            first = 0
            if self.symmetric:
                yield rows, rows
                first = rows.stop
            for j in range(first, m, step):
                yield rows, slice(j, min(j + step, m))

    def logits(self, rows: slice, cols: slice) -> Tensor:
        q, k = self.q[rows], self.k[cols]
        if mixed_product(q.device, q.dtype):
            tile = torch.mm(q, k.T, out_dtype=self.acc)
        else:
            tile = q.to(self.acc) @ k.to(self.acc).T
        # After the product: scaling q first rounds each of its elements, which costs up to four times the error.
        return tile.mul_(self.scale)

    def fill_excluded_(self, tile: Tensor, rows: slice, cols: slice, value: float) -> Tensor:
        """Write ``value`` at the pairs left out."""
        if self.exclude == ops.EXCLUDE_NONE:
            return tile
        if self.exclude == ops.EXCLUDE_DIAGONAL:
            diagonal_of(tile, rows, cols).fill_(value)
            return tile
        mask = self.row_ids[rows, None] == self.col_ids[None, cols]
        if self.exclude == ops.EXCLUDE_SAME_ID_OFF_DIAGONAL:
            diagonal_of(mask, rows, cols).fill_(False)
        elif self.exclude == ops.EXCLUDE_DIFFERENT_ID:
            mask.logical_not_()
        return tile.masked_fill_(mask, value)

    def offset(self) -> float | None:
        """The offset that serves every pair, or None where |S| is too large for one or cannot be known cheaply."""
        if self.q.device.type != "cpu" or not self.q.numel() or not self.k.numel():
            return None
        largest = [torch.linalg.vector_norm(x, dim=1, dtype=self.acc).amax() for x in (self.q, self.k)]
        bound = float(self.scale.abs() * largest[0] * largest[1])
        return max(0.0, bound - _HEADROOM) if bound <= _LARGEST_BOUND else None

    def accumulate(self, out: Tensor, g: Tensor, x: Tensor) -> None:
        """``out += g x`` in the accumulator dtype."""
        if x.dtype == torch.bfloat16 and mixed_product(x.device, x.dtype):  # float16 would lose small gradients
            out += torch.mm(g.to(x.dtype), x, out_dtype=self.acc)
        else:
            out.addmm_(g, x.to(self.acc))


def diagonal_of(tile: Tensor, rows: slice, cols: slice) -> Tensor:
    """The elements (i, i) of the whole matrix that lie in this tile; may be empty. A view."""
    first, last = max(rows.start, cols.start), min(rows.stop, cols.stop)
    if first >= last:
        return tile[:0, 0]
    return tile[first - rows.start : last - rows.start, first - cols.start : last - cols.start].diagonal()


def cache_size(q: Tensor, k: Tensor | None) -> int:
    """One float a row and a column: what rounding a normaliser to the accumulator dtype left over."""
    return q.shape[0] + (0 if k is None else k.shape[0])


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    tiles = _Tiles(q, k, scale, row_ids, col_ids, exclude)
    both = both and k is not None
    offset = tiles.offset()
    empty = 0.0 if offset is not None else -torch.inf
    row = q.new_full((q.shape[0],), empty, dtype=tiles.wide)
    col = q.new_full((k.shape[0] if both else 0,), empty, dtype=tiles.wide)
    for rows, cols in tiles:
        if k is None:
            sides = [(row[rows], 1)] if rows == cols else [(row[rows], 1), (row[cols], 0)]
        else:
            sides = [(row[rows], 1), (col[cols], 0)] if both else [(row[rows], 1)]
        tile = tiles.logits(rows, cols)
        if offset is None:
            tiles.fill_excluded_(tile, rows, cols, -torch.inf)
            for total, dim in sides:
                total.copy_(torch.logaddexp(total, _wide_logsumexp(tile, dim, total.dtype)))
        else:
            tile = (tile.sub_(offset) if offset else tile).exp_()
            tiles.fill_excluded_(tile, rows, cols, 0.0)
            for total, dim in sides:
                total += tile.sum(dim)
    if offset is not None:
        row, col = row.log_().add_(offset), col.log_().add_(offset)
    row_lse, col_lse = row.to(tiles.acc), col.to(tiles.acc)
    cache = q.new_empty(0, dtype=torch.float32)
    if save:
        cache = torch.cat((row - row_lse, (col - col_lse) if both or k is None else col.new_zeros(k.shape[0])))
        cache = cache.nan_to_num_(nan=0.0).to(torch.float32)
    return row_lse, col_lse, cache


def _wide_logsumexp(tile: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """logsumexp in ``dtype`` of a tile in a narrower one: the largest element and the logarithm are added unrounded."""
    largest = tile.amax(dim, keepdim=True)
    largest = largest.masked_fill_(largest == -torch.inf, 0.0)
    return (tile - largest).exp_().sum(dim).to(dtype).log_().add_(largest.squeeze(dim))


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    tiles = _Tiles(q, k, scale, row_ids, col_ids, exclude)
    need_k = need_k and k is not None
    dq = q.new_zeros(q.shape if need_q else (0, q.shape[1]), dtype=tiles.acc)
    dk = q.new_zeros(k.shape if need_k else (0, q.shape[1]), dtype=tiles.acc)
    row_rest, col_rest = cache.split((q.shape[0], cache.numel() - q.shape[0])) if cache.numel() else (None, None)
    if k is None:
        col_lse, col_grad, col_rest = row_lse, row_grad, row_rest
    offset = tiles.offset()
    # The scale of dq = scale G k is folded into the vectors: nothing is multiplied by it twice.
    sides = [_side(row_lse, row_rest, row_grad * scale, offset)]
    if col_grad.numel():
        sides.append(_side(col_lse, col_rest, col_grad * scale, offset))
    for rows, cols in tiles:
        g = tiles.logits(rows, cols)
        views = [(shift, weight, s) for (shift, weight), s in zip(sides, ((rows, None), (None, cols)), strict=False)]
        if offset is None:
            g = sum((g - shift[s]).exp_().mul_(weight[s]) for shift, weight, s in views)
        else:
            g = (g.sub_(offset) if offset else g).exp_().mul_(sum(weight[s] for _, weight, s in views))
        tiles.fill_excluded_(g, rows, cols, 0.0)
        if need_q:
            tiles.accumulate(dq[rows], g, tiles.k[cols])
        if need_k:
            tiles.accumulate(dk[cols], g.T, q[rows])
        elif k is None and need_q and rows != cols:
            tiles.accumulate(dq[cols], g.T, q[rows])
    return dq.to(q.dtype), dk.to(q.dtype)


def _side(lse: Tensor, rest: Tensor | None, grad: Tensor, offset: float | None) -> tuple[Tensor, Tensor]:
    """What multiplies exp(S - shift) on one side: (shift, weight), weight 0 where the normaliser is -inf.

    ``lse + rest`` is the normaliser before it was rounded; exp(-rest) goes into the weight.
    """
    nothing = lse == -torch.inf
    if rest is not None:
        grad = grad * torch.exp(-rest)
    if offset is None:
        return lse.masked_fill(nothing, torch.inf), grad
    return lse, (grad * torch.exp(offset - lse)).masked_fill_(nothing, 0.0)


def siglip(q, k, scale, bias, positives, need_q, need_k):
    tiles = _Tiles(q, k, scale)
    loss = q.new_zeros((), dtype=tiles.wide)
    dbias = q.new_zeros((), dtype=tiles.wide)
    dq = q.new_zeros(q.shape if need_q else (0, q.shape[1]), dtype=tiles.acc)
    dk = q.new_zeros(k.shape if need_k else (0, q.shape[1]), dtype=tiles.acc)
    for rows, cols in tiles:
        x = tiles.logits(rows, cols).add_(bias)
        if positives:
            diagonal_of(x, rows, cols).neg_()  # softplus(-x) there
        loss += F.softplus(x, threshold=50.0).sum()
        if need_q or need_k:
            g = x.sigmoid_()
            if positives:
                diagonal_of(g, rows, cols).neg_()
            dbias += g.sum()
            g.mul_(scale)
            if need_q:
                tiles.accumulate(dq[rows], g, k[cols])
            if need_k:
                tiles.accumulate(dk[cols], g.T, q[rows])
    return loss.to(tiles.acc), dq.to(q.dtype), dk.to(q.dtype), dbias.to(tiles.acc)

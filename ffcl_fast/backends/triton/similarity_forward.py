"""Row and column log-sum-exps of S = scale q k^T from one pass over its tiles, nothing of S's size stored.

Three launches: the largest norms (they bound every |S_ij| without a host synchronisation), the partial sums, and a
reduction that also rescues what the bound lost. Long problems run the last two once per chunk of rows, so that partial
sums never take more than ``config.WORKSPACE`` bytes. No atomics: every number is summed in one fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..aligned import aligned_rows
from . import config, tuning
from .config import Tile, cdiv, next_power_of_2
from .launch import (
    Launch,
    Share,
    id_ranges,
    ids_of,
    kinds,
    leaves_out_equal_ids,
    measure,
    on,
    operand,
    planned,
    processors,
    smallest_grain,
    tile_constants,
)
from .tiles import (
    ANY_IDS,
    BOUND_LIMIT,
    IDS_APART,
    IDS_MEET,
    dot,
    exponent,
    folded,
    grouped,
    ids_meet,
    kept,
    load_tile,
    log2_of,
    needs_mask,
    offset,
    product,
    touches_diagonal,
)

SPAN = 8  # tiles on a side of a block's super-tile, where that leaves enough super-tiles to fill the chip
# Which super-tiles a launch of sums_kernel has: all, or of the triangle (k = q) those on and above the diagonal, above
# it alone, on it alone. Masks cost registers, hence large tiles: what needs none has a launch of its own.
ALL = tl.constexpr(0)
UPPER = tl.constexpr(1)
ABOVE = tl.constexpr(2)
ON_DIAGONAL = tl.constexpr(3)
NORM_ROWS = 64  # 16 KiB of 16-bit numbers a step: fewer in flight would not fill the memory bus


# How it works: PARTS blocks a side, each strides over the rows, squares and adds in float32, keeps the largest.
# Bound by memory: one read of q and k, against N M D / 64 bytes' worth of tile loads in the main kernel.
@triton.jit(do_not_specialize=["rows", "cols"])
def norm_kernel(q, k, norms, rows, cols, q_stride, k_stride, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
                UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    part = tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(norms + part, largest_norm(q, part, rows, q_stride, WIDTH, DEPTH, UNIT, BLOCK, PARTS))
    else:
        tl.store(norms + PARTS + part, largest_norm(k, part, cols, k_stride, WIDTH, DEPTH, UNIT, BLOCK, PARTS))


@triton.jit
def largest_norm(x, part, rows, stride, WIDTH: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
                   BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Largest norm of every PARTS-th block of rows."""
    best = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(part * BLOCK, rows, PARTS * BLOCK):
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for depth in range(0, WIDTH, DEPTH):
            a = load_tile(x, row, depth, rows, stride, WIDTH, BLOCK, DEPTH, UNIT, False).to(tl.float32)
            squares += tl.sum(a * a, 1)
        # NaN and overflow would spoil rows that have neither; those that have are caught by their own sums.
        best = tl.maximum(best, tl.where(squares < float("inf"), squares, 0.0))
    return tl.sqrt(tl.max(best, 0))


# How it works: a block owns a super-tile of SPAN x `col_tiles` tiles and walks down each column of tiles. One exp2 an
# element feeds both sums. Column sums stay where the product left them: with FOLD only rows that one thread holds are
# added per tile, and threads and warps meet once a column of tiles. Row sums of the super-tile are a (SPAN, BLOCK_ROWS)
# register tensor. So 2 N M / (super-tile side) floats leave the chip. Where k = q only tiles that touch or lie above
# the diagonal run, and both sums belong to one vector. Tiles without a tail, diagonal or ids skip the masks.
# Bound by: L2, which hands out 32 KiB for a step of a tile, and tensor cores for D >= 256; below, exp2 (16 a clock and
# multiprocessor) takes 128 / D of the product's time. Blocks small enough for two on a multiprocessor let one's
# exponentials run beside the other's products.
@triton.jit(do_not_specialize=["rows", "cols", "row_begin", "row_end"])
def sums_kernel(q, k, scale, row_ids, col_ids, row_ranges, col_ranges, norms, row_part, col_part, rows, cols,
                row_begin, row_end, q_stride, k_stride, col_tiles, supers, headroom, WIDTH: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
                DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, EXCLUDE: tl.constexpr, BOTH: tl.constexpr,
                CELLS: tl.constexpr, SPAN: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr,
                PARTS: tl.constexpr, GRAIN: tl.constexpr, IDS: tl.constexpr):
    side: tl.constexpr = SPAN * BLOCK_ROWS
    halved: tl.constexpr = CELLS == UPPER or CELLS == ON_DIAGONAL  # there are tiles below the diagonal
    first = row_begin // side
    last = tl.cdiv(row_end, side)
    pid = tl.program_id(0)
    if CELLS == UPPER:
        super_row, super_col = folded(pid, first, last, supers, GROUP)
        if super_col >= supers:
            return
    elif CELLS == ABOVE:
        # Without its diagonal a triangle is one with a row and a column less.
        super_row, super_col = folded(pid, first, tl.minimum(last, supers - 1), supers - 1, GROUP)
        super_col += 1
        if super_col >= supers:
            return
    elif CELLS == ON_DIAGONAL:
        super_row = first + pid
        super_col = super_row
    else:
        super_row, super_col = grouped(pid, last - first, supers, GROUP)
        super_row += first
    if IDS != ANY_IDS:
        meet = ids_meet(row_ranges, super_row * side, rows, col_ranges, super_col * side, cols, side, GRAIN)
        if CELLS == UPPER:  # the diagonal needs masks anyway
            meet = meet | (super_row == super_col)
        if meet == (IDS == IDS_APART):
            return
    scale_value = tl.load(scale).to(tl.float32)
    bound, c = offset(scale_value, norms, headroom, PARTS, CELLS != ALL)
    if bound > BOUND_LIMIT:
        return
    s, _ = exponent(scale_value)
    row = super_row * side
    col = super_col * (col_tiles * BLOCK_COLS)
    span = tl.arange(0, SPAN)
    row_sums = tl.zeros((SPAN, BLOCK_ROWS), dtype=tl.float32)
    tiles = tl.minimum(SPAN, tl.cdiv(row_end - row, BLOCK_ROWS))
    for j in range(0, tl.minimum(col_tiles, tl.cdiv(cols - col, BLOCK_COLS))):
        at = col + j * BLOCK_COLS
        end = tiles
        if halved:
            end = tl.minimum(tiles, tl.cdiv(at + BLOCK_COLS - row, BLOCK_ROWS))
        if WIDTH <= DEPTH:
            y = load_tile(k, at, 0, cols, k_stride, WIDTH, BLOCK_COLS, DEPTH, UNIT, DESCRIPTOR)
        if BOTH:
            col_sums = fold_rows(tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32), FOLD)
        for i in range(0, end):
            r = row + i * BLOCK_ROWS
            if WIDTH <= DEPTH:
                x = load_tile(q, r, 0, rows, q_stride, WIDTH, BLOCK_ROWS, DEPTH, UNIT, DESCRIPTOR)
                acc = dot(x, y.T, tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32), PRECISION)
            else:
                acc = product(q, k, r, at, rows, cols, q_stride, k_stride, WIDTH, BLOCK_ROWS, BLOCK_COLS, DEPTH, UNIT,
                              DESCRIPTOR, PRECISION)
            t = acc * s - c
            masked = needs_mask(r, at, rows, cols, row_ranges, col_ranges, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, GRAIN)
            if halved:
                masked = masked | touches_diagonal(r, at, BLOCK_ROWS, BLOCK_COLS)
            if masked:
                keep = kept(r, at, rows, cols, row_ids, col_ids, EXCLUDE, BLOCK_ROWS, BLOCK_COLS)
                if halved:
                    # Below the diagonal its mirror speaks; the diagonal's two halves meet again in the vector.
                    above = (at + tl.arange(0, BLOCK_COLS))[None, :] - (r + tl.arange(0, BLOCK_ROWS))[:, None]
                    keep = keep & (above >= 0)
                    t = tl.where(above == 0, t - 1.0, t)
                t = tl.where(keep, t, -float("inf"))
            e = tl.exp2(t)
            row_sums += tl.where(span[:, None] == i, tl.sum(e, 1)[None, :], 0.0)
            if BOTH:
                col_sums += fold_rows(e, FOLD)
        if BOTH:
            index = at + tl.arange(0, BLOCK_COLS)
            to = col_part + (super_row - first).to(tl.int64) * cols + index
            tl.store(to, all_rows(col_sums, FOLD), mask=index < cols)
    index = row + span[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    to = row_part + super_col.to(tl.int64) * (row_end - row_begin) + (index - row_begin)
    tl.store(to, row_sums, mask=index < row_end)


@triton.jit
def fold_rows(e, FOLD: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_COLS) added over rows that a thread holds of a product by FOLD warps (0: over all rows).

    A warp's fragment of a matrix product on NVIDIA chips has rows l and l + 8 in one thread, and FOLD warps cover
    16 FOLD rows before the pattern repeats.
    """
    if FOLD == 0:
        return tl.sum(e, 0)
    else:
        warps: tl.constexpr = FOLD if 16 * FOLD <= e.shape[0] else e.shape[0] // 16
        e = tl.reshape(e, (e.shape[0] // (16 * warps), warps, 2, 8, e.shape[1]))
        return tl.sum(tl.sum(e, 2), 0)


@triton.jit
def all_rows(sums, FOLD: tl.constexpr):
    """What fold_rows left, added over the remaining rows."""
    if FOLD == 0:
        return sums
    else:
        return tl.sum(tl.sum(sums, 1), 0)


@triton.jit
def add_slots(part, first, last, stride, index, mask):
    """Sum of slots first..last-1 of part (slots, stride) at `index`, in their order."""
    total = tl.zeros(index.shape, dtype=tl.float32)
    pointers = part + tl.cast(stride, tl.int64) * first + index
    for _ in range(first, last):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += stride
    return total


# The online variant: a running maximum a row, rescaling the sum when it rises; two exponentials an element at worst.
# It stores nothing and assumes nothing of the inputs.
@triton.jit
def online(x, y, x_ids, y_ids, row, rows, cols, x_stride, y_stride, s, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
           BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
           EXCLUDE: tl.constexpr, OF_COLS: tl.constexpr):
    """log2 sum_j 2^t_ij of the rows from `row`, float64.

    OF_COLS: x's rows are the columns of S, whose product is then taken as the backward pass takes it: rounded
    otherwise, an exponent of 10^4 could differ by 10^-3, and so would its probability.
    """
    top = tl.full((BLOCK_ROWS,), -float("inf"), dtype=tl.float32)
    shift = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for col in range(0, cols, BLOCK_COLS):
        if OF_COLS:
            t = product(y, x, col, row, cols, rows, y_stride, x_stride, WIDTH, BLOCK_COLS, BLOCK_ROWS, DEPTH, UNIT,
                        False, PRECISION).T * s
        else:
            t = product(x, y, row, col, rows, cols, x_stride, y_stride, WIDTH, BLOCK_ROWS, BLOCK_COLS, DEPTH, UNIT,
                        False, PRECISION) * s
        if needs_mask(row, col, rows, cols, None, None, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, 1):
            t = tl.where(kept(row, col, rows, cols, x_ids, y_ids, EXCLUDE, BLOCK_ROWS, BLOCK_COLS), t, -float("inf"))
        raised = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(tl.abs(raised) < float("inf"), raised, 0.0)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(t - shift[:, None]), 1)
        top = raised
    return log2_of(total) + shift


# How it works: one block per BLOCK_ROWS normalisers. It adds their partial sums in slot order, turns finished ones into
# natural logarithms, and where the constant offset under- or overflowed recomputes its rows with the online maximum:
# a branch on device data that nearly every launch skips. Rows come first in the grid, then columns; with TRIANGLE both
# kinds of partial sums belong to one vector. What rounding to float32 takes from a normaliser is its rest: of one of
# 10^4 that is up to 5e-4, by which all of its row's probabilities would be wrong in the backward pass.
# Bound by memory (at most WORKSPACE bytes), or by the tensor cores where the rescue runs.
@triton.jit(do_not_specialize=["rows", "cols", "row_begin", "row_end", "last_chunk"])
def finish_kernel(q, k, scale, row_ids, col_ids, norms, row_part, col_part, row_lse, col_lse, rests, rows,
                   cols, row_begin, row_end, side, supers, q_stride, k_stride, headroom, lost_below, last_chunk,
                  WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr,
                  UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, EXCLUDE: tl.constexpr,
                  TRIANGLE: tl.constexpr, PARTS: tl.constexpr):
    scale_value = tl.load(scale).to(tl.float32)
    bound, c = offset(scale_value, norms, headroom, PARTS, TRIANGLE)
    served = bound <= BOUND_LIMIT
    s, unit = exponent(scale_value)
    first = row_begin // side
    last = tl.cdiv(row_end, side)
    blocks = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
    pid = tl.program_id(0)
    offsets = tl.arange(0, BLOCK_ROWS)
    is_col = pid >= blocks
    lse = row_lse
    start = row_begin + pid * BLOCK_ROWS
    stop = row_end
    if TRIANGLE:
        stop = rows
    elif is_col:
        lse = col_lse
        start = (pid - blocks) * BLOCK_ROWS
        stop = cols
    index = start + offsets
    mask = index < stop
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    if served:
        if TRIANGLE:
            # A block never straddles two super-tiles: `side` is a multiple of BLOCK_ROWS.
            if row_begin > 0:
                total += tl.load(lse + index, mask=mask, other=0.0)
            if start < row_end:
                total += add_slots(row_part, start // side, supers, row_end - row_begin, index - row_begin, mask)
            total += add_slots(col_part, 0, tl.minimum(start // side + 1, last) - first, cols, index, mask)
        elif is_col:
            if row_begin > 0:
                total += tl.load(lse + index, mask=mask, other=0.0)
            total += add_slots(col_part, 0, last - first, cols, index, mask)
        else:
            total += add_slots(row_part, 0, supers, row_end - row_begin, index - row_begin, mask)
    complete = last_chunk != 0
    if TRIANGLE:
        complete = start < row_end
    else:
        complete = complete | (pid < blocks)
    if complete:
        lost = mask & ((total < lost_below) | (total == float("inf")))
        if served == 0:
            lost = mask
        exact = (log2_of(total) + c) / unit
        if tl.max(lost.to(tl.int32), 0) > 0:
            if is_col & (not TRIANGLE):
                slow = online(k, q, col_ids, row_ids, start, cols, rows, k_stride, q_stride, s, WIDTH, BLOCK_ROWS,
                              BLOCK_COLS, DEPTH, UNIT, PRECISION, EXCLUDE, True)
            else:
                slow = online(q, k, row_ids, col_ids, start, rows, cols, q_stride, k_stride, s, WIDTH, BLOCK_ROWS,
                              BLOCK_COLS, DEPTH, UNIT, PRECISION, EXCLUDE, False)
            exact = tl.where(lost, slow / unit, exact)
        result = exact.to(tl.float32)
        if rests is not None:
            to = rests + index
            if not TRIANGLE:
                to += tl.where(is_col, rows, 0)  # the columns' come after the rows'
            left = (exact - result).to(tl.float32)
            tl.store(to, tl.where(tl.abs(result) < float("inf"), left, 0.0), mask=mask)
        tl.store(lse + index, result, mask=mask)
    else:
        tl.store(lse + index, total, mask=mask)


def super_side(tiles: Sequence[Tile], slow: Tile, rows: int, cols: int, processors: int, triangle: bool) -> int:
    """Rows and columns of a super-tile: as many as leave four super-tiles a multiprocessor, of every tile at least one,
    and SPAN at most where that allows."""
    smallest = max(slow.rows, *(max(tile.rows, tile.cols) for tile in tiles))
    side = max(smallest, SPAN * min(tile.rows for tile in tiles))
    while side > smallest and cdiv(rows, side) * cdiv(cols, side) < (8 if triangle else 4) * processors:
        side //= 2
    return side


def chunk_rows(rows: int, cols: int, side: int) -> int:
    """Rows whose partial sums fit in the workspace, in whole super-tiles: both kinds take rows x cols / side floats."""
    return min(cdiv(rows, side), max(1, config.WORKSPACE // (8 * max(1, cols)))) * side


def sums_constants(tile: Tile, width: int, element_unit: int, how: str, parts: int, exclude: int, both: bool,
                   cells: int, span: int, ids: int, grain: int) -> dict:
    """Compile-time constants of sums_kernel."""
    return tile_constants(width, element_unit, tile, how) | {
        "EXCLUDE": exclude,
        "BOTH": both,
        "CELLS": cells,
        "IDS": ids,
        "SPAN": span,
        "FOLD": tile.fold,
        "GROUP": tile.group,
        "PARTS": parts,
        "GRAIN": grain,
    }


def finish_constants(tile: Tile, width: int, element_unit: int, how: str, parts: int, exclude: int,
                     triangle: bool) -> dict:
    """Compile-time constants of finish_kernel."""
    return tile_constants(width, element_unit, tile, how) | {
        "EXCLUDE": exclude,
        "TRIANGLE": triangle,
        "PARTS": parts,
    }


def norm_constants(width: int, element_unit: int, parts: int) -> dict:
    """Compile-time constants of norm_kernel."""
    return {
        "WIDTH": width,
        "DEPTH": min(128, next_power_of_2(width)),
        "UNIT": element_unit,
        "BLOCK": NORM_ROWS,
        "PARTS": parts,
    }


def headroom(rows: int, cols: int) -> tuple[float, float]:
    """(h, lost): exp2(t - c) <= 2^h keeps sums of rows or cols of them finite; below `lost` they are inaccurate.

    The smallest normal float32 is 2^-126, so a sum of n terms has lost at most n 2^-126 to underflow: nothing that
    24 bits can show unless it is under n 2^-102.
    """
    bits = math.ceil(math.log2(max(rows, cols, 2)))
    return 126.0 - bits, 2.0 ** (bits - 102)


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    triangle = k is None
    q = aligned_rows(q)
    k = q if triangle else aligned_rows(k)
    row_ids = ids_of(row_ids)
    col_ids = row_ids if triangle or col_ids is None else ids_of(col_ids)

    # The rests of the rows, then of the columns, which are 0 where nobody wants the columns.
    new = q.new_empty if both or triangle else q.new_zeros
    cache = new(q.shape[0] + (0 if triangle else k.shape[0]) if save else 0, dtype=torch.float32)

    def run() -> tuple[Tensor, Tensor]:
        return _forward(q, k, scale, row_ids, col_ids, exclude, both, triangle, cache, None)

    with on(q):
        row_lse, col_lse = _forward(q, k, scale, row_ids, col_ids, exclude, both, triangle, cache, lambda: measure(run))
    return row_lse, col_lse, cache


def _forward(q, k, scale, row_ids, col_ids, exclude, both, triangle, cache, timing) -> tuple[Tensor, Tensor]:
    tiles = tuple([share.tile(q, k, timing) for share in shares(triangle, exclude)])
    slow = tuning.pick("online", q, k)
    key = kinds(q, k, scale, row_ids, col_ids, cache)
    chip = config.precision(q), config.parts(q), processors(q.device)
    plan = _plan(key, tiles, slow, *chip, exclude, both, triangle)
    norms, row_part, col_part, row_lse, col_lse = [cache.new_empty(x) for x in plan.sizes]
    rests = cache if cache.numel() else None
    plan.norms(q, k, norms)
    operands = [(operand(q, tile.rows, tile), operand(k, tile.cols, tile)) for tile in tiles]
    ranges = id_ranges(row_ids, col_ids, exclude, tiles)
    for sums, finish in plan.chunks:
        for launch, pair in zip(sums, operands, strict=True):
            if launch is not None:
                launch(*pair, scale, row_ids, col_ids, *ranges, norms, row_part, col_part)
        finish(q, k, scale, row_ids, col_ids, norms, row_part, col_part, row_lse, col_lse, rests)
    return row_lse, col_lse


@functools.cache
def shares(triangle: bool, exclude: int) -> tuple[Share, ...]:
    """The launches of a chunk's partial sums."""
    every, masks = (ABOVE, UPPER) if triangle else (ALL, ALL)
    op = "triangle" if triangle else "forward"
    if leaves_out_equal_ids(exclude):
        found = ("forward", every, IDS_APART, ops.EXCLUDE_NONE), (op, masks, IDS_MEET, exclude)
    elif triangle and exclude != ops.EXCLUDE_DIFFERENT_ID:
        found = ("forward", ABOVE, ANY_IDS, ops.EXCLUDE_NONE), (op, ON_DIAGONAL, ANY_IDS, exclude)
    else:
        found = ((op, masks, ANY_IDS, exclude),)
    return tuple(Share(name, int(ids), left_out, int(cells)) for name, cells, ids, left_out in found)


class Plan(NamedTuple):
    """What a forward pass allocates and launches."""

    sizes: tuple  # of the largest norms, row and column partial sums, row and column normalisers; float32
    norms: Launch
    chunks: list[tuple[list[Launch | None], Launch]]  # the partial sums of a chunk of rows, and what finishes them


def programs(cells: int, first: int, last: int, total: int) -> int:
    """Programs that have the super-tiles of rows first..last-1 of `total`."""
    if cells == ALL:
        return (last - first) * total
    if cells == ON_DIAGONAL:
        return last - first
    if cells == ABOVE:  # a triangle with a row and a column less
        last, total = min(last, total - 1), total - 1
    return cdiv(last - first, 2) * (2 * total - first - last + 1)  # see tiles.folded


@planned
def _plan(kinds, tiles: tuple[Tile, ...], slow: Tile, how, parts, chip_processors, exclude, both, triangle) -> Plan:
    _, (dtype, (rows, width), (q_stride, _), _), (_, (cols, _), (k_stride, _), _), *_ = kinds
    element_unit = 16 // dtype.itemsize
    strides = q_stride // element_unit, k_stride // element_unit
    side = super_side(tiles, slow, rows, cols, chip_processors, triangle)
    supers = cdiv(cols, side)
    chunk = chunk_rows(rows, cols, side)
    h, lost = headroom(rows, cols)
    both = both or triangle
    of_cols = cols if both and not triangle else 0
    row_part = supers, min(chunk, rows)
    col_part = (chunk // side, cols) if both else 0

    grain = smallest_grain(tiles)
    chunks = []
    for begin in range(0, rows, chunk):
        end = min(rows, begin + chunk)
        launches = []
        for share, tile in zip(shares(triangle, exclude), tiles, strict=True):
            blocks = programs(share.cells, begin // side, cdiv(end, side), supers)
            constants = sums_constants(tile, width, element_unit, how, parts, share.exclude, both, share.cells,
                                       side // tile.rows, share.ids, grain)  # fmt: skip
            scalars = rows, cols, begin, end, *strides, side // tile.cols, supers, h
            launch = Launch(sums_kernel, (blocks, 1, 1), scalars, **constants, **tile.options)
            launches.append(launch if blocks else None)
        blocks = cdiv((rows if triangle else end) - begin, slow.rows) + cdiv(of_cols, slow.rows)
        finish = Launch(
            finish_kernel, (blocks, 1, 1),
            (rows, cols, begin, end, side, supers, *strides, h, lost, int(end == rows)),
            **finish_constants(slow, width, element_unit, how, parts, exclude, triangle), **slow.options,
        )  # fmt: skip
        chunks.append((launches, finish))
    sides = 1 if triangle else 2
    norms = Launch(
        norm_kernel, (parts, sides, 1), (rows, cols, *strides), **norm_constants(width, element_unit, parts)
    )
    sizes = sides * parts, row_part, col_part, rows, of_cols
    return Plan(sizes, norms, chunks)

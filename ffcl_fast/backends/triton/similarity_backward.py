"""Gradients of the log-sum-exps: dq = scale G k, dk = scale G^T q with G_ij = u_i e^(S_ij - r_i) + v_j e^(S_ij - c_j).

16-bit embeddings up to ``config.REGISTER_WIDTH`` wide keep the gradient's accumulators in registers; all others go
through panels of G (:mod:`.gradient_panels`). Nothing is added atomically, so equal inputs give equal bits.

G is scaled by a power of two over the largest |u|, |v|, which keeps small probabilities out of float16's subnormals;
the scale is taken out again, with ``scale``, where the float32 sums are written.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..aligned import aligned_rows, unit, without_padding
from . import config, tuning
from .config import Tile, cdiv
from .gradient_panels import combine, walk
from .launch import (
    Launch,
    Share,
    beyond_32_bits,
    id_ranges,
    ids_of,
    kinds,
    leaves_out_equal_ids,
    measure,
    on,
    operand,
    output,
    planned,
    processors,
    smallest_grain,
    tile_constants,
)
from .tiles import (
    ANY_IDS,
    IDS_APART,
    IDS_MEET,
    LOG2E,
    dot,
    exponent,
    grouped,
    ids_meet,
    load_tile,
    masked,
    narrow,
    needs_mask,
    product,
    store_tile,
)

# Which side's normaliser a pair's gradient has: x's (the rows of the tile), y's (the columns), or both.
OF_ROWS = tl.constexpr(1)
OF_COLS = tl.constexpr(2)
OF_BOTH = tl.constexpr(3)
# One exponential an element serves both sides while all normalisers lie within this many powers of two of each other:
# halfway between them no weight and no exponential leaves float32, and what underflows is under 2^-66 of its sum.
SPREAD = tl.constexpr(120.0)
# And while they are smaller than this: beyond, rounding of the exponents can make a probability of 1 a much larger
# number, which only a side's own exponential shows.
LARGE = tl.constexpr(65536.0)
VECTOR_BLOCK = 1024


# How it works: PARTS blocks stride over the vectors; each leaves the smallest and largest finite normaliser and the
# largest finite weight. Bound by launch latency: it reads 8 (N + M) bytes.
@triton.jit(do_not_specialize=["rows", "cols"])
def range_kernel(row_lse, col_lse, row_grad, col_grad, ranges, rows, cols, COLS: tl.constexpr, BLOCK: tl.constexpr,
                 PARTS: tl.constexpr):
    part = tl.program_id(0)
    low = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
    high = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(part * BLOCK, rows, PARTS * BLOCK):
        low, high, weight = widen(row_lse, row_grad, start, rows, low, high, weight, BLOCK)
    if COLS:
        for start in range(part * BLOCK, cols, PARTS * BLOCK):
            low, high, weight = widen(col_lse, col_grad, start, cols, low, high, weight, BLOCK)
    tl.store(ranges + part, tl.min(low, 0))
    tl.store(ranges + PARTS + part, tl.max(high, 0))
    tl.store(ranges + 2 * PARTS + part, tl.max(weight, 0))


@triton.jit
def widen(lse, grad, start, n, low, high, weight, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    mask = index < n
    value = tl.load(lse + index, mask=mask, other=float("inf"))
    finite = tl.abs(value) < float("inf")
    low = tl.minimum(low, tl.where(finite, value, float("inf")))
    high = tl.maximum(high, tl.where(finite, value, -float("inf")))
    size = tl.abs(tl.load(grad + index, mask=mask, other=0.0))
    return low, high, tl.maximum(weight, tl.where(size < float("inf"), size, 0.0))


# How it works: what the tiles need of a row or column, once: weight, shift and the weight against the common centre, so
# that a pair's gradient is 2^(t - shift) weight = 2^(t - centre) part. Block 0 also leaves the frame: the centre, 1
# where one exponential serves both sides, and the unit of the weights. Bound by launch latency: 20 (N + M) bytes.
@triton.jit(do_not_specialize=["rows", "cols"])
def vector_kernel(row_lse, col_lse, rests, row_grad, col_grad, scale, ranges, row_vectors, col_vectors, frame, rows,
                  cols, GAIN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    _, unit = exponent(tl.load(scale).to(tl.float32))
    parts = tl.arange(0, PARTS)
    low = (tl.min(tl.load(ranges + parts), 0) * unit).to(tl.float32)
    high = (tl.max(tl.load(ranges + PARTS + parts), 0) * unit).to(tl.float32)
    largest = tl.max(tl.load(ranges + 2 * PARTS + parts), 0)
    # Weights come near to GAIN, as far as GAIN / largest is a float.
    largest = tl.where(largest > 0, tl.maximum(largest, GAIN * 2.0**-126), 1.0)
    centre = tl.where(low <= high, 0.5 * (low + high), 0.0)
    if tl.program_id(1) == 0:
        write_vectors(row_lse, rests, row_grad, row_vectors, rows, centre, GAIN / largest, unit, BLOCK)
        if tl.program_id(0) == 0:
            tl.store(frame, centre)
            one = (high - low <= SPREAD) & (tl.maximum(high, -low) < LARGE)
            tl.store(frame + 1, tl.where(one, 1.0, 0.0))
            tl.store(frame + 2, largest)
    else:
        if rests is not None:
            rests += rows
        write_vectors(col_lse, rests, col_grad, col_vectors, cols, centre, GAIN / largest, unit, BLOCK)


@triton.jit
def write_vectors(lse, rest, grad, to, n, centre, factor, unit, BLOCK: tl.constexpr):
    """(3, n): weight, shift and part; 0, +inf and 0 where the normaliser is -inf, so that such rows give nothing."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    value = tl.load(lse + index, mask=mask, other=0.0)
    empty = value == -float("inf")
    finite = tl.abs(value) < float("inf")
    exact = value.to(tl.float64)
    known = 8388608.0  # numbers up to here are known to a power of two: 2^23 in 24 bits, 2^46 in 48
    if rest is not None:
        exact += tl.load(rest + index, mask=mask, other=0.0)
        known *= known
    exact = tl.where(finite, exact, 0.0) * unit
    # An infinite normaliser, or NaN, stays what it is: the pairs of other rows must not see it.
    shift = tl.where(finite | empty, exact.to(tl.float32), value)
    lost = tl.where(finite & (tl.abs(exact) < known), shift - exact, 0.0).to(tl.float32)
    # What rounding takes from the shift goes into the weight.
    weight = tl.load(grad + index, mask=mask, other=0.0) * factor * tl.exp2(lost)
    weight = tl.where(empty, 0.0, weight)
    size = tl.cast(n, tl.int64)
    tl.store(to + index, weight, mask=mask)
    tl.store(to + size + index, tl.where(empty, float("inf"), shift), mask=mask)
    tl.store(to + size * 2 + index, tl.where(empty, 0.0, weight * tl.exp2(centre - shift)), mask=mask)


@triton.jit
def load_vector(vectors, which: tl.constexpr, start, n, BLOCK: tl.constexpr, STEP: tl.constexpr = 1):
    """A block of weights (0), shifts (1) or parts (2); rows past the end have no weight."""
    index = start + tl.arange(0, BLOCK) * STEP
    to = vectors + tl.cast(n, tl.int64) * which + index
    return tl.load(to, mask=index < n, other=float("inf") if which == 1 else 0.0)


@triton.jit
def below_one(d):
    """2^d for the d of a probability, at most 1: rounding of large t must not make it more. NaN stays."""
    return tl.exp2(tl.minimum(d, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def pair_gradient(t, x_vectors, y_vectors, row, col, rows, cols, frame, SIDES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                  BLOCK_COLS: tl.constexpr):
    """G of a tile from its base-2 exponents t: one exponential an element unless the normalisers spread too far."""
    if SIDES == OF_ROWS:
        shift = load_vector(x_vectors, 1, row, rows, BLOCK_ROWS)
        g = below_one(t - shift[:, None]) * load_vector(x_vectors, 0, row, rows, BLOCK_ROWS)[:, None]
    elif SIDES == OF_COLS:
        shift = load_vector(y_vectors, 1, col, cols, BLOCK_COLS)
        g = below_one(t - shift[None, :]) * load_vector(y_vectors, 0, col, cols, BLOCK_COLS)[None, :]
    elif tl.load(frame + 1) > 0:
        x_part = load_vector(x_vectors, 2, row, rows, BLOCK_ROWS)
        y_part = load_vector(y_vectors, 2, col, cols, BLOCK_COLS)
        g = tl.exp2(t - tl.load(frame)) * (x_part[:, None] + y_part[None, :])
    else:
        # By halves of adjacent columns, which one thread holds: t and all of G do not fit in the registers together.
        even, odd = tl.split(tl.reshape(t, (BLOCK_ROWS, BLOCK_COLS // 2, 2)))
        even = two_exponentials(even, x_vectors, y_vectors, row, col, rows, cols, BLOCK_ROWS, BLOCK_COLS // 2)
        odd = two_exponentials(odd, x_vectors, y_vectors, row, col + 1, rows, cols, BLOCK_ROWS, BLOCK_COLS // 2)
        g = tl.reshape(tl.join(even, odd), (BLOCK_ROWS, BLOCK_COLS))
    return g


@triton.jit
def two_exponentials(t, x_vectors, y_vectors, row, col, rows, cols, BLOCK_ROWS: tl.constexpr, HALF: tl.constexpr):
    """G of every other column from `col`."""
    shift = load_vector(x_vectors, 1, row, rows, BLOCK_ROWS)
    g = below_one(t - shift[:, None]) * load_vector(x_vectors, 0, row, rows, BLOCK_ROWS)[:, None]
    shift = load_vector(y_vectors, 1, col, cols, HALF, 2)
    return g + below_one(t - shift[None, :]) * load_vector(y_vectors, 0, col, cols, HALF, 2)[None, :]


# How it works: as FlashAttention's backward for one side. A block keeps BLOCK_ROWS rows of x and their float32 gradient
# in registers or shared memory and streams y past them: S = x y^T, G from S, gradient += G y. Called for (q, k) and,
# with the sides swapped, for (k, q). Few rows are split over the columns (SPLIT); the parts are added in order.
# Bound by: tensor cores (two products) and, at these widths, as much by exp2: 128 / WIDTH of one product's time.
@triton.jit(do_not_specialize=["rows", "cols", "split_cols"])
def rows_kernel(x, y, x_vectors, y_vectors, x_ids, y_ids, x_ranges, y_ranges, scale, frame, out, rows, cols,
                split_cols, x_stride, y_stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
                DEPTH: tl.constexpr, UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
                EXCLUDE: tl.constexpr, SIDES: tl.constexpr, SPLIT: tl.constexpr, GAIN: tl.constexpr,
                SETTLE: tl.constexpr, GRAIN: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    scale_value = tl.load(scale).to(tl.float32)
    s = scale_value * LOG2E
    xt = load_tile(x, row, 0, rows, x_stride, WIDTH, BLOCK_ROWS, DEPTH, UNIT, DESCRIPTOR)
    acc = tl.zeros((BLOCK_ROWS, DEPTH), dtype=tl.float32)
    begin = part * split_cols
    for col in range(begin, tl.minimum(cols, begin + split_cols), BLOCK_COLS):
        yt = load_tile(y, col, 0, cols, y_stride, WIDTH, BLOCK_COLS, DEPTH, UNIT, DESCRIPTOR)
        t = dot(xt, yt.T, tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32), PRECISION) * s
        if needs_mask(row, col, rows, cols, x_ranges, y_ranges, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, GRAIN):
            t = masked(t, row, col, rows, cols, x_ids, y_ids, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, PIECE)
        g = pair_gradient(t, x_vectors, y_vectors, row, col, rows, cols, frame, SIDES, BLOCK_ROWS, BLOCK_COLS)
        acc = dot(narrow(g, yt.dtype, PRECISION), yt, acc, PRECISION)
        if SETTLE:
            # To and fro costs nothing and makes Triton wait for this product here. Left running into the next step,
            # whose first product begins from nothing, ptxas puts a wait behind every wgmma of the loop (C7515).
            acc = acc.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    i = row + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, DEPTH)
    to = out + ((part.to(tl.int64) * rows + i) * WIDTH)[:, None] + d[None, :]
    mask = (i < rows)[:, None] & (d < WIDTH)[None, :]
    if SPLIT:
        tl.store(to, acc, mask=mask)
    else:
        acc *= scale_value * tl.load(frame + 2) / GAIN
        tl.store(to, narrow(acc, out.dtype.element_ty, PRECISION), mask=mask)


# How it works: one tile of S a block, turned into G and written to the panel, in an order that shares operands in L2.
# With IDS, a launch writes the squares of SIDE rows and columns in which ids meet, and one without masks the others.
# Bound by: tensor cores for wide embeddings; the panel's store is 2 bytes an element.
@triton.jit(do_not_specialize=["rows", "cols", "row_begin", "row_end", "col_begin", "col_end"])
def panel_kernel(q, k, row_vectors, col_vectors, row_ids, col_ids, row_ranges, col_ranges, scale, frame, panel, rows,
                 cols, row_begin, row_end, col_begin, col_end, q_stride, k_stride, panel_stride, WIDTH: tl.constexpr,
                 BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr,
                 DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, EXCLUDE: tl.constexpr, SIDES: tl.constexpr,
                 IDS: tl.constexpr, SIDE: tl.constexpr, GROUP: tl.constexpr, GRAIN: tl.constexpr):
    height = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
    width = tl.cdiv(col_end - col_begin, BLOCK_COLS)
    i, j = grouped(tl.program_id(0), height, width, GROUP)
    row = row_begin + i * BLOCK_ROWS
    col = col_begin + j * BLOCK_COLS
    if IDS != ANY_IDS:
        meet = ids_meet(row_ranges, row // SIDE * SIDE, rows, col_ranges, col // SIDE * SIDE, cols, SIDE, GRAIN)
        if meet == (IDS == IDS_APART):
            return
    t = product(q, k, row, col, rows, cols, q_stride, k_stride, WIDTH, BLOCK_ROWS, BLOCK_COLS, DEPTH, UNIT, DESCRIPTOR,
                PRECISION) * (tl.load(scale).to(tl.float32) * LOG2E)
    if needs_mask(row, col, rows, cols, row_ranges, col_ranges, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, GRAIN):
        t = masked(t, row, col, rows, cols, row_ids, col_ids, EXCLUDE, BLOCK_ROWS, BLOCK_COLS, BLOCK_COLS)
    g = pair_gradient(t, row_vectors, col_vectors, row, col, rows, cols, frame, SIDES, BLOCK_ROWS, BLOCK_COLS)
    store_tile(panel, narrow(g, panel.dtype if DESCRIPTOR else panel.dtype.element_ty, PRECISION), row - row_begin,
               col - col_begin, row_end - row_begin, col_end - col_begin, panel_stride, DESCRIPTOR)


def rows_constants(tile: Tile, width: int, element_unit: int, how: str, exclude: int, sides: int, split: bool,
                   gain: float) -> dict:
    """Compile-time constants of rows_kernel."""
    return tile_constants(width, element_unit, tile, how) | {
        "EXCLUDE": exclude,
        "SIDES": sides,
        "SPLIT": split,
        "GAIN": gain,
        "SETTLE": tile.settle,
        "GRAIN": tile.grain,
        "PIECE": min(32, tile.cols) if tile.registers else tile.cols,  # the ids of more do not fit under the limit
    }


def panel_constants(tile: Tile, width: int, element_unit: int, how: str, exclude: int, sides: int, ids: int,
                    side: int, grain: int) -> dict:
    """Compile-time constants of panel_kernel."""
    return tile_constants(width, element_unit, tile, how) | {
        "EXCLUDE": exclude,
        "SIDES": sides,
        "IDS": ids,
        "SIDE": side,
        "GROUP": tile.group,
        "GRAIN": grain,
    }


def range_constants(cols: bool, parts: int) -> dict:
    """Compile-time constants of range_kernel."""
    return {"COLS": cols, "BLOCK": VECTOR_BLOCK, "PARTS": parts}


def vector_constants(gain: float, parts: int) -> dict:
    """Compile-time constants of vector_kernel."""
    return {"GAIN": gain, "BLOCK": VECTOR_BLOCK, "PARTS": parts}


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    triangle = k is None
    width = q.shape[1]
    q = aligned_rows(q)
    k = q if triangle else aligned_rows(k)
    row_ids = ids_of(row_ids)
    col_ids = row_ids if triangle or col_ids is None else ids_of(col_ids)
    both = triangle or col_grad.numel() > 0
    row_lse, row_grad = row_lse.contiguous(), row_grad.contiguous()
    if triangle:
        col_lse, col_grad = row_lse, row_grad
    elif both:
        col_lse, col_grad = col_lse.contiguous(), col_grad.contiguous()
    else:
        col_lse, col_grad = row_lse[:0], row_grad[:0]
    narrow_rows = q.dtype != torch.float32 and width <= config.REGISTER_WIDTH
    compute = _in_registers if narrow_rows else _in_panels
    with on(q):
        gain = config.gain(q.dtype)
        rests = cache if cache.numel() else None
        lse, grads = (row_lse, col_lse), (row_grad, col_grad)
        row_vectors, col_vectors, frame = _vectors(scale, lse, rests, grads, both and not triangle, gain)
        side_x = row_vectors, row_ids
        side_y = side_x if triangle else (col_vectors, col_ids)
        arguments = q, k, scale, side_x, side_y, frame, exclude, both, triangle, need_q, need_k and not triangle
        dq, dk = compute(*arguments, lambda: measure(lambda: compute(*arguments, None)))
    return without_padding(dq, width), without_padding(dk, width)


def _vectors(scale, lse, rests, grads, cols, gain) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels read of rows (3 N,) and of columns (3 M,), or (0,) without `cols`, and the frame they share.

    `lse` and `grads` are pairs, of the rows and of the columns.
    """
    rows = lse[0]
    plan = _vector_plan(kinds(*lse, *grads, rests, scale), cols, config.parts(rows), gain)
    ranges, row_vectors, col_vectors, frame = [rows.new_empty(n) for n in plan.sizes]
    plan.ranges(*lse, *grads, ranges)
    plan.vectors(*lse, rests, *grads, scale, ranges, row_vectors, col_vectors, frame)
    return row_vectors, col_vectors, frame


class VectorPlan(NamedTuple):
    """What :func:`_vectors` allocates and launches."""

    sizes: tuple[int, int, int, int]  # of the ranges, the rows' and the columns' vectors and the frame
    ranges: Launch
    vectors: Launch


@planned
def _vector_plan(kinds: tuple, cols: bool, parts: int, gain: float) -> VectorPlan:
    (n,), (m,) = kinds[1][1], kinds[2][1]
    m = m if cols else 0
    grid = cdiv(max(n, m), VECTOR_BLOCK), 2 if cols else 1, 1
    return VectorPlan(
        (3 * parts, 3 * n, 3 * m, 3),
        Launch(range_kernel, (parts, 1, 1), (n, m), **range_constants(cols, parts)),
        Launch(vector_kernel, grid, (n, m), **vector_constants(gain, parts)),
    )


def _in_registers(q, k, scale, side_x, side_y, frame, exclude, both, triangle, need_q, need_k, timing):
    tile = tuning.pick("rows", q, k, exclude == ops.EXCLUDE_SAME_ID_OFF_DIAGONAL, timing)  # see config._half
    ranges = id_ranges(side_x[1], side_y[1], exclude, (tile,))
    side_x, side_y = (*side_x, ranges[0]), (*side_y, ranges[1])
    none = q.new_empty(0, q.shape[1])
    dq = _side(q, k, scale, side_x, side_y, exclude, OF_BOTH if both else OF_ROWS, frame, tile) if need_q else none
    dk = _side(k, q, scale, side_y, side_x, exclude, OF_BOTH if both else OF_COLS, frame, tile) if need_k else none
    return dq, dk


def _side(x, y, scale, side_x, side_y, exclude, sides, frame, tile):
    how, gain = config.precision(x), config.gain(x.dtype)
    key = kinds(x, y, scale, side_x[1], side_y[1])
    parts, launch = _side_plan(key, tile, how, gain, exclude, int(sides), processors(x.device))
    out = x.new_empty(x.shape)
    sums = out if parts == 1 else x.new_empty(parts, *x.shape, dtype=torch.float32)
    launch(
        operand(x, tile.rows, tile), operand(y, tile.cols, tile), side_x[0], side_y[0], side_x[1], side_y[1], side_x[2],
        side_y[2], scale, frame, sums,
    )  # fmt: skip
    if parts > 1:
        combine([(sums, out)], scale, frame, gain, how)
    return out


@planned
def _side_plan(kinds, tile: Tile, how, gain, exclude, sides, chip_processors) -> tuple[int, Launch]:
    """How many programs share the columns, and the launch of rows_kernel."""
    _, (dtype, (rows, width), (x_stride, _), _), (_, (cols, _), (y_stride, _), _), *_ = kinds
    element_unit = 16 // dtype.itemsize
    blocks, wanted = cdiv(rows, tile.rows), 4 * chip_processors
    parts = 1 if blocks >= wanted else min(cdiv(wanted, blocks), cdiv(cols, 4 * tile.cols))
    split_cols = cdiv(cdiv(cols, parts), tile.cols) * tile.cols
    parts = cdiv(cols, split_cols)
    return parts, Launch(
        rows_kernel, (blocks, parts, 1),
        (rows, cols, split_cols, x_stride // element_unit, y_stride // element_unit),
        **rows_constants(tile, width, element_unit, how, exclude, sides, parts > 1, gain), **tile.options,
    )  # fmt: skip


def _in_panels(q, k, scale, side_x, side_y, frame, exclude, both, triangle, need_q, need_k, timing):
    shares = _panel_shares(exclude)
    tiles = [share.tile(q, k, timing) for share in shares]
    how, gain = config.precision(q), config.gain(q.dtype)
    operands = [(operand(q, tile.rows, tile), operand(k, tile.cols, tile)) for tile in tiles]
    ranges = id_ranges(side_x[1], side_y[1], exclude, tiles)
    rows, cols, element_unit = q.shape[0], k.shape[0], unit(q)
    key = kinds(q, k, scale, side_x[1], side_y[1])
    sides = int(OF_BOTH if both else OF_ROWS)
    side, grain = max([max(tile.rows, tile.cols) for tile in tiles]), smallest_grain(tiles)

    def fill(panel: Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        strides = q.stride(0) // element_unit, k.stride(0) // element_unit, panel.stride(0)
        for share, tile, pair in zip(shares, tiles, operands, strict=True):
            _panel_launch(key, strides, tile, how, share, sides, side, grain, beyond_32_bits(r0, r1, c0, c1))(
                *pair, side_x[0], side_y[0], side_x[1], side_y[1], *ranges, scale, frame, output(panel, tile),
                grid=(cdiv(r1 - r0, tile.rows) * cdiv(c1 - c0, tile.cols), 1, 1),
                scalars=(rows, cols, r0, r1, c0, c1, *strides),
            )  # fmt: skip

    return walk(q, None if triangle else k, fill, scale, frame, gain, how, need_q, need_k)


@functools.cache
def _panel_shares(exclude: int) -> tuple[Share, ...]:
    if leaves_out_equal_ids(exclude):
        return Share("panel", int(IDS_APART), ops.EXCLUDE_NONE), Share("panel", int(IDS_MEET), exclude)
    return (Share("panel", int(ANY_IDS), exclude),)


@planned
def _panel_launch(kinds, strides, tile: Tile, how, share: Share, sides, side, grain, _) -> Launch:
    """panel_kernel, to be called with a panel's grid and scalars."""
    dtype, (_, width), *_ = kinds[1]
    options = share.exclude, sides, share.ids, side, grain
    constants = panel_constants(tile, width, 16 // dtype.itemsize, how, *options)
    return Launch(panel_kernel, (0, 0, 0), (), **constants, **tile.options)

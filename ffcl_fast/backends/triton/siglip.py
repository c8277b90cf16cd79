"""SigLIP (Zhai et al. 2023) in one pass over S: the loss, and with it the gradients through panels of G.

No normaliser stands between a pair and the loss, so each tile of S gives its share of the loss, of the bias's gradient
and, as G_ij = -z_ij sigmoid(-z_ij x_ij), of dq and dk: three matrix products in all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..aligned import aligned_rows, unit, without_padding
from . import config, tuning
from .config import Tile, cdiv
from .gradient_panels import walk
from .launch import Launch, beyond_32_bits, kinds, measure, on, operand, output, planned, tile_constants
from .tiles import LOG2E, NO_PAIRS, grouped, kept, narrow, needs_mask, product, store_tile, touches_diagonal


@triton.jit
def log1p_ratio(e):
    """log(1 + e) / e on [0, 1] to 2e-7 relative: a Chebyshev fit of degree 8, no division and no logarithm.

    log2(1 + e) would round small e away, and the pairs with small e are nearly all of them.
    """
    p = e * 0.0052534578 - 0.0295885074
    p = p * e + 0.078361668
    p = p * e - 0.136747697
    p = p * e + 0.191114311
    p = p * e - 0.248443699
    p = p * e + 0.333192713
    p = p * e - 0.499995015
    p = p * e + 0.999999971
    return p


# How it works: one tile of S a block. With y = -z x and e = exp(-|y|): softplus(y) = max(y, 0) + log1p(e) and
# sigmoid(y) = (1 or e) / (1 + e), so one exponential and one reciprocal an element. Loss and bias sums are float64, one
# slot a tile of the panel, added to by the launches that follow on the same stream: a fixed order, no atomics.
# Bound by: tensor cores for wide embeddings; about 25 float32 operations and 2 special ones an element beside them.
@triton.jit(do_not_specialize=["rows", "cols", "row_begin", "row_end", "col_begin", "col_end"])
def siglip_kernel(q, k, scale, bias, panel, totals, rows, cols, row_begin, row_end, col_begin, col_end, q_stride,
                  k_stride, panel_stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
                  DEPTH: tl.constexpr, UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
                  POSITIVES: tl.constexpr, GRADIENT: tl.constexpr, GAIN: tl.constexpr, GROUP: tl.constexpr):
    pid = tl.program_id(0)
    height = tl.cdiv(row_end - row_begin, BLOCK_ROWS)
    width = tl.cdiv(col_end - col_begin, BLOCK_COLS)
    i, j = grouped(pid, height, width, GROUP)
    row = row_begin + i * BLOCK_ROWS
    col = col_begin + j * BLOCK_COLS
    y = product(q, k, row, col, rows, cols, q_stride, k_stride, WIDTH, BLOCK_ROWS, BLOCK_COLS, DEPTH, UNIT, DESCRIPTOR,
                PRECISION) * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    r = row + tl.arange(0, BLOCK_ROWS)
    c = col + tl.arange(0, BLOCK_COLS)
    positive = False
    if POSITIVES:
        positive = touches_diagonal(row, col, BLOCK_ROWS, BLOCK_COLS)
        if positive:
            y = tl.where(r[:, None] == c[None, :], -y, y)
    if needs_mask(row, col, rows, cols, None, None, NO_PAIRS, BLOCK_ROWS, BLOCK_COLS, 1):
        y = tl.where(kept(row, col, rows, cols, q, k, NO_PAIRS, BLOCK_ROWS, BLOCK_COLS), y, -float("inf"))
    e = tl.exp2(-tl.abs(y) * LOG2E)
    # `y > 0` is false for NaN and exp2 keeps it, so a NaN reaches the loss through log1p.
    loss = tl.where(y > 0, y, 0.0) + e * log1p_ratio(e)
    slot = totals + 2 * pid
    tl.store(slot, tl.load(slot) + tl.sum(tl.sum(loss, 1), 0).to(tl.float64))
    if GRADIENT:
        g = tl.where(y > 0, 1.0, e) / (1.0 + e)
        if POSITIVES:
            if positive:
                g = tl.where(r[:, None] == c[None, :], -g, g)
        tl.store(slot + 1, tl.load(slot + 1) + tl.sum(tl.sum(g, 1), 0).to(tl.float64))
        value = narrow(g * GAIN, panel.dtype if DESCRIPTOR else panel.dtype.element_ty, PRECISION)
        store_tile(panel, value, row - row_begin, col - col_begin, row_end - row_begin, col_end - col_begin,
                   panel_stride, DESCRIPTOR)


def siglip_constants(tile: Tile, width: int, element_unit: int, how: str, positives: bool, gradient: bool,
                     gain: float) -> dict:
    """Compile-time constants of siglip_kernel."""
    return tile_constants(width, element_unit, tile, how) | {
        "POSITIVES": positives,
        "GRADIENT": gradient,
        "GAIN": gain,
        "GROUP": tile.group,
    }


def siglip(q, k, scale, bias, positives, need_q, need_k):
    width = q.shape[1]
    q, k = aligned_rows(q), aligned_rows(k)
    arguments = q, k, scale, bias, positives, need_q, need_k
    with on(q):
        loss, dq, dk, dbias = _siglip(*arguments, lambda: measure(lambda: _siglip(*arguments, None)))
    return loss, without_padding(dq, width), without_padding(dk, width), dbias


def _siglip(q, k, scale, bias, positives, need_q, need_k, timing):
    tile = tuning.pick("siglip", q, k, measure=timing)
    rows, width, cols, element_unit = q.shape[0], q.shape[1], k.shape[0], unit(q)
    how, gain = config.precision(q), config.gain(q.dtype)
    side = config.panel_side(q)
    slots = cdiv(min(rows, side), tile.rows) * cdiv(min(cols, side), tile.cols)
    totals = q.new_zeros(slots, 2, dtype=torch.float64)
    x, y = operand(q, tile.rows, tile), operand(k, tile.cols, tile)
    gradient = need_q or need_k
    key = kinds(q, k, scale, bias)

    def fill(panel: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        strides = q.stride(0) // element_unit, k.stride(0) // element_unit, panel.stride(0)
        _launch(key, strides, tile, how, positives, gradient, gain, beyond_32_bits(r0, r1, c0, c1))(
            x, y, scale, bias, output(panel, tile) if gradient else None, totals,
            grid=(cdiv(r1 - r0, tile.rows) * cdiv(c1 - c0, tile.cols), 1, 1),
            scalars=(rows, cols, r0, r1, c0, c1, *strides),
        )  # fmt: skip

    if gradient:
        dq, dk = walk(q, k, fill, scale, None, gain, how, need_q, need_k)
    else:
        dq = dk = q.new_empty(0, width)
        for r0 in range(0, rows, side):
            for c0 in range(0, cols, side):
                fill(q, r0, min(rows, r0 + side), c0, min(cols, c0 + side))
    loss, dbias = totals.sum(0).to(torch.float32).unbind()
    return loss.clone(), dq, dk, dbias.clone()


@planned
def _launch(kinds, strides, tile: Tile, how, positives, gradient, gain, _) -> Launch:
    """siglip_kernel, to be called with a panel's grid and scalars."""
    dtype, (_, width), *_ = kinds[1]
    constants = siglip_constants(tile, width, 16 // dtype.itemsize, how, positives, gradient, gain)
    return Launch(siglip_kernel, (0, 0, 0), (), **constants, **tile.options)

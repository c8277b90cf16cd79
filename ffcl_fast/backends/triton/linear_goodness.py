"""Goodness of a linear layer, the squares added in the product's epilogue: the activation is never written.

y = x W^T + b, a = max(y, 0) or y, g = sum a^2 (or the mean) over the H columns of W^T. What leaves the chip is a float
a row and block of columns, N H / BLOCK_COLS in all against N H elements of the activation and its second read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..aligned import aligned_rows
from . import config, tuning
from .config import Tile, cdiv
from .launch import Launch, kinds, on, operand, planned, tile_constants
from .rows import add_parts, floats
from .tiles import grouped, product


# How it works: a program makes one BLOCK_ROWS x BLOCK_COLS tile of y, adds the bias, masks the columns past the end,
# and stores its rows' sums of squares in the slot of its block of columns; add_parts adds the slots in their order.
# Bound by the tensor cores: 2 N H K operations against N K + H K elements read.
@triton.jit(do_not_specialize=["rows", "cols"])
def linear_goodness_kernel(x, weight, bias, partials, rows, cols, x_stride, weight_stride, WIDTH: tl.constexpr,
                           BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DEPTH: tl.constexpr,
                           UNIT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, RELU: tl.constexpr,
                           GROUP: tl.constexpr):
    i, j = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS), GROUP)
    row = i * BLOCK_ROWS
    col = j * BLOCK_COLS
    y = product(x, weight, row, col, rows, cols, x_stride, weight_stride, WIDTH, BLOCK_ROWS, BLOCK_COLS, DEPTH, UNIT,
                DESCRIPTOR, PRECISION)
    c = col + tl.arange(0, BLOCK_COLS)
    if bias is not None:
        y += tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    if RELU:
        y = tl.where(y <= 0, 0.0, y)
    if col + BLOCK_COLS > cols:
        y = tl.where((c < cols)[None, :], y, 0.0)
    r = row + tl.arange(0, BLOCK_ROWS)
    tl.store(partials + tl.cast(rows, tl.int64) * j + r, tl.sum(y * y, 1), mask=r < rows)


def kernel_constants(tile: Tile, width: int, element_unit: int, how: str, relu: bool) -> dict:
    """Compile-time constants of linear_goodness_kernel."""
    return tile_constants(width, element_unit, tile, how) | {"RELU": relu, "GROUP": tile.group}


def linear_goodness(x, weight, bias, mean, relu):
    weight = aligned_rows(weight)
    bias = bias if bias is None else bias.contiguous()
    rows, cols = x.shape[0], weight.shape[0]
    goodness = floats(x, rows)
    with on(x):
        tile, how = tuning.pick("linear", x, weight), config.precision(x)
        slots = cdiv(cols, tile.cols)
        chunk = max(1, config.WORKSPACE // (4 * slots * tile.rows)) * tile.rows
        for begin in range(0, rows, chunk):
            some = aligned_rows(x[begin : begin + chunk])
            partials = floats(x, slots, some.shape[0])
            squares = _squares(kinds(some, weight, bias), tile, how, relu)
            squares(operand(some, tile.rows, tile), operand(weight, tile.cols, tile), bias, partials)
            add_parts(partials.T, goodness[begin : begin + chunk], 1.0 / cols if mean else 1.0)
    return goodness


@planned
def _squares(kinds: tuple, tile: Tile, how: str, relu: bool) -> Launch:
    """Sums of squares over each block of columns, (blocks, rows)."""
    _, (dtype, (rows, width), (x_stride, _), _), (_, (cols, _), (weight_stride, _), _), _ = kinds
    element_unit = 16 // dtype.itemsize
    grid = cdiv(rows, tile.rows) * cdiv(cols, tile.cols), 1, 1
    scalars = rows, cols, x_stride // element_unit, weight_stride // element_unit
    return Launch(
        linear_goodness_kernel, grid, scalars, **kernel_constants(tile, width, element_unit, how, relu), **tile.options
    )

"""Positive pairs of a softmax contrast: losses from normalisers in one visit, and the pairs' share of the gradients.

What is left to do around the similarity kernels is O(N D), but as PyTorch operations it is dozens of launches and
float32 copies of the embeddings, which cost as much as the products of a batch of a few thousand rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from . import config
from .config import cdiv, next_power_of_2
from .launch import Grid, Launch, kinds, on, planned, rows_of
from .rows import TILE, Cut, optional, rounding, vector_unit, warps_for
from .tiles import elements_apart, narrow

GIVEN = tl.constexpr(ops.POSITIVE_GIVEN)
STACKED = tl.constexpr(ops.POSITIVE_STACKED)


@triton.jit
def partner_of(row, rows, PAIRING: tl.constexpr):
    """The row that holds each row's positive."""
    if PAIRING == GIVEN:
        return row
    if PAIRING == STACKED:
        return tl.where(row < rows // 2, row + rows // 2, row - rows // 2)
    return row ^ 1


@triton.jit
def dots(a, b, UNIT: tl.constexpr):
    """<a_i, b_i> of float32 rows in float64. UNIT neighbours, which one thread holds, are added in float32 first: a
    conversion to float64 takes as long as eight products."""
    products = a * b
    if UNIT > 1:
        products = tl.sum(tl.reshape(products, (a.shape[0], a.shape[1] // UNIT, UNIT)), 2)
    return tl.sum(products.to(tl.float64), 1)


@triton.jit
def loss_of(x, DECOUPLED: tl.constexpr):
    """(loss, its derivative) of a float64 x = normaliser - logit. log(1 + y) loses y where it is small; y log(1 + y) /
    ((1 + y) - 1) does not, as both roundings of 1 + y are one and the same."""
    if DECOUPLED:
        value = tl.where(x == -float("inf"), 0.0, x)
        return value, tl.where(x == -float("inf"), 0.0, 1.0).to(tl.float64)
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    tail = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 0, x, 0.0) + tail, tl.where(x > 0, 1.0 / u, y / u)


# How it works: a program takes ROWS rows, which stay in registers, with those of their positives.
# Bound by memory: reads both once. The logit is a float64 sum: at a scale of 33 rounding it costs 1e-6 of the loss.
@triton.jit(do_not_specialize=["rows"])
def odds_kernel(q, positive, scale, row_lse, col_lse, loss, slope, col_slope, logits, rows, width, q_stride, p_stride,
                UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRING: tl.constexpr,
                DECOUPLED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = row < rows
    whole = mask[:, None] & (col < width * UNIT)
    other = partner_of(row, rows, PAIRING)
    a = tl.load(q + (row * elements_apart(q_stride, UNIT))[:, None] + col, mask=whole, other=0.0).to(tl.float32)
    b = tl.load(positive + (other * elements_apart(p_stride, UNIT))[:, None] + col, mask=whole, other=0.0)
    logit = dots(a, b.to(tl.float32), UNIT) * tl.load(scale).to(tl.float64)
    # An infinite logit is an overflow of the inputs: NaN, as in a softmax, and not a loss of 0.
    x = tl.load(row_lse + row, mask=mask, other=0.0).to(tl.float64) - logit + logit * 0.0
    value, derivative = loss_of(x, DECOUPLED)
    tl.store(slope + row, derivative.to(tl.float32), mask=mask)
    if col_lse is not None:
        y = tl.load(col_lse + row, mask=mask, other=0.0).to(tl.float64) - logit
        more, derivative = loss_of(y, DECOUPLED)
        value += more
        tl.store(col_slope + row, derivative.to(tl.float32), mask=mask)
    tl.store(loss + row, value.to(tl.float32), mask=mask)
    tl.store(logits + row, logit.to(tl.float32), mask=mask)


@triton.jit
def share_of(grad, slope, col_slope, row, mask, grad_stride):
    """What the logits of these rows' positives take from their loss, its sign changed."""
    total = tl.load(slope + row, mask=mask, other=0.0)
    if col_slope is not None:
        total += tl.load(col_slope + row, mask=mask, other=0.0)
    return total * tl.load(grad + row * grad_stride, mask=mask, other=0.0)


# How it works: as odds_kernel. A row is written by its own program alone, and nobody reads a gradient of another's.
# Bound by memory: reads a row, its positive and what it writes once each.
@triton.jit(do_not_specialize=["rows"])
def add_kernel(q, positive, scale, grad, slope, col_slope, logits, dq, d_positive, inner, rows, width, q_stride,
               p_stride, grad_stride, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               PAIRING: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = row < rows
    whole = mask[:, None] & (col < width * UNIT)
    other = partner_of(row, rows, PAIRING)
    share = share_of(grad, slope, col_slope, row, mask, grad_stride)
    factor = -tl.load(scale).to(tl.float32)
    weight = share * factor
    a = tl.load(q + (row * elements_apart(q_stride, UNIT))[:, None] + col, mask=whole, other=0.0).to(tl.float32)
    dense = (row * width * UNIT)[:, None] + col
    if dq is not None:
        d = tl.load(dq + dense, mask=whole, other=0.0).to(tl.float32)
        along = dots(a, d, UNIT)
        both = weight
        if PAIRING != GIVEN:  # a row is the positive of its positive, and q has the part of both sides of S
            along *= 0.5
            both += share_of(grad, slope, col_slope, other, mask, grad_stride) * factor
        b = tl.load(positive + (other * elements_apart(p_stride, UNIT))[:, None] + col, mask=whole, other=0.0)
        d += both[:, None] * b.to(tl.float32)
        tl.store(dq + dense, narrow(d, dq.dtype.element_ty, PRECISION), mask=whole)
        of_positive = share.to(tl.float64) * tl.load(logits + row, mask=mask, other=0.0).to(tl.float64)
        tl.store(inner + row, (along - of_positive).to(tl.float32), mask=mask)
    if d_positive is not None:
        d = tl.load(d_positive + dense, mask=whole, other=0.0).to(tl.float32) + weight[:, None] * a
        tl.store(d_positive + dense, narrow(d, d_positive.dtype.element_ty, PRECISION), mask=whole)


def constants(cut: Cut, element_unit: int) -> dict:
    """Compile-time constants of every kernel over whole rows."""
    return {"UNIT": element_unit, "ROWS": cut.rows, "BLOCK": cut.block}


def whole_rows(rows: int, width: int, tensors: int, chip: str) -> Cut:
    """Whole rows of ``tensors`` tensors in a program's registers."""
    block = max(8, next_power_of_2(width))
    side = max(1, min(TILE // tensors // block, next_power_of_2(rows)))
    return Cut(side, block, warps_for(side * block * tensors, chip), False)


def positive_odds(q, positive, scale, row_lse, col_lse, pairing, decoupled):
    q, positive = _pair(q, positive, pairing)
    row_lse, col_lse = row_lse.contiguous(), col_lse.contiguous()
    rows, cols = row_lse.numel(), col_lse.numel()
    loss, slope, logit, col_slope = [row_lse.new_empty(n) for n in (rows, rows, rows, cols)]
    with on(q):
        launch = _odds_launch(kinds(q, positive, scale, row_lse, col_lse), pairing, decoupled)
        launch(q, positive, scale, row_lse, optional(col_lse), loss, slope, optional(col_slope), logit)
    return loss, slope, col_slope, logit


@planned
def _odds_launch(kinds: tuple, pairing: int, decoupled: bool) -> Launch:
    grid, scalars, constants = over_whole_rows(kinds, 2, 2)
    return Launch(odds_kernel, grid, scalars, PAIRING=pairing, DECOUPLED=decoupled, **constants)


def add_positives_(q, positive, scale, grad, slope, col_slope, logit, dq, d_positive, pairing):
    q, positive = _pair(q, positive, pairing)
    if not (dq.is_contiguous() and d_positive.is_contiguous()):
        raise ValueError("dq and d_positive must be contiguous")
    slope, col_slope, logit = slope.contiguous(), col_slope.contiguous(), logit.contiguous()
    inner = slope.new_empty(q.shape[0] if dq.numel() else 0)
    with on(q):
        tensors = q, positive, scale, grad, slope, optional(col_slope), logit, optional(dq), optional(d_positive)
        _add_launch(kinds(*tensors), pairing)(*tensors, inner)
    return inner


@planned
def _add_launch(kinds: tuple, pairing: int) -> Launch:
    grid, scalars, constants = over_whole_rows(kinds, 4, 2)
    (grad_stride,) = kinds[4][2]
    how = rounding(kinds[0])
    return Launch(add_kernel, grid, (*scalars, grad_stride), PAIRING=pairing, PRECISION=how, **constants)


def over_whole_rows(kinds: tuple, tensors: int, strided: int) -> tuple[Grid, tuple, dict]:
    """Grid, scalars and constants of a launch over whole rows of the first of `kinds`, with `tensors` (a power of two)
    like it in registers. The first `strided` of `kinds` may have any distance between rows."""
    device, (dtype, (rows, width), _, _), *_ = kinds
    strides = [stride for _, _, (stride, _), _ in kinds[1 : 1 + strided]]
    cut, unit = whole_rows(rows, width, tensors, config.family(device)), vector_unit(dtype, width, *strides)
    scalars = rows, width // unit, *(stride // unit for stride in strides)
    return (cdiv(rows, cut.rows), 1, 1), scalars, constants(cut, unit) | cut.options


def _pair(q: Tensor, positive: Tensor | None, pairing: int) -> tuple[Tensor, Tensor]:
    if pairing != ops.POSITIVE_GIVEN and q.shape[0] % 2:
        raise ValueError(f"rows that are one another's positives come in pairs; got {q.shape[0]} rows")
    q = rows_of(q)
    return q, q if positive is None else rows_of(positive)

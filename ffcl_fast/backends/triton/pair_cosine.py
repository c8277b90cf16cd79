"""Pair cosine: loss and both gradients in one visit of a sample's two activations.

With m = |a|^2 + 1e-12, cos = <a1, a2> / sqrt(m1 m2), w = dloss/dcos and upstream factor s:
d1 = s w (a2 / sqrt(m1 m2) - cos a1 / m1), d2 likewise, through ReLU's mask. Memory-bound: two reads and two writes of
(N, D), where autograd makes about a dozen passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import cdiv
from .goodness import Walk, constants
from .launch import Launch, kinds, on, planned, processors, rows_of
from .rows import (
    Cut,
    activation,
    cut_of,
    floats,
    optional,
    part_sum,
    rounding,
    store_gradient,
    vector_unit,
)
from .tiles import elements_apart, narrow

EPS = tl.constexpr(1e-12)  # ops.PAIR_COSINE_EPS
SCALE_BLOCK = 4096


@triton.jit
def loss_of(s11, s22, s12, target, margin):
    """(loss, c0, c1, c2) of pairs from their sums of squares and products; a NaN stays."""
    m1 = s11 + EPS
    m2 = s22 + EPS
    product = tl.sqrt_rn(m1) * tl.sqrt_rn(m2)
    cos = tl.div_rn(s12, product)
    positive = target == 1.0
    negative = target == -1.0
    excess = cos - margin
    loss = tl.where(positive, 1.0 - cos, tl.where(negative, tl.where(excess < 0, 0.0, excess), 0.0))
    w = tl.where(positive, -1.0, tl.where(negative & ((cos <= margin) == 0), 1.0, 0.0))
    return loss, tl.div_rn(w, product), tl.div_rn(w * cos, m1), tl.div_rn(w * cos, m2)


@triton.jit
def store_pair(loss, coefficients, row, value, c0, c1, c2, mask):
    tl.store(loss + row, value, mask=mask)
    tl.store(coefficients + row * 3, c0, mask=mask)
    tl.store(coefficients + row * 3 + 1, c1, mask=mask)
    tl.store(coefficients + row * 3 + 2, c2, mask=mask)


@triton.jit
def store_gradients(d1, d2, at, a1, a2, c0, c1, c2, mask, RELU: tl.constexpr, PRECISION: tl.constexpr):
    if d1 is not None:
        store_gradient(d1 + at, c0 * a2 - c1 * a1, a1, mask, RELU, PRECISION)
    if d2 is not None:
        store_gradient(d2 + at, c0 * a1 - c2 * a2, a2, mask, RELU, PRECISION)


# How it works: a program takes ROWS pairs. Not LOOP: both activations stay in registers between the three sums and the
# gradients. LOOP: one pair in steps of BLOCK, walked again for the gradients; the second read comes from L2.
# Bound by memory: two loads, two stores and about ten float32 operations a pair of elements.
@triton.jit(do_not_specialize=["rows"])
def pair_cosine_kernel(h1, h2, target, loss, coefficients, d1, d2, rows, width, stride1, stride2, margin, scale,
                       UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
                       RELU: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    valid = row < rows
    kept = valid[:, None]
    x1 = h1 + (row * elements_apart(stride1, UNIT))[:, None] + col
    x2 = h2 + (row * elements_apart(stride2, UNIT))[:, None] + col
    dense = (row * elements)[:, None] + col
    if LOOP:
        t11 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        t22 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        t12 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, elements, BLOCK):
            mask = kept & (col < elements - start)
            a1 = activation(x1 + start, mask, RELU)
            a2 = activation(x2 + start, mask, RELU)
            t11 += a1 * a1
            t22 += a2 * a2
            t12 += a1 * a2
    else:
        whole = kept & (col < elements)
        a1 = activation(x1, whole, RELU)
        a2 = activation(x2, whole, RELU)
        t11 = a1 * a1
        t22 = a2 * a2
        t12 = a1 * a2
    t = tl.load(target + row, mask=valid, other=0.0)
    value, c0, c1, c2 = loss_of(tl.sum(t11, 1), tl.sum(t22, 1), tl.sum(t12, 1), t, margin)
    store_pair(loss, coefficients, row, value, c0, c1, c2, valid)
    c0 = (c0 * scale)[:, None]
    c1 = (c1 * scale)[:, None]
    c2 = (c2 * scale)[:, None]
    if LOOP:
        if d1 is not None or d2 is not None:
            for start in range(0, elements, BLOCK):
                mask = kept & (col < elements - start)
                a1 = activation(x1 + start, mask, RELU)
                a2 = activation(x2 + start, mask, RELU)
                store_gradients(d1, d2, dense + start, a1, a2, c0, c1, c2, mask, RELU, PRECISION)
    else:
        store_gradients(d1, d2, dense, a1, a2, c0, c1, c2, whole, RELU, PRECISION)


# How it works: a program adds the squares and products of its part of one pair.
# Bound by memory: one read of both.
@triton.jit(do_not_specialize=["parts", "steps", "count"])
def pair_partial_kernel(h1, h2, partials, parts, steps, count, width, stride1, stride2, UNIT: tl.constexpr,
                        BLOCK: tl.constexpr, RELU: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    elements = width * UNIT
    t11 = tl.zeros((BLOCK,), dtype=tl.float32)
    t22 = tl.zeros((BLOCK,), dtype=tl.float32)
    t12 = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = (pid % parts).to(tl.int64) * (steps * BLOCK)
    for step in range(0, steps):
        col = begin + step * BLOCK + tl.arange(0, BLOCK)
        a1 = activation(h1 + row * elements_apart(stride1, UNIT) + col, col < elements, RELU)
        a2 = activation(h2 + row * elements_apart(stride2, UNIT) + col, col < elements, RELU)
        t11 += a1 * a1
        t22 += a2 * a2
        t12 += a1 * a2
    tl.store(partials + pid, tl.sum(t11, 0))
    tl.store(partials + count + pid, tl.sum(t22, 0))
    tl.store(partials + 2 * tl.cast(count, tl.int64) + pid, tl.sum(t12, 0))


# How it works: the second launch of a pair that many programs share: each adds the pair's partial sums in the same
# order and writes its part of the gradients; the first one writes the loss. `columns`, 1 where no gradient is asked
# for, is the number of programs a pair.
# Bound by memory: two reads, from L2 where they fit, and two writes.
@triton.jit(do_not_specialize=["parts", "columns", "steps", "count"])
def pair_finish_kernel(h1, h2, partials, target, loss, coefficients, d1, d2, parts, columns, steps, count, width,
                       stride1, stride2, margin, scale, UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                       RELU: tl.constexpr, PRECISION: tl.constexpr):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last may still lie in L2
    part = pid % columns
    row = (pid // columns).to(tl.int64)
    elements = width * UNIT
    s11 = part_sum(partials, row, parts, PARTS)
    s22 = part_sum(partials + count, row, parts, PARTS)
    s12 = part_sum(partials + 2 * tl.cast(count, tl.int64), row, parts, PARTS)
    value, c0, c1, c2 = loss_of(s11, s22, s12, tl.load(target + row), margin)
    if part == 0:
        store_pair(loss, coefficients, row, value, c0, c1, c2, None)
    c0 *= scale
    c1 *= scale
    c2 *= scale
    if d1 is not None or d2 is not None:
        begin = part.to(tl.int64) * (steps * BLOCK)
        for step in range(0, steps):
            col = begin + step * BLOCK + tl.arange(0, BLOCK)
            mask = col < elements
            a1 = activation(h1 + row * elements_apart(stride1, UNIT) + col, mask, RELU)
            a2 = activation(h2 + row * elements_apart(stride2, UNIT) + col, mask, RELU)
            store_gradients(d1, d2, row * elements + col, a1, a2, c0, c1, c2, mask, RELU, PRECISION)


# How it works: tiles of ROWS x BLOCK, nothing is summed; `steps` tiles a row.
# Bound by memory: two reads and two writes.
@triton.jit(do_not_specialize=["rows", "steps"])
def pair_backward_kernel(h1, h2, coefficients, grad, d1, d2, rows, steps, width, stride1, stride2, UNIT: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // steps).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = ((pid % steps).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    elements = width * UNIT
    valid = row < rows
    mask = valid[:, None] & (col < elements)
    g = tl.load(grad + row, mask=valid, other=0.0)
    c0 = (tl.load(coefficients + row * 3, mask=valid, other=0.0) * g)[:, None]
    c1 = (tl.load(coefficients + row * 3 + 1, mask=valid, other=0.0) * g)[:, None]
    c2 = (tl.load(coefficients + row * 3 + 2, mask=valid, other=0.0) * g)[:, None]
    a1 = activation(h1 + (row * elements_apart(stride1, UNIT))[:, None] + col, mask, RELU)
    a2 = activation(h2 + (row * elements_apart(stride2, UNIT))[:, None] + col, mask, RELU)
    store_gradients(d1, d2, (row * elements)[:, None] + col, a1, a2, c0, c1, c2, mask, RELU, PRECISION)


# How it works: every program reads the factor, and leaves where it is 1: the gradients were right already. There are
# only as many as fill the chip, so that leaving takes no longer than a launch.
# Bound by memory: one read and one write of x, or nothing.
@triton.jit(do_not_specialize=["size"])
def scale_kernel(x, factor, size, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            scaled = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * value
            tl.store(x + at, narrow(scaled, x.dtype.element_ty, PRECISION), mask=at < size)


def pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2):
    h1, h2 = rows_of(h1), rows_of(h2)
    rows, width = h1.shape
    loss, coefficients = floats(h1, rows), floats(h1, rows, 3)
    d1, d2 = (h1.new_empty((rows if need else 0, width)) for need in (need_1, need_2))
    outputs = loss, coefficients, optional(d1), optional(d2)
    with on(h1):
        walk = _forward(kinds(h1, h2, target), margin, relu, scale, need_1, need_2)
        if not walk.partials:
            walk.first(h1, h2, target, *outputs)
        else:
            partials = floats(h1, *walk.partials)
            walk.first(h1, h2, partials)
            walk.second(h1, h2, partials, target, *outputs)
    return loss, coefficients, d1, d2


@planned
def _forward(kinds: tuple, margin: float, relu: bool, scale: float, need_1: bool, need_2: bool) -> Walk:
    cut, unit, size = _sizes(kinds)
    rows = kinds[1][1][0]
    common = constants(unit, relu)
    how = {"PRECISION": rounding(kinds[0])}
    if cut.parts == 1:
        grid = cdiv(rows, cut.rows), 1, 1
        scalars = rows, *size, margin, scale
        return Walk(Launch(pair_cosine_kernel, grid, scalars, **common, **how, **cut.constants, **cut.options))
    columns, count = cut.parts if need_1 or need_2 else 1, rows * cut.parts
    first = Launch(
        pair_partial_kernel, (count, 1, 1), (cut.parts, cut.steps, count, *size),
        **common, BLOCK=cut.block, **cut.options,
    )  # fmt: skip
    second = Launch(
        pair_finish_kernel, (rows * columns, 1, 1), (cut.parts, columns, cut.steps, count, *size, margin, scale),
        **common, **how, **cut.part_constants, **cut.options,
    )  # fmt: skip
    return Walk(first, second, (3, count))


def _sizes(kinds: tuple) -> tuple[Cut, int, tuple[int, int, int]]:
    """The cut, the vector unit, and width and row strides in that unit, of the pairs that `kinds` begins with."""
    _, (dtype, (_, width), (stride1, _), _), (_, _, (stride2, _), _), *_ = kinds
    unit = vector_unit(dtype, width, stride1, stride2)
    return cut_of(kinds, 2), unit, (width // unit, stride1 // unit, stride2 // unit)


def pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2):
    h1, h2 = rows_of(h1), rows_of(h2)
    rows, width = h1.shape
    d1, d2 = (h1.new_empty((rows if need else 0, width)) for need in (need_1, need_2))
    if need_1 or need_2:
        with on(h1):
            launch = _backward(kinds(h1, h2, coefficients, grad), relu, need_1, need_2)
            launch(h1, h2, coefficients, grad, optional(d1), optional(d2))
    return d1, d2


@planned
def _backward(kinds: tuple, relu: bool, need_1: bool, need_2: bool) -> Launch:
    cut, unit, size = _sizes(kinds)
    rows, width = kinds[1][1]
    steps = cdiv(width, cut.block)
    return Launch(
        pair_backward_kernel, (cdiv(rows, cut.rows) * steps, 1, 1), (rows, steps, *size),
        **constants(unit, relu), ROWS=cut.rows, BLOCK=cut.block, PRECISION=rounding(kinds[0]), **cut.options,
    )  # fmt: skip


def scale_(x: Tensor, factor: Tensor) -> None:
    dense = x if x.is_contiguous() else x.contiguous()
    if x.numel():
        with on(x):
            _scale_launch(kinds(dense, factor))(dense, factor)
    if dense is not x:
        x.copy_(dense)


@planned
def _scale_launch(kinds: tuple) -> Launch:
    device, (_, shape, *_), _ = kinds
    size = shape.numel()
    programs = min(cdiv(size, SCALE_BLOCK), 16 * processors(device))
    how = rounding(device)
    return Launch(scale_kernel, (programs, 1, 1), (size,), BLOCK=SCALE_BLOCK, PRECISION=how, num_warps=4)

"""ReLU, goodness and the normalised output from one read of the pre-activation; the gradient of both in one pass.

a = max(h, 0) or h; g = sum a^2 (or the mean); out = a / (|a| / sqrt(D) + eps). Memory-bound throughout: the forward
moves one read and one write of (N, D), the backward two reads (h and out's gradient) and one write.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .config import cdiv
from .launch import Launch, kinds, on, planned, rows_of
from .rows import activation, add_parts, cut_of, floats, part_sum, rounding, store_gradient, vector_unit
from .tiles import elements_apart, narrow


@triton.jit
def inverse_rms(mean_square, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square) + eps)


@triton.jit
def factors(goodness, grad, along, inverse_width, eps, MEAN: tl.constexpr):
    """(p, r): dh = p a + r go, from a row's goodness, its gradient (None: zero) and along = sum go a (None: no go)."""
    p = tl.zeros(goodness.shape, dtype=tl.float32)
    r = p
    if grad is not None:
        p += 2.0 * grad
        if MEAN:
            p *= inverse_width
    if along is not None:
        square = goodness
        if not MEAN:
            square *= inverse_width
        rms = tl.sqrt_rn(square)
        r = inverse_rms(square, eps)
        # A row of zeros has no direction: its norm passes no gradient on.
        p -= tl.where(rms == 0, 0.0, along * r * r * inverse_width / rms)
    return p, r


# How it works: a program takes ROWS rows. Not LOOP: they stay in registers, one read and one write. LOOP: one row in
# steps of BLOCK, walked again for the output; the second read comes from L2, whose lines it then gives up.
# Bound by memory: per element one load, one store and three float32 operations.
@triton.jit(do_not_specialize=["rows"])
def goodness_kernel(h, goodness, out, rows, width, stride, inverse_width, eps, UNIT: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr, LOOP: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr,
                    PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    kept = (row < rows)[:, None]
    source = h + (row * elements_apart(stride, UNIT))[:, None] + col
    if LOOP:
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, elements, BLOCK):
            a = activation(source + start, kept & (col < elements - start), RELU)
            squares += a * a
    else:
        a = activation(source, kept & (col < elements), RELU)
        squares = a * a
    total = tl.sum(squares, 1)
    mean_square = total * inverse_width
    if MEAN:
        total = mean_square
    tl.store(goodness + row, total, mask=row < rows)
    if out is not None:
        factor = inverse_rms(mean_square, eps)[:, None]
        to = out + (row * elements)[:, None] + col
        if LOOP:
            for start in range(0, elements, BLOCK):
                mask = kept & (col < elements - start)
                a = activation(source + start, mask, RELU)
                tl.store(to + start, narrow(a * factor, out.dtype.element_ty, PRECISION), mask=mask)
        else:
            tl.store(to, narrow(a * factor, out.dtype.element_ty, PRECISION), mask=kept & (col < elements))


# How it works: a program sums the squares (`other` None) or the products with `other` of its part of one row.
# Bound by memory: one read. The launch that follows goes backwards and finds in L2 what fits there. Pairs of launches
# for groups of rows that fit would find it all, but each launch takes an H200 as long as reading 16 MB does.
@triton.jit(do_not_specialize=["parts", "steps"])
def partial_kernel(h, other, partials, parts, steps, width, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr,
                   RELU: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    elements = width * UNIT
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = (pid % parts).to(tl.int64) * (steps * BLOCK)
    for step in range(0, steps):
        col = begin + step * BLOCK + tl.arange(0, BLOCK)
        mask = col < elements
        a = activation(h + row * elements_apart(stride, UNIT) + col, mask, RELU)
        if other is not None:
            total += a * tl.load(other + row * elements + col, mask=mask, other=0.0).to(tl.float32)
        else:
            total += a * a
    tl.store(partials + pid, tl.sum(total, 0))


# How it works: the second launch of a row that many programs share: each adds the row's partial sums in the same
# order, and writes its part of the output.
# Bound by memory: one read and one write.
@triton.jit(do_not_specialize=["parts", "steps"])
def normalize_kernel(h, partials, goodness, out, parts, steps, width, stride, inverse_width, eps,
                     UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, MEAN: tl.constexpr,
                     RELU: tl.constexpr, PRECISION: tl.constexpr):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last may still lie in L2
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    elements = width * UNIT
    total = part_sum(partials, row, parts, PARTS)
    mean_square = total * inverse_width
    if MEAN:
        total = mean_square
    if part == 0:
        tl.store(goodness + row, total)
    factor = inverse_rms(mean_square, eps)
    begin = part.to(tl.int64) * (steps * BLOCK)
    for step in range(0, steps):
        col = begin + step * BLOCK + tl.arange(0, BLOCK)
        mask = col < elements
        a = activation(h + row * elements_apart(stride, UNIT) + col, mask, RELU)
        tl.store(out + row * elements + col, narrow(a * factor, out.dtype.element_ty, PRECISION), mask=mask)


# How it works: as goodness_kernel; `along`, the row's sum of go a, needs the whole row before any of dh is known.
# Bound by memory: reads h and go once (LOOP: again from L2), writes dh once.
@triton.jit(do_not_specialize=["rows"])
def backward_kernel(h, goodness, grad_goodness, grad_out, dh, rows, width, stride, inverse_width, eps,
                    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
                    MEAN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    valid = row < rows
    kept = valid[:, None]
    source = h + (row * elements_apart(stride, UNIT))[:, None] + col
    dense = (row * elements)[:, None] + col
    along = None
    if LOOP:
        if grad_out is not None:
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, elements, BLOCK):
                mask = kept & (col < elements - start)
                go = tl.load(grad_out + dense + start, mask=mask, other=0.0).to(tl.float32)
                total += activation(source + start, mask, RELU) * go
            along = tl.sum(total, 1)
    else:
        whole = kept & (col < elements)
        a = activation(source, whole, RELU)
        if grad_out is not None:
            go = tl.load(grad_out + dense, mask=whole, other=0.0).to(tl.float32)
            along = tl.sum(a * go, 1)
    grad = None
    if grad_goodness is not None:
        grad = tl.load(grad_goodness + row, mask=valid, other=0.0)
    g = tl.load(goodness + row, mask=valid, other=0.0)
    p, r = factors(g, grad, along, inverse_width, eps, MEAN)
    if LOOP:
        for start in range(0, elements, BLOCK):
            mask = kept & (col < elements - start)
            a = activation(source + start, mask, RELU)
            d = p[:, None] * a
            if grad_out is not None:
                d += r[:, None] * tl.load(grad_out + dense + start, mask=mask, other=0.0).to(tl.float32)
            store_gradient(dh + dense + start, d, a, mask, RELU, PRECISION)
    else:
        d = p[:, None] * a
        if grad_out is not None:
            d += r[:, None] * go
        store_gradient(dh + dense, d, a, whole, RELU, PRECISION)


# How it works: the second launch of the gradient of a row that many programs share, or the only one where no out has
# a gradient.
# Bound by memory: reads h and go, writes dh.
@triton.jit(do_not_specialize=["parts", "steps"])
def gradient_kernel(h, partials, goodness, grad_goodness, grad_out, dh, parts, steps, width, stride,
                    inverse_width, eps, UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                    MEAN: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last may still lie in L2
    row = (pid // parts).to(tl.int64)
    elements = width * UNIT
    along = None
    if grad_out is not None:
        along = part_sum(partials, row, parts, PARTS)
    grad = None
    if grad_goodness is not None:
        grad = tl.load(grad_goodness + row)
    p, r = factors(tl.load(goodness + row), grad, along, inverse_width, eps, MEAN)
    begin = (pid % parts).to(tl.int64) * (steps * BLOCK)
    for step in range(0, steps):
        col = begin + step * BLOCK + tl.arange(0, BLOCK)
        mask = col < elements
        a = activation(h + row * elements_apart(stride, UNIT) + col, mask, RELU)
        d = p * a
        if grad_out is not None:
            d += r * tl.load(grad_out + row * elements + col, mask=mask, other=0.0).to(tl.float32)
        store_gradient(dh + row * elements + col, d, a, mask, RELU, PRECISION)


def constants(unit: int, relu: bool, **more: object) -> dict:
    """Compile-time constants that the kernels of this module share."""
    return {"UNIT": unit, "RELU": relu, **more}


class Walk(NamedTuple):
    """The launch that takes whole rows; or for rows that many programs share one of partial sums, and one that goes on
    from them, None where they are only added."""

    first: Launch
    second: Launch | None = None
    partials: tuple[int, ...] = ()  # their shape
    factor: float = 1.0  # of sums that are only added


def goodness_forward(h, mean, relu, normalize, eps):
    h = rows_of(h)
    goodness = floats(h, h.shape[0])
    out = h.new_empty(h.shape if normalize else (0, h.shape[1]))
    into = out if normalize else None
    with on(h):
        walk = _forward(kinds(h), mean, relu, normalize, eps)
        if not walk.partials:
            walk.first(h, goodness, into)
        else:
            partials = floats(h, *walk.partials)
            walk.first(h, None, partials)
            if walk.second:
                walk.second(h, partials, goodness, into)
            else:
                add_parts(partials, goodness, walk.factor)
    return goodness, out


@planned
def _forward(kinds: tuple, mean: bool, relu: bool, normalize: bool, eps: float) -> Walk:
    device, (dtype, (rows, width), (stride, _), _) = kinds
    cut, unit = cut_of(kinds, 1), vector_unit(dtype, width, stride)
    size = width // unit, stride // unit
    common = constants(unit, relu)
    last = {"MEAN": mean, "PRECISION": rounding(device)}
    if cut.parts == 1:
        scalars = rows, *size, 1.0 / width, eps
        grid = cdiv(rows, cut.rows), 1, 1
        return Walk(Launch(goodness_kernel, grid, scalars, **common, **last, **cut.constants, **cut.options))
    grid, scalars = (rows * cut.parts, 1, 1), (cut.parts, cut.steps, *size)
    first = Launch(partial_kernel, grid, scalars, **common, BLOCK=cut.block, **cut.options)
    second = None
    if normalize:
        scalars = *scalars, 1.0 / width, eps
        second = Launch(normalize_kernel, grid, scalars, **common, **last, **cut.part_constants, **cut.options)
    return Walk(first, second, (rows, cut.parts), 1.0 / width if mean else 1.0)


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    h = rows_of(h)
    dh = h.new_empty(h.shape)
    with on(h):
        walk = _backward(kinds(h, goodness, grad_goodness, grad_out), mean, relu, eps)
        if not walk.partials:
            walk.first(h, goodness, grad_goodness, grad_out, dh)
        else:
            partials = None
            if grad_out is not None:
                partials = floats(h, *walk.partials)
                walk.first(h, grad_out, partials)
            walk.second(h, partials, goodness, grad_goodness, grad_out, dh)
    return dh


@planned
def _backward(kinds: tuple, mean: bool, relu: bool, eps: float) -> Walk:
    device, (dtype, (rows, width), (stride, _), _), _, _, grad_out = kinds
    tensors = 1 if grad_out is None else 2
    cut, unit = cut_of(kinds, tensors), vector_unit(dtype, width, stride)
    size = width // unit, stride // unit
    common = constants(unit, relu)
    last = {"MEAN": mean, "PRECISION": rounding(device)}
    if cut.parts == 1:
        scalars = rows, *size, 1.0 / width, eps
        grid = cdiv(rows, cut.rows), 1, 1
        return Walk(Launch(backward_kernel, grid, scalars, **common, **last, **cut.constants, **cut.options))
    grid, scalars = (rows * cut.parts, 1, 1), (cut.parts, cut.steps, *size)
    first = Launch(partial_kernel, grid, scalars, **common, BLOCK=cut.block, **cut.options)
    scalars = *scalars, 1.0 / width, eps
    second = Launch(gradient_kernel, grid, scalars, **common, **last, **cut.part_constants, **cut.options)
    return Walk(first, second, (rows, cut.parts))

"""L2-normalisation: rows of unit length and their norms from one visit to the input, the gradient from one visit too.

z = x / max(|x|, eps) and dx = (dz - z <z, dz>) / |x|, without the projection where the norm was under eps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import cdiv
from .launch import Launch, kinds, on, planned, rows_of
from .rows import Cut, cut_of, floats, rounding, vector_unit
from .tiles import elements_apart, narrow


# How it works: a program takes ROWS rows. Not LOOP: they stay in registers, one read and one write. LOOP: one row in
# steps of BLOCK, walked again for the output; the second read comes from L2.
# Bound by memory: per element one load, one store and two float32 operations.
@triton.jit(do_not_specialize=["rows"])
def unit_kernel(x, z, norms, rows, width, stride, eps, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                LOOP: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    kept = (row < rows)[:, None]
    source = x + (row * elements_apart(stride, UNIT))[:, None] + col
    to = z + (row * elements)[:, None] + col
    if LOOP:
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, elements, BLOCK):
            value = tl.load(source + start, mask=kept & (col < elements - start), other=0.0).to(tl.float32)
            squares += value * value
    else:
        whole = kept & (col < elements)
        value = tl.load(source, mask=whole, other=0.0).to(tl.float32)
        squares = value * value
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    norm = tl.where(norm < eps, eps, norm)  # not a maximum: NaN stays
    tl.store(norms + row, norm, mask=row < rows)
    factor = tl.div_rn(1.0, norm)[:, None]
    if LOOP:
        for start in range(0, elements, BLOCK):
            mask = kept & (col < elements - start)
            value = tl.load(source + start, mask=mask, other=0.0).to(tl.float32)
            tl.store(to + start, narrow(value * factor, z.dtype.element_ty, PRECISION), mask=mask)
    else:
        tl.store(to, narrow(value * factor, z.dtype.element_ty, PRECISION), mask=whole)


# How it works: as unit_kernel; `along`, the row's <z, dz>, needs the whole row before any of dx is known.
# Bound by memory: reads z and dz once (LOOP: again from L2), writes dx once.
@triton.jit(do_not_specialize=["rows"])
def unit_backward_kernel(z, norms, dz, dx, rows, width, stride, eps, UNIT: tl.constexpr, ROWS: tl.constexpr,
                         BLOCK: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    elements = width * UNIT
    kept = (row < rows)[:, None]
    dense = (row * elements)[:, None] + col
    source = dz + (row * elements_apart(stride, UNIT))[:, None] + col
    if LOOP:
        products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, elements, BLOCK):
            mask = kept & (col < elements - start)
            unit = tl.load(z + dense + start, mask=mask, other=0.0).to(tl.float32)
            products += unit * tl.load(source + start, mask=mask, other=0.0).to(tl.float32)
    else:
        whole = kept & (col < elements)
        unit = tl.load(z + dense, mask=whole, other=0.0).to(tl.float32)
        grad = tl.load(source, mask=whole, other=0.0).to(tl.float32)
        products = unit * grad
    norm = tl.load(norms + row, mask=row < rows, other=1.0)
    along = tl.where(norm > eps, tl.sum(products, 1), 0.0)[:, None]  # a shorter row was divided by a constant
    factor = tl.div_rn(1.0, norm)[:, None]
    if LOOP:
        for start in range(0, elements, BLOCK):
            mask = kept & (col < elements - start)
            unit = tl.load(z + dense + start, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(source + start, mask=mask, other=0.0).to(tl.float32)
            value = (grad - unit * along) * factor
            tl.store(dx + dense + start, narrow(value, dx.dtype.element_ty, PRECISION), mask=mask)
    else:
        value = (grad - unit * along) * factor
        tl.store(dx + dense, narrow(value, dx.dtype.element_ty, PRECISION), mask=whole)


def constants(cut: Cut, element_unit: int, how: str) -> dict:
    """Compile-time constants of both kernels. Rows too long for a program's registers are always walked by one."""
    return cut.constants | {"UNIT": element_unit, "PRECISION": how}


def normalize_forward(x, eps, dtype):
    x = rows_of(x)
    z, norms = x.new_empty(x.shape, dtype=dtype), floats(x, x.shape[0])
    with on(x):
        _launch(unit_kernel, kinds(x, z), 1, eps)(x, z, norms)
    return z, norms


def normalize_backward(z, norms, dz, eps, dtype):
    dz = rows_of(dz)
    dx = z.new_empty(z.shape, dtype=dtype)
    with on(z):
        _launch(unit_backward_kernel, kinds(dz, z, norms, dx), 2, eps)(z, norms, dz, dx)
    return dx


@planned
def _launch(kernel, kinds: tuple, tensors: int, eps: float) -> Launch:
    """`tensors` like the first of `kinds`, whose stride the kernel takes, are in a program's registers."""
    device, (dtype, (rows, width), (stride, _), _), *_ = kinds
    cut, unit = cut_of(kinds, tensors), vector_unit(dtype, width, stride)
    grid, scalars = (cdiv(rows, cut.rows), 1, 1), (rows, width // unit, stride // unit, eps)
    return Launch(kernel, grid, scalars, **constants(cut, unit, rounding(device)), **cut.options)

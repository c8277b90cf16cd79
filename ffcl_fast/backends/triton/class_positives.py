"""SupCon's positives, all other rows of a class: class sums by integers, and what rows take from their class's.

As PyTorch operations these are dozens of launches and a dozen passes over float32, float64 and integer copies of the
embeddings. A class's rows are added by atomics, whose order differs between runs; the sum of integers does not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import config
from .config import cdiv
from .launch import Launch, kinds, on, planned, rows_of
from .positives import dots, loss_of, over_whole_rows
from .rows import floats, rounding
from .tiles import elements_apart, narrow

PAIR_TENSORS = 8  # in the registers of add_to_class_kernel: two of rows, of float32, twice as many of integers
INTEGER_BITS = 62  # of 63, so that rounding up of every row does not reach the sign


@triton.jit
def weighted(x, weight, row, mask, width, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Whole rows of x in float32, times their weights where there are any."""
    col = tl.arange(0, BLOCK)[None, :]
    whole = mask[:, None] & (col < width * UNIT)
    a = tl.load(x + (row * elements_apart(stride, UNIT))[:, None] + col, mask=whole, other=0.0).to(tl.float32)
    if weight is not None:
        a *= tl.load(weight + row, mask=mask, other=0.0)[:, None]
    return a


# How it works: PARTS programs stride over blocks of ROWS rows; each leaves its largest finite element.
# Bound by memory: reads x once.
@triton.jit(do_not_specialize=["rows"])
def largest_kernel(x, weight, parts, rows, width, stride, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   PARTS: tl.constexpr):
    part = tl.program_id(0)
    best = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(part * ROWS, rows, PARTS * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        size = tl.abs(weighted(x, weight, row, row < rows, width, stride, UNIT, BLOCK))
        best = tl.maximum(best, tl.where(size < float("inf"), size, 0.0))  # false for NaN
    tl.store(parts + part, tl.max(tl.max(best, 1), 0))


@triton.jit
def power_of_2(exponent):
    """2^exponent in float64, exactly; exponent from -1022 to 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def free_bits(parts, bits, PARTS: tl.constexpr):
    """The power of two by which every element becomes an integer, so that sums of rows fit: `bits` are theirs."""
    largest = tl.max(tl.load(parts + tl.arange(0, PARTS)), 0)
    return bits - (((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 126)  # largest < 2^(its exponent field - 126)


# How it works: a program adds ROWS pairs of neighbours to their classes' rows of `table`, (classes, D) integers; their
# number to `members`, and to `spoilt` that of the rows with an element that is not finite. Neighbours of one class, as
# two views of a sample are, go there together.
# Bound by atomics in L2: one of 64 bits an element, or of two elements where neighbours are of one class; reads x once.
@triton.jit(do_not_specialize=["rows", "bits"])
def add_to_class_kernel(x, weight, group, parts, table, members, spoilt, rows, width, stride, bits, UNIT: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    even = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * 2
    odd = even + 1
    unit = power_of_2(free_bits(parts, bits, PARTS))
    first, first_bad = integers(x, weight, even, even < rows, unit, width, stride, UNIT, BLOCK)
    second, second_bad = integers(x, weight, odd, odd < rows, unit, width, stride, UNIT, BLOCK)
    to = tl.load(group + even, mask=even < rows, other=0)
    other = tl.load(group + odd, mask=odd < rows, other=-1)
    both = to == other
    first += tl.where(both[:, None], second, 0)
    first_bad += tl.where(both, second_bad, 0)
    elements = width * UNIT
    add(table, members, spoilt, to, first, both.to(tl.int64) + 1, first_bad, even < rows, elements, BLOCK)
    alone = (odd < rows) & (both == 0)
    add(table, members, spoilt, other, second, tl.full((ROWS,), 1, tl.int64), second_bad, alone, elements, BLOCK)


@triton.jit
def integers(x, weight, row, mask, unit, width, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Whole rows in units of 1 / unit, and for each 1 where an element is not finite, else 0."""
    a = weighted(x, weight, row, mask, width, stride, UNIT, BLOCK)
    finite = tl.abs(a) < float("inf")
    whole = tl.floor(tl.where(finite, a, 0.0).to(tl.float64) * unit + 0.5).to(tl.int64)
    return whole, tl.max(tl.where(finite, 0, 1), 1).to(tl.int64)


@triton.jit
def add(table, members, spoilt, to, rows, number, bad, mask, elements, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)[None, :]
    tl.atomic_add(table + (to * elements)[:, None] + col, rows, mask=mask[:, None] & (col < elements), sem="relaxed")
    tl.atomic_add(members + to, number, mask=mask, sem="relaxed")
    tl.atomic_add(spoilt + to, bad, mask=mask & (bad > 0), sem="relaxed")


# How it works: a program turns ROWS classes' integers into float32, NaN where a row was not finite.
# Bound by memory: 8 bytes read and 4 written an element.
@triton.jit(do_not_specialize=["classes", "bits"])
def class_sums_kernel(table, members, spoilt, parts, sums, counts, classes, width, bits, UNIT: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = row < classes
    elements = width * UNIT
    at = (row * elements)[:, None] + col
    whole = mask[:, None] & (col < elements)
    value = tl.load(table + at, mask=whole, other=0).to(tl.float64) * power_of_2(-free_bits(parts, bits, PARTS))
    bad = tl.load(spoilt + row, mask=mask, other=0) > 0
    tl.store(sums + at, tl.where(bad[:, None], float("nan"), value.to(tl.float32)), mask=whole)
    tl.store(counts + row, tl.load(members + row, mask=mask, other=0).to(tl.float32), mask=mask)


@triton.jit
def positives_mean(a, sums, at, count, whole, width, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of the other rows of each row's class, 0 where there is none."""
    col = tl.arange(0, BLOCK)[None, :]
    total = tl.load(sums + (at * (width * UNIT))[:, None] + col, mask=whole, other=0.0)
    return (total - a) * tl.div_rn(1.0, tl.maximum(count, 1.0))[:, None]


# How it works: a program takes ROWS rows, which stay in registers, with the sums of their classes.
# Bound by memory: reads q once and a class's sums from L2.
@triton.jit(do_not_specialize=["rows"])
def class_odds_kernel(q, sums, counts, group, scale, row_lse, loss, slope, logits, rows, width, stride,
                      UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    whole = mask[:, None] & (tl.arange(0, BLOCK)[None, :] < width * UNIT)
    a = weighted(q, None, row, mask, width, stride, UNIT, BLOCK)
    at = tl.load(group + row, mask=mask, other=0)
    count = tl.load(counts + at, mask=mask, other=0.0) - 1.0
    logit = dots(a, positives_mean(a, sums, at, count, whole, width, UNIT, BLOCK), UNIT)
    logit *= tl.load(scale).to(tl.float64)
    x = tl.load(row_lse + row, mask=mask, other=0.0).to(tl.float64) - logit + logit * 0.0
    value, derivative = loss_of(x, False)
    mean = count > 1.0  # one positive is left out of the normaliser
    value = tl.where(mean, x, value)
    derivative = tl.where(mean, 1.0, derivative)
    none = count < 1.0
    tl.store(loss + row, tl.where(none & (x == x), 0.0, value).to(tl.float32), mask=mask)
    tl.store(slope + row, tl.where(none, 0.0, derivative).to(tl.float32), mask=mask)
    tl.store(logits + row, logit.to(tl.float32), mask=mask)


# How it works: as class_odds_kernel. A row's gradient takes its own positives' mean, and as a positive of the others
# of its class what they take: the class's sum of `share` times its rows, less its own.
# Bound by memory: reads q and dq, writes one gradient; the sums come from L2.
@triton.jit(do_not_specialize=["rows"])
def add_class_kernel(q, sums, taken, counts, group, scale, share, logits, dq, out, inner, rows, width, stride,
                     UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = row < rows
    elements = width * UNIT
    whole = mask[:, None] & (col < elements)
    a = weighted(q, None, row, mask, width, stride, UNIT, BLOCK)
    at = tl.load(group + row, mask=mask, other=0)
    count = tl.load(counts + at, mask=mask, other=0.0) - 1.0
    weight = tl.load(share + row, mask=mask, other=0.0)
    own = weight[:, None] * positives_mean(a, sums, at, count, whole, width, UNIT, BLOCK)
    others = positives_mean(weight[:, None] * a, taken, at, count, whole, width, UNIT, BLOCK)
    dense = (row * elements)[:, None] + col
    d = tl.load(dq + dense, mask=whole, other=0.0).to(tl.float32)
    # q has the part of both sides of S.
    along = 0.5 * dots(a, d, UNIT) - weight.to(tl.float64) * tl.load(logits + row, mask=mask, other=0.0)
    d -= tl.load(scale).to(tl.float32) * tl.where((count < 1.0)[:, None], 0.0, own + others)
    tl.store(out + dense, narrow(d, out.dtype.element_ty, PRECISION), mask=whole)
    tl.store(inner + row, along.to(tl.float32), mask=mask)


def class_sums(x, group, weight, classes):
    x, group = rows_of(x), group.contiguous()
    weight = None if weight is None else weight.contiguous()
    width = x.shape[1]
    sums, counts = floats(x, classes, width), floats(x, classes)
    with on(x):
        plan = _sums_plan(kinds(x, group, weight), classes, config.parts(x))
        parts = floats(x, plan.parts)
        sizes = [classes * width, classes, classes]
        table, *tallies = x.new_zeros(sum(sizes), dtype=torch.int64).split(sizes)
        plan.largest(x, weight, parts)
        plan.add(x, weight, group, parts, table, *tallies)
        plan.finish(table, *tallies, parts, sums, counts)
    return sums, counts


class SumsPlan(NamedTuple):
    """What :func:`class_sums` launches, and of how many programs the first leaves a number."""

    parts: int
    largest: Launch
    add: Launch
    finish: Launch


@planned
def _sums_plan(kinds: tuple, classes: int, parts: int) -> SumsPlan:
    _, (rows, width, stride), constants = over_whole_rows(kinds, 2, 1)
    *_, of_pairs = over_whole_rows(kinds, PAIR_TENSORS, 1)
    bits = INTEGER_BITS - rows.bit_length()
    pairs_grid, classes_grid = (cdiv(rows, 2 * of_pairs["ROWS"]), 1, 1), (cdiv(classes, constants["ROWS"]), 1, 1)
    return SumsPlan(
        parts,
        Launch(largest_kernel, (parts, 1, 1), (rows, width, stride), PARTS=parts, **constants),
        Launch(add_to_class_kernel, pairs_grid, (rows, width, stride, bits), PARTS=parts, **of_pairs),
        Launch(class_sums_kernel, classes_grid, (classes, width, bits), PARTS=parts, **constants),
    )


def class_odds(q, sums, counts, group, scale, row_lse):
    q = rows_of(q)
    sums, counts, group, row_lse = (x.contiguous() for x in (sums, counts, group, row_lse))
    rows = q.shape[0]
    loss, slope, logit = floats(q, rows), floats(q, rows), floats(q, rows)
    with on(q):
        tensors = q, sums, counts, group, scale, row_lse
        _odds_launch(kinds(*tensors))(*tensors, loss, slope, logit)
    return loss, slope, logit


@planned
def _odds_launch(kinds: tuple) -> Launch:
    grid, scalars, constants = over_whole_rows(kinds, 4, 1)
    return Launch(class_odds_kernel, grid, scalars, **constants)


def add_class_positives(q, sums, taken, counts, group, scale, share, logit, dq):
    q = rows_of(q)
    sums, taken, counts, group = (x.contiguous() for x in (sums, taken, counts, group))
    share, logit, dq = (x.contiguous() for x in (share, logit, dq))
    out, inner = dq.new_empty(dq.shape), floats(q, q.shape[0])
    with on(q):
        tensors = q, sums, taken, counts, group, scale, share, logit, dq
        _add_launch(kinds(*tensors))(*tensors, out, inner)
    return out, inner


@planned
def _add_launch(kinds: tuple) -> Launch:
    grid, scalars, constants = over_whole_rows(kinds, 8, 1)
    return Launch(add_class_kernel, grid, scalars, PRECISION=rounding(kinds[0]), **constants)

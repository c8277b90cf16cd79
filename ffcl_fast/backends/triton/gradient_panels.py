"""Gradients through panels of G: a kernel writes a panel, the library's matrix product reads it for dq and for dk.

A panel of 16-bit numbers is 128 MiB. It does not stay in the L2 cache between its one write and its two reads, and need
not: a product does D operations on each byte of it, and a Hopper chip 190 on each that its memory moves. Panels that
fit (4096 a side) are so little work that the GPU waits for the host to launch the next one. Sums over panels are
float32 and run in a fixed order. Workspace: one panel, the float32 gradient of one panel's rows and, for
16-bit inputs, the float32 dk (or dq where k = q); nothing grows with N x M.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..mixed_products import add_product
from . import config
from .config import cdiv
from .launch import Launch, kinds, planned
from .tiles import narrow

COMBINE_BLOCK = 1024


@triton.jit
def combined_factor(scale, frame, GAIN: tl.constexpr, FRAME: tl.constexpr):
    """What float32 sums of G x are multiplied by: the scale, times what the weights were divided by."""
    factor = tl.load(scale).to(tl.float32) / GAIN
    if FRAME:
        factor *= tl.load(frame + 2)
    return factor


# How it works: adds the slices of `sums` in order, scales and rounds. In place where sums is out. A second pair of
# tensors, `more` into `more_out`, is the grid's second row: one launch where there would be two.
# Bound by memory: reads (slices, size) float32 once, writes size elements.
@triton.jit
def combine_kernel(sums, out, more, more_out, scale, frame, size, more_size, SLICES: tl.constexpr, GAIN: tl.constexpr,
                   FRAME: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    factor = combined_factor(scale, frame, GAIN, FRAME)
    if tl.program_id(1) == 0:
        combine_block(sums, out, factor, size, SLICES, BLOCK, PRECISION)
    elif more is not None:
        combine_block(more, more_out, factor, more_size, SLICES, BLOCK, PRECISION)


@triton.jit
def combine_block(sums, out, factor, size, SLICES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.load(sums + index, mask=mask, other=0.0)
    for i in range(1, SLICES):
        total += tl.load(sums + tl.cast(size, tl.int64) * i + index, mask=mask, other=0.0)
    tl.store(out + index, narrow(total * factor, out.dtype.element_ty, PRECISION), mask=mask)


def combine_constants(slices: int, gain: float, framed: bool, how: str) -> dict:
    """Compile-time constants of combine_kernel."""
    return {
        "SLICES": slices,
        "GAIN": gain,
        "FRAME": framed,
        "BLOCK": COMBINE_BLOCK,
        "PRECISION": how,
    }


def combine(
    pairs: Sequence[tuple[Tensor, Tensor]], scale: Tensor, frame: Tensor | None, gain: float, how: str
) -> None:
    """out = (sum of sums' slices) x scale x weight unit / gain for one or two pairs (sums, out), alike but for their
    rows; sums is out or has shape (slices, *out.shape)."""
    (sums, out), (more, more_out) = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
    sizes = sums.numel(), out.numel(), 0 if more is None else more_out.numel()
    # The tensors of the pairs were just allocated, or are panels of such ones: whole multiples of 16 bytes further on.
    _combine_launch(kinds(scale), out.dtype, sizes, frame is not None, gain, how)(
        sums, out, more, more_out, scale, frame
    )


@planned
def _combine_launch(kinds: tuple, dtype: torch.dtype, sizes: tuple, framed: bool, gain: float, how: str) -> Launch:
    sums, out, more = sizes
    return Launch(
        combine_kernel,
        (cdiv(max(out, more), COMBINE_BLOCK), 2 if more else 1, 1),
        (out, more),
        **combine_constants(sums // max(1, out), gain, framed, how),
    )


def walk(
    q: Tensor,
    k: Tensor | None,
    fill: Callable[[Tensor, int, int, int, int], None],
    scale: Tensor,
    frame: Tensor | None,
    gain: float,
    how: str,
    need_q: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor]:
    """(dq, dk) of G panel by panel; ``fill(panel, r0, r1, c0, c1)`` writes G[r0:r1, c0:c1] to the panel's corner.

    k = None stands for k = q with a symmetric G: only panels on or above the diagonal are filled, each used for both
    of its sides.
    """
    rows, width = q.shape
    other = q if k is None else k
    cols = other.shape[0]
    side = config.panel_side(q)
    panel = q.new_empty(min(side, rows), min(side, cdiv(cols, 16) * 16))
    dq = q.new_empty(rows if need_q else 0, width)
    dk = q.new_empty(cols if need_k else 0, width)
    exact = q.dtype == torch.float32
    if not (need_q or need_k) or 0 in (rows, cols):
        return dq.zero_(), dk.zero_()

    def sums(of: Tensor, n: int) -> Tensor:
        return of if exact else q.new_empty(n, width, dtype=torch.float32)

    whole = sums(dq if k is None else dk, dq.shape[0] if k is None else dk.shape[0])
    part = sums(dq, min(side, rows) if need_q else 0) if k is not None else whole
    for r0 in range(0, rows, side):
        r1 = min(rows, r0 + side)
        row_sums = between(part, r0, r1) if exact or k is None else between(part, 0, r1 - r0)
        for c0 in range(r0 if k is None else 0, cols, side):
            c1 = min(cols, c0 + side)
            fill(panel, r0, r1, c0, c1)
            g = between(panel, 0, r1 - r0)
            g = g if g.shape[1] == c1 - c0 else g[:, : c1 - c0]
            if need_q:
                # With k = q, row 0's panels were the first to write to every row.
                add_product(row_sums, g, between(other, c0, c1), c0 == 0)
            if (need_k or (k is None and need_q)) and not (k is None and c0 == r0):
                add_product(between(whole, c0, c1), g.T, between(q, r0, r1), r0 == 0)
        pairs = [(row_sums, between(dq, r0, r1))] if need_q and k is not None else []
        if r1 == rows:
            pairs += [(whole, dq)] if k is None else [(whole, dk)] if need_k else []
        if pairs:
            combine(pairs, scale, frame, gain, how)
    return dq, dk


def between(x: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin..end-1 of x; x itself for all of them, which a slice would not be."""
    return x if end - begin == x.shape[0] else x[begin:end]

"""How a sample's row is cut over a chip, and the device functions that the goodness kernels share.

A row short enough stays in its program's registers and is read once. A longer one is walked twice by one program
where there are rows enough to fill the chip and those in flight stay in the L2 cache, and else cut over many programs,
in two launches with partial sums between them. No atomics: every sum has one fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import cdiv, next_power_of_2
from .launch import Launch, kinds, planned, processors
from .tiles import narrow

TILE = 4096  # elements a program holds at a time, where rows are short: 32 a thread
LONGEST = 16384  # elements of the longest row (or pair) that stays in registers: 32 a thread with 16 warps
LOOP_BYTES = 128 << 10  # rows walked twice by one program: 132 multiprocessors times this is 17 MB of a 50 MB L2
MAX_PARTS = 512  # programs a row


@dataclass(frozen=True)
class Cut:
    """Rows and columns of a program's tile, the warps for it, and the programs that share a row."""

    rows: int
    block: int
    warps: int
    loop: bool  # the tile is shorter than a row
    parts: int = 1  # programs a row; more than one: two launches
    steps: int = 1  # blocks a program

    def __str__(self) -> str:
        return f"{self.rows}x{self.block} w{self.warps}{' loop' if self.loop else ''}"

    @property
    def constants(self) -> dict:
        return {"ROWS": self.rows, "BLOCK": self.block, "LOOP": self.loop}

    @property
    def part_constants(self) -> dict:
        return {"BLOCK": self.block, "PARTS": next_power_of_2(self.parts)}

    @property
    def options(self) -> dict:
        return {"num_warps": self.warps}


def warps_for(elements: int, chip: str) -> int:
    """Warps that give each thread at most 32 of `elements`, between 1 and 16 (AMD: 8, of 64 threads)."""
    lanes, most = (64, 8) if chip == "gfx942" else (32, 16)
    return max(1, min(most, elements // (32 * lanes)))


def cut(rows: int, width: int, tensors: int, chip: str, item: int, chip_processors: int) -> Cut:
    """The cut of `rows` rows of `width` elements of `item` bytes in each of `tensors` tensors."""
    longest = (1024 if chip == "interpret" else LONGEST) // tensors
    block = min(next_power_of_2(width), longest)
    if width <= longest:
        tile = (512 if chip == "interpret" else TILE) // tensors
        side = max(1, min(tile // block, next_power_of_2(rows)))
        return Cut(side, block, warps_for(side * block * tensors, chip), False)
    block = longest // 2  # a walk needs no more registers than keep loads in flight
    warps = warps_for(block * tensors, chip)
    if rows >= 2 * chip_processors and width * item * tensors <= LOOP_BYTES:
        return Cut(1, block, warps, True)
    steps = cdiv(cdiv(width, block), MAX_PARTS)
    return Cut(1, block, warps, True, cdiv(width, block * steps), steps)


def cut_of(kinds: tuple, tensors: int) -> Cut:
    """The cut for `tensors` tensors like the first of `kinds`, (N, D)."""
    device, (dtype, shape, *_), *_ = kinds
    return cut(*shape, tensors, config.family(device), dtype.itemsize, processors(device))


def vector_unit(dtype: torch.dtype, *sizes: int) -> int:
    """Elements a thread may load at once: the largest power of two up to 16 bytes that divides all `sizes`, a row's
    width and the row strides.

    Kernels get sizes in this unit, so that the compiler knows what divides them whatever the size.
    """
    return math.gcd(16 // dtype.itemsize, *sizes)


def rounding(device: torch.device) -> str:
    """How results are rounded to 16 bit: by the hardware, or as the interpreter needs it."""
    return "interpret" if device.type == "cpu" else "hardware"


def optional(x: Tensor | None) -> Tensor | None:
    """x, None for an empty tensor: a kernel drops what is None at compile time."""
    return x if x is not None and x.numel() else None


@triton.jit
def activation(pointers, mask, RELU: tl.constexpr):
    """The activation behind `pointers` in float32, zeros where masked; `h <= 0` is false for a NaN, which stays."""
    h = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        h = tl.where(h <= 0, 0.0, h)
    return h


@triton.jit
def store_gradient(pointers, grad, h, mask, RELU: tl.constexpr, PRECISION: tl.constexpr):
    """Store the gradient of activation h, nothing through ReLU's zeros. There h <= 0 holds where it did before ReLU."""
    if RELU:
        grad = tl.where(h <= 0, 0.0, grad)
    tl.store(pointers, narrow(grad, pointers.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def part_sum(partials, row, parts, PARTS: tl.constexpr):
    """The sum of row's partial sums, partials (rows, parts), in one order."""
    slot = tl.arange(0, PARTS)
    return tl.sum(tl.load(partials + row * parts + slot, mask=slot < parts, other=0.0), 0)


# How it works: each program adds the partial sums of ROWS rows, SLOTS at a time, and scales the result.
# Bound by latency: a few floats a row. Either dimension of the partial sums may be the dense one.
@triton.jit(do_not_specialize=["rows", "slots"])
def add_parts_kernel(partials, out, rows, slots, row_stride, slot_stride, factor, ROWS: tl.constexpr,
                     SLOTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS).to(tl.int64)
    kept = (row < rows)[:, None]
    total = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
    for first in range(0, slots, SLOTS):
        at = first + slot
        total += tl.load(partials + row[:, None] * row_stride + at[None, :] * slot_stride,
                         mask=kept & (at < slots)[None, :], other=0.0)
    tl.store(out + row, tl.sum(total, 1) * factor, mask=row < rows)


def add_parts(partials: Tensor, out: Tensor, factor: float) -> None:
    """out (rows,) = factor times the sum over slots of partials (rows, slots), float32, any strides."""
    _add_parts_launch(kinds(partials, out), factor)(partials, out)


@planned
def _add_parts_launch(kinds: tuple, factor: float) -> Launch:
    _, (rows, slots), strides, _ = kinds[1]
    width = min(64, next_power_of_2(slots))
    side = 1024 // width
    scalars = rows, slots, *strides, factor
    return Launch(
        add_parts_kernel, (cdiv(rows, side), 1, 1), scalars, ROWS=side, SLOTS=width, num_warps=4
    )


def floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)

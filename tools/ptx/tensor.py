"""Matrix instructions: wgmma with its descriptors, mma.sync, and how ldmatrix and stmatrix lay out fragments.

PTX ISA: Warp Level Matrix Multiply-Accumulate Instructions; Asynchronous Warpgroup Level Matrix Multiply-Accumulate
Instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .formats import decoded
from .machine import WARP, Block, operation
from .memory import Fault, swizzled
from .program import Instruction, Operand, Register

WARPGROUP = 128
UNFINISHED = np.uint32(0x7FC0DEAD)  # what a register holds that a product still writes: a NaN
_SHAPE = re.compile(r"m(?P<m>\d+)n(?P<n>\d+)k(?P<k>\d+)")


def _checked(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    if not mask.all():
        raise NotImplementedError(f"PTX instruction {instruction.text} in part of a block")


def _shape(instruction: Instruction) -> tuple[int, int, str]:
    """(n, k, kind of the operands)."""
    shape, *types = (part for part in instruction.parts if part in ("bf16", "f16", "f32") or _SHAPE.fullmatch(part))
    found = _SHAPE.fullmatch(shape)
    if types[:3] not in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]) or found["k"] != "16":
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    return int(found["n"]), int(found["k"]), types[1]


def _spread(registers: list[np.ndarray], rows: int) -> np.ndarray:
    """(warps, rows, columns) 16-bit patterns. A register of a warp has 8 x 8 of them, a row in each 4 lanes; the next
    registers have the rows below, and then further columns."""
    halves = [r.reshape(-1, 8, 4).view(np.uint16).reshape(-1, 8, 8) for r in registers]
    down = rows // 8
    return np.concatenate([np.concatenate(halves[i : i + down], 1) for i in range(0, len(halves), down)], 2)


def _accumulator(n: int, lane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row of 16, column of n), each (registers, lanes), that a lane's registers have of a product."""
    i = np.arange(n // 2)[:, None]
    return lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


@operation("ldmatrix.sync.aligned.m8n8", "x1 x2 x4 trans shared shared::cta")
def _load_matrices(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Lanes 8 i to 8 i + 7 have the addresses of matrix i's rows."""
    _checked(block, instruction, mask)
    registers, source = instruction.operands
    for i, register in enumerate(registers):
        rows = block.shared.read(_rows(block, source, i), 16).view(np.uint16).reshape(-1, 8, 8)
        rows = rows.transpose(0, 2, 1) if "trans" in instruction.parts else rows
        block.put(register, np.ascontiguousarray(rows).reshape(-1, 2).view(np.uint32)[:, 0], mask)


@operation("stmatrix.sync.aligned.m8n8", "x1 x2 x4 trans shared shared::cta")
def _store_matrices(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _checked(block, instruction, mask)
    target, registers = instruction.operands
    for i, register in enumerate(registers):
        rows = _spread([block.get(register, "b32")], 8)
        rows = rows.transpose(0, 2, 1) if "trans" in instruction.parts else rows
        block.shared.write(_rows(block, target, i), np.ascontiguousarray(rows).reshape(-1, 8).view(np.uint8))


def _rows(block: Block, operand: Operand, i: int) -> np.ndarray:
    """Addresses of the rows of every warp's matrix i."""
    found = block.address(operand).reshape(-1, WARP)[:, 8 * i : 8 * i + 8].ravel()
    if (found % 16).any():
        raise Fault("a row of a matrix lies at no multiple of 16")
    return found


@operation("mma.sync.aligned.m16n8k16.row.col")
def _multiply_in_warps(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _checked(block, instruction, mask)
    _, _, kind = _shape(instruction)
    results, a, b, c = instruction.operands
    a = decoded(_spread([block.get(x, "b32") for x in a], 16), kind).astype(np.float64)
    b = decoded(_spread([block.get(x, "b32") for x in b], 8), kind).astype(np.float64)
    product = a @ b.transpose(0, 2, 1)
    rows, cols = _accumulator(8, block.lane)
    sums = [block.get(x, "f32") + product[block.thread // WARP, rows[i], cols[i]] for i, x in enumerate(c)]
    for register, total in zip(results, sums, strict=True):
        block.put(register, total.astype(np.float32), mask)


@dataclass
class _Operand:
    """Where a descriptor says that a warpgroup's operand lies (PTX ISA: Matrix Descriptor Format)."""

    places: np.ndarray  # (m or n, k, 2) of the bytes
    bytes: np.ndarray  # what was there when the product began

    def check(self, block: Block) -> None:
        if (block.shared.bytes[self.places] != self.bytes).any():
            raise Fault("shared memory was written that a product still read")


def _operand(block: Block, descriptor: int, extent: int, k: int, transposed: bool) -> _Operand:
    """(extent, k) numbers, k innermost in memory unless transposed."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if span is None or descriptor >> 49 & 7:
        raise NotImplementedError(f"a matrix descriptor without a swizzle or with a base offset: {descriptor:#x}")
    row, col = np.arange(extent)[:, None], np.arange(k)[None]
    if transposed:
        across = span // 2
        at = row // across * leading + col // 8 * stride + col % 8 * span + row % across * 2
    else:
        at = row // 8 * stride + row % 8 * span + col * 2
    places = swizzled(start + at, span)[..., None] + np.arange(2)
    block.shared.check(places)
    return _Operand(places, block.shared.bytes[places])


@dataclass
class _Product:
    """A wgmma under way. One operand of each list for a warpgroup."""

    registers: tuple[Register, ...]
    a: list[np.ndarray]  # (64, k) float64
    b: list[np.ndarray]  # (n, k) float64
    shared: list[_Operand]  # those of the operands that lie in shared memory
    adds: np.ndarray


@operation("wgmma.mma_async.sync.aligned", " ".join(f"m64n{n}k16" for n in range(8, 257, 8)))
def _multiply(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Begins: operands are read now, and must be the same at the end; sums are made at the end."""
    _checked(block, instruction, mask)
    n, k, kind = _shape(instruction)
    registers, a, b, adds, *flags = instruction.operands
    flags = [int(flag.text) for flag in flags]
    if flags[:2] != [1, 1]:
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    flags = flags[2:] if len(flags) == 4 else [0, flags[2]]  # whether a and b are transposed
    shared: list[_Operand] = []

    def numbers(operand: Register, extent: int, transposed: int) -> list[np.ndarray]:
        descriptors = block.get(operand, "u64").reshape(-1, WARPGROUP)
        if (descriptors != descriptors[:, :1]).any():
            raise Fault("a descriptor differs within a warpgroup")
        found = [_operand(block, int(d), extent, k, bool(transposed)) for d in descriptors[:, 0]]
        shared.extend(found)
        return [decoded(x.bytes.view(np.uint16)[..., 0], kind).astype(np.float64) for x in found]

    if isinstance(a, tuple):
        if any(x in block.products for x in a):
            raise Fault("an operand is what a product still writes")
        left = decoded(_spread([block.get(x, "b32") for x in a], 16), kind).astype(np.float64)
        left = list(left.reshape(-1, 64, k))
    else:
        left = numbers(a, 64, flags[0])
    product = _Product(registers, left, numbers(b, n, flags[1]), shared, block.get(adds, "pred"))
    unfinished = np.full(block.threads, UNFINISHED)
    for register in registers:
        if register not in block.products:
            block.products[register] = block.registers.get(register, unfinished)
        block.registers[register] = unfinished
    block.multiplications.add(product)


@operation("wgmma.fence.sync.aligned")
def _fence(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Orders what threads wrote to registers before products, which happens in order here."""


@operation("wgmma.commit_group.sync.aligned")
def _commit(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _checked(block, instruction, mask)
    block.multiplications.commit()


@operation("wgmma.wait_group.sync.aligned")
def _wait(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _checked(block, instruction, mask)
    block.multiplications.wait(int(instruction.operands[0].text), lambda product: _add(block, product))
    busy = {register for product in block.multiplications.jobs for register in product.registers}
    for register in [x for x in block.products if x not in busy]:
        block.registers[register] = block.products.pop(register)


def _add(block: Block, product: _Product) -> None:
    """The end of a wgmma."""
    for operand in product.shared:
        operand.check(block)
    sums = np.concatenate([a @ b.T for a, b in zip(product.a, product.b, strict=True)])  # (64 warpgroups, n)
    rows, cols = _accumulator(sums.shape[1], block.lane)
    before = np.stack([block.products[x] for x in product.registers]).view(np.float32)
    after = np.where(product.adds, before, np.float32(0)) + sums[16 * (block.thread // WARP) + rows, cols]
    block.products.update(zip(product.registers, after.astype(np.float32).view(np.uint32), strict=True))

"""Arithmetic on numbers and bits, by the sections of the PTX ISA's Instructions. Approximate functions are rounded
correctly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import HALVES, flushed, get, put
from .machine import UNSIGNED, Block, operation
from .program import Instruction


def _elementwise(names: str, modifiers: str, count: int, function: Callable) -> None:
    """Register `function(instruction, *count operands)`, whose result has their type."""

    @operation(names, modifiers)
    def run(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
        if instruction.type in HALVES:
            raise NotImplementedError(f"PTX instruction {instruction.text}")
        operands = [get(block, instruction, 1 + i) for i in range(count)]
        put(block, instruction, function(instruction, *operands), mask)


def _product(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if "hi" not in instruction.parts and "wide" not in instruction.parts:
        return x * y
    if x.itemsize > 4:
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
    whole = x.astype(wide) * y.astype(wide)
    return (whole >> (8 * x.itemsize)).astype(x.dtype) if "hi" in instruction.parts else whole


def _quotient(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        return x / y
    divisor = np.where(y == 0, y.dtype.type(1), y)  # PTX leaves open what a division by zero gives
    return (x - np.fmod(x, divisor)) // divisor


def _remainder(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.fmod(x, np.where(y == 0, y.dtype.type(1), y))


def _extreme(with_nan: Callable, without: Callable) -> Callable:
    def run(instruction: Instruction, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (with_nan if "NaN" in instruction.parts or x.dtype.kind != "f" else without)(x, y)

    return run


def _shifted(instruction: Instruction, x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """A shift by more than the bits there are leaves zeros, or signs."""
    last = 8 * x.itemsize - 1
    by = np.minimum(amount, last).astype(x.dtype)
    if instruction.parts[0] == "shl":
        return np.where(amount > last, x.dtype.type(0), x << by)
    return np.where((amount > last) & (x.dtype.kind == "u"), x.dtype.type(0), x >> by)


def _exp2(instruction: Instruction, x: np.ndarray) -> np.ndarray:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def _reciprocal(instruction: Instruction, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.float32:
        return np.float32(1) / x
    return (((1 / x).view(np.uint64) >> 32) << 32).view(np.float64)  # only the upper half is computed


_elementwise("add", "rn ftz", 2, lambda _, x, y: x + y)
_elementwise("sub", "rn ftz", 2, lambda _, x, y: x - y)
_elementwise("mul", "rn ftz lo hi wide", 2, _product)
_elementwise("div", "rn full approx ftz", 2, _quotient)
_elementwise("rem", "", 2, _remainder)
_elementwise("min", "NaN ftz", 2, _extreme(np.minimum, np.fmin))
_elementwise("max", "NaN ftz", 2, _extreme(np.maximum, np.fmax))
_elementwise("and", "", 2, lambda _, x, y: x & y)
_elementwise("or", "", 2, lambda _, x, y: x | y)
_elementwise("xor", "", 2, lambda _, x, y: x ^ y)
_elementwise("not", "", 1, lambda _, x: ~x)
_elementwise("neg", "ftz", 1, lambda _, x: -x)
_elementwise("ex2", "approx ftz", 1, _exp2)
_elementwise("lg2", "approx ftz", 1, lambda _, x: np.log2(x))
_elementwise("rcp", "approx rn ftz", 1, _reciprocal)
_elementwise("sqrt", "approx rn ftz", 1, lambda _, x: np.sqrt(x))
_elementwise("rsqrt", "approx ftz", 1, lambda _, x: (1 / np.sqrt(x)).astype(x.dtype))


@operation("abs", "ftz")
def _abs(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    x = get(block, instruction, 1)
    halves = {"bf16": 0x7FFF, "f16": 0x7FFF, "bf16x2": 0x7FFF7FFF, "f16x2": 0x7FFF7FFF}.get(instruction.type)
    bits = x.view(UNSIGNED[8 * x.itemsize])
    put(block, instruction, bits & bits.dtype.type(halves) if halves else np.abs(x), mask)


@operation("shl shr")
def _shift(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    amount = block.get(instruction.operands[2], "u32")
    put(block, instruction, _shifted(instruction, get(block, instruction, 1), amount), mask)


@operation("bfe")
def _bit_field(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _, x, *field = instruction.operands
    x, (start, length) = block.get(x, instruction.type), (int(o.text) for o in field)
    spare = 8 * x.itemsize - length
    if start + length > 8 * x.itemsize:
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    put(block, instruction, (x << x.dtype.type(spare - start)) >> x.dtype.type(spare), mask)


@operation("prmt")
def _permute(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    a, b, selectors = (block.get(o, "u32").astype(np.uint64) for o in instruction.operands[1:])
    both, result = a | b << np.uint64(32), np.zeros(block.threads, np.uint64)
    if (selectors & 0x8888).any():
        raise NotImplementedError(f"PTX instruction {instruction.text}")  # spreads a byte's sign
    for i in range(4):
        byte = both >> ((selectors >> (4 * i) & 7) << 3) & 0xFF
        result |= byte << (8 * i)
    block.put(instruction.operands[0], result.astype(np.uint32), mask)


@operation("fma mad", "rn ftz lo wide")
def _multiply_add(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    x, y = get(block, instruction, 1), get(block, instruction, 2)
    kind = instruction.type
    if kind in HALVES:
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    product = _product(instruction, x, y)
    if "wide" in instruction.parts:
        kind = f"{kind[0]}{2 * int(kind[1:])}"
    z = flushed(block.get(instruction.operands[3], kind), instruction)
    if kind == "f32":  # the product is exact; the sum is rounded a second time, which matters to one in 2 ** 29
        result = (x.astype(np.float64) * y.astype(np.float64) + z).astype(np.float32)
    else:
        result = _fused(x, y, z) if kind == "f64" else product + z
    put(block, instruction, result, mask)


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float64, rounded once where no sum is exactly between two numbers (Dekker; Knuth)."""
    product = x * y
    parts = []
    for factor in (x, y):
        scaled = factor * (2.0**27 + 1)
        high = scaled - (scaled - factor)
        parts.append((high, factor - high))
    (a, b), (c, d) = parts
    lost = b * d - (((product - a * c) - b * c) - a * d)
    total = product + z
    other = total - product
    fused = total + (lost + ((product - (total - other)) + (z - other)))
    return np.where(np.isfinite(fused), fused, total)

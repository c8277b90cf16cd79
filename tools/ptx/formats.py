"""Numbers in registers: 16-bit formats, conversions, comparisons, moves, and what threads of a warp tell each other."""

from __future__ import annotations

import numpy as np

from .machine import DTYPES, UNSIGNED, WARP, Block, operation
from .program import Instruction

_TINY = np.finfo(np.float32).tiny
HALVES = {"bf16": "bf16", "f16": "f16", "bf16x2": "bf16", "f16x2": "f16"}
_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 of 16-bit patterns, kind "bf16" or "f16"."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def encoded(x: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of float32, rounded to nearest even."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def flushed(x: np.ndarray, instruction: Instruction) -> np.ndarray:
    if x.dtype == np.float32 and "ftz" in instruction.parts:
        return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)
    return x


def get(block: Block, instruction: Instruction, i: int) -> np.ndarray:
    return flushed(block.get(instruction.operands[i], instruction.type), instruction)


def put(block: Block, instruction: Instruction, value: np.ndarray, mask: np.ndarray) -> None:
    block.put(instruction.operands[0], flushed(value, instruction), mask)


@operation("cvt", "rn rni rzi rmi rpi ftz")
def _convert(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    to, source = instruction.parts[-2:]
    operands = [flushed(block.get(o, source), instruction) for o in instruction.operands[1:]]
    if source in HALVES:
        operands, source = [decoded(x.view(np.uint16), source) for x in operands], "f32"
    x = operands[0]
    if to in HALVES:
        if source != "f32":
            raise NotImplementedError(f"PTX instruction {instruction.text}")
        bits = [encoded(x, HALVES[to]) for x in operands]
        result = bits[0] if len(bits) == 1 else bits[0].astype(np.uint32) << 16 | bits[1]
    elif x.dtype.kind == "f":
        how = next((_ROUND[part] for part in instruction.parts if part in _ROUND), None)
        whole = how(x) if how else x
        result = whole.astype(DTYPES[to]) if to[0] == "f" else _to_integer(whole, DTYPES[to])
    else:
        result = x.astype(DTYPES[to])
    put(block, instruction, result, mask)


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Beyond the range its ends; of a NaN 0, or the highest bit where either has 64 bits (PTX ISA: cvt)."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    result = np.where((x > float(low)) & (x < float(high)), x, 0).astype(dtype)
    result[x >= float(high)], result[x <= float(low)] = high, low
    if x.itemsize == 8 or dtype.itemsize == 8:
        result[np.isnan(x)] = low if dtype.kind == "i" else high // 2 + 1
    return result


@operation("setp", "ftz num nan lt le gt ge eq ne lo ls hi hs ltu leu gtu geu equ neu")
def _compare(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Of packed types each half has a predicate of its own; of others the second is what the first is not (PTX ISA:
    Comparison and Selection Instructions: setp)."""
    _, how, *_, kind = instruction.parts
    results = instruction.operands[0] if isinstance(instruction.operands[0], tuple) else instruction.operands[:1]
    x, y = (get(block, instruction, i) for i in (1, 2))
    if kind.endswith("x2"):
        found = [_holds(how, *(decoded((v >> s).astype(np.uint16), kind[:-2]) for v in (x, y))) for s in (0, 16)]
    else:
        if kind in HALVES:
            x, y = (decoded(v, kind) for v in (x, y))
        found = [_holds(how, x, y)]
        found.append(~found[0])
    for result, value in zip(results, found, strict=False):
        block.put(result, value, mask)


def _holds(how: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    nan = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if how in ("num", "nan"):
        return nan if how == "nan" else ~nan
    holds = _COMPARE[how[:2]](x, y)
    return holds | nan if how.endswith("u") else holds & ~nan


@operation("selp")
def _select(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    which = block.get(instruction.operands[3], "pred")
    put(block, instruction, np.where(which, get(block, instruction, 1), get(block, instruction, 2)), mask)


@operation("cvta.param")
def _to_generic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    put(block, instruction, get(block, instruction, 1), mask)


@operation("mov")
def _move(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Also packs {a, b}, lowest first, and unpacks (PTX ISA: Data Movement: mov)."""
    (to, source), kind = instruction.operands, instruction.type
    if isinstance(source, tuple):
        bits = int(kind[1:]) // len(source)
        value = np.stack([block.get(x, f"b{bits}") for x in source], 1).view(DTYPES[f"b{kind[1:]}"])[:, 0]
    else:
        value = block.get(source, kind)
    if not isinstance(to, tuple):
        return block.put(to, value, mask)
    parts = np.ascontiguousarray(value)[:, None].view(UNSIGNED[8 * value.itemsize // len(to)])
    for register, part in zip(to, parts.T, strict=True):
        block.put(register, np.ascontiguousarray(part), mask)


@operation("shfl.sync", "bfly idx")
def _shuffle(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    to, x, source, clamp, members = instruction.operands
    if clamp.text != "31" or members.text != "-1":
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    block.whole_warps(mask)
    source = block.get(source, "u32").astype(np.int64) & (WARP - 1)
    lane = block.lane ^ source if "bfly" in instruction.parts else source
    to = to[0] if isinstance(to, tuple) else to
    block.put(to, block.get(x, "b32")[block.thread - block.lane + lane], mask)


@operation("redux.sync", "add min max and or xor")
def _reduce(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    how = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    how["xor"] = np.bitwise_xor
    x = get(block, instruction, 1)
    block.whole_warps(mask)
    if (block.get(instruction.operands[2], "u32")[mask] != 0xFFFFFFFF).any():
        raise NotImplementedError(f"PTX instruction {instruction.text}")
    reduced = how[instruction.parts[2]].reduce(x.reshape(-1, WARP), axis=1, dtype=x.dtype)
    block.put(instruction.operands[0], np.repeat(reduced, WARP), mask)


@operation("elect.sync")
def _elect(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    block.whole_warps(mask)
    leader, elected = instruction.operands[0]
    block.put(leader, np.zeros(block.threads, np.uint32), mask)
    block.put(elected, block.lane == 0, mask)


@operation("bar.warp.sync fence.proxy.async membar", "shared::cta cta gl sys")
def _order(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Everything happens in order here already."""

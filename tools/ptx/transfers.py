"""Instructions that move data: loads, stores, atomics, cp.async, mbarriers and the bulk copies of boxes (TMA), by the
sections of the PTX ISA's Data Movement and Conversion Instructions."""

from __future__ import annotations

import numpy as np

from .machine import DTYPES, PARAMETERS, Block, operation
from .memory import Barrier, Fault, GlobalMemory, SharedMemory
from .program import Address, Instruction

_ATOMICS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}


@operation("ld.param")
def _load_parameter(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """The compiler may choose between the addresses of parameters."""
    register, source = instruction.operands
    dtype = DTYPES[instruction.type]
    places = (block.address(source) - PARAMETERS)[:, None] + np.arange(dtype.itemsize)
    block.put(register, block.parameters[places].view(dtype)[:, 0], mask)


def _reached(block: Block, instruction: Instruction) -> tuple[GlobalMemory | SharedMemory, np.dtype]:
    """Which memory an instruction reaches, and what each of the numbers is that it moves."""
    return block.memory if instruction.parts[1] == "global" else block.shared, DTYPES[instruction.type]


def _listed(operand: object) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _addresses(block: Block, operand: Address, size: int, mask: np.ndarray) -> np.ndarray:
    """Of the threads in the mask, int64."""
    found = block.address(operand)[mask]
    if (found % size).any():
        raise Fault(f"{found[found % size != 0][0]:#x} is no multiple of {size}")
    return found


@operation("ld.global ld.shared ld.shared::cta", "v2 v4 v8 L1::evict_first L1::evict_last")
def _load(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    registers = _listed(instruction.operands[0])
    memory, dtype = _reached(block, instruction)
    size = dtype.itemsize * len(registers)
    data = memory.read(_addresses(block, instruction.operands[1], size, mask), size).view(dtype)
    for register, values in zip(registers, data.T, strict=True):
        value = np.zeros(block.threads, dtype)
        value[mask] = values
        block.put(register, value, mask)


@operation("st.global st.shared st.shared::cta", "v2 v4 v8 L1::evict_first L1::evict_last")
def _store(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    registers = _listed(instruction.operands[1])
    memory, dtype = _reached(block, instruction)
    values = np.stack([block.get(x, instruction.type)[mask] for x in registers], 1)
    addresses = _addresses(block, instruction.operands[0], dtype.itemsize * len(registers), mask)
    memory.write(addresses, values.view(np.uint8))


@operation("atom.global", "gpu sys cta relaxed acq_rel acquire release add min max and or exch")
def _atomic(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Threads of the same address one after the other."""
    register, where, value = instruction.operands
    dtype = DTYPES[instruction.type]
    how = _ATOMICS.get(instruction.parts[-2], lambda old, new: new)
    addresses, operand = _addresses(block, where, dtype.itemsize, mask), block.get(value, instruction.type)[mask]
    before = np.zeros(len(addresses), dtype)
    left = np.arange(len(addresses))
    while left.size:
        _, first = np.unique(addresses[left], return_index=True)
        now = left[first]
        before[now] = block.memory.read(addresses[now], dtype.itemsize).view(dtype)[:, 0]
        block.memory.write(addresses[now], how(before[now], operand[now])[:, None].view(np.uint8))
        left = np.delete(left, first)
    whole = np.zeros(block.threads, dtype)
    whole[mask] = before
    block.put(register, whole, mask)


@operation("cp.async.ca.shared.global cp.async.cg.shared.global")
def _copy(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """What lies past the source's own size becomes zeros, and is not read (PTX ISA: cp.async: src-size)."""
    to, source, size, *own = instruction.operands
    size = int(size.text, 0)
    own = block.get(own[0], "u32")[mask] if own else [size] * int(mask.sum())
    addresses = zip(_addresses(block, to, size, mask), _addresses(block, source, size, mask), own, strict=True)
    for target, address, length in addresses:
        data = np.zeros(size, np.uint8)
        if length:
            data[:length] = block.memory.read(np.array([address]), int(length))[0]
        block.shared.copy(target, data)


def _by_all(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """Threads have groups of their own; here they have them together."""
    if not mask.all():
        raise NotImplementedError(f"PTX instruction {instruction.text} in part of a block")


@operation("cp.async.commit_group")
def _commit_copies(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _by_all(block, instruction, mask)
    block.shared.copies.commit()


@operation("cp.async.wait_group")
def _wait_copies(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _by_all(block, instruction, mask)
    block.shared.wait_for_copies(int(instruction.operands[0].text))


@operation("mbarrier.init", "shared shared::cta")
def _begin_barrier(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    for address in set(_addresses(block, instruction.operands[0], 8, mask)):
        block.shared.barriers[address] = Barrier(int(instruction.operands[1].text))


@operation("mbarrier.inval", "shared shared::cta")
def _end_barrier(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    for address in set(_addresses(block, instruction.operands[0], 8, mask)):
        if any(load[0] == address for load in block.shared.loads):
            raise Fault("the mbarrier ends before its loads")
        block.shared.barrier(address)
        del block.shared.barriers[address]


@operation("mbarrier.arrive", "expect_tx shared shared::cta")
def _arrive(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _, where, *expected = instruction.operands
    for address in _addresses(block, where, 8, mask):
        barrier = block.shared.barrier(address)
        barrier.expected += int(expected[0].text) if expected else 0
        barrier.left -= 1
        barrier.settle()
    block.wake()


@operation("mbarrier.try_wait.parity", "shared shared::cta")
def _try_wait(block: Block, instruction: Instruction, mask: np.ndarray) -> bool:
    """Comes back only when the phase is over."""
    over, where, parity = instruction.operands
    waits = set(zip(_addresses(block, where, 8, mask), block.get(parity, "u32")[mask], strict=True))
    if not all(block.shared.wait(address, number) for address, number in waits):
        return True
    block.put(over, block.everyone, mask)


@operation(
    " ".join(f"cp.async.bulk.tensor.2d.shared::{to}.global.mbarrier::complete_tx::bytes" for to in ("cta", "cluster"))
)
def _load_box(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    """What lies outside the matrix becomes zeros."""
    to, source, barrier = instruction.operands
    for thread in np.nonzero(mask)[0]:
        matrix = block.tensor_map(block.get(source.base, "u64")[thread])
        col, row = (int(block.get(x, "s32")[thread]) for x in source.coordinates)
        places, sources, inside = matrix.places(row, col, int(block.address(to)[thread]))
        data = np.zeros(places.shape, np.uint8)
        data[inside] = matrix.bytes[sources[inside]]
        block.shared.load(int(block.address(barrier)[thread]), places.ravel(), data.ravel())
    block.wake()


@operation("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group")
def _store_box(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    to, source = instruction.operands
    for thread in np.nonzero(mask)[0]:
        matrix = block.tensor_map(block.get(to.base, "u64")[thread])
        col, row = (int(block.get(x, "s32")[thread]) for x in to.coordinates)
        places, targets, inside = matrix.places(row, col, int(block.address(source)[thread]))
        block.shared.check(places)
        places = places[inside]
        block.stores.add((places, matrix, targets[inside], block.shared.bytes[places]))


@operation("cp.async.bulk.commit_group")
def _commit_boxes(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _by_all(block, instruction, mask)
    block.stores.commit()


@operation("cp.async.bulk.wait_group", "read")
def _wait_boxes(block: Block, instruction: Instruction, mask: np.ndarray) -> None:
    _by_all(block, instruction, mask)
    block.finish_stores(int(instruction.operands[0].text))

"""A block of threads: registers, control flow, barriers. What instructions do is in the modules that register them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .memory import SHARED_BASE, Fault, GlobalMemory, Groups, SharedMemory, TensorMap
from .program import Address, Immediate, Instruction, Operand, Program, Register, Symbol

WARP = 32
PARAMETERS = 0x7E0000000000  # where parameters lie, each in its own PARAMETER_BYTES: no address of this process
PARAMETER_BYTES = 256
BARRIERS = "bar.sync", "barrier.sync"
UNSIGNED = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
DTYPES = {f"{kind}{8 * n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n}") for kind in "bus" for n in (1, 2, 4, 8)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
DTYPES |= {"bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4")}  # as bits

# What an operation gets: the block, the instruction, and which threads run it. It may return True: nobody got past it.
Operation = Callable[["Block", Instruction, np.ndarray], "bool | None"]
_operations: dict[str, tuple[Operation, frozenset[str]]] = {}


def operation(names: str, modifiers: str = "") -> Callable[[Operation], Operation]:
    """Register what runs instructions whose opcode is one of the names, followed by any of the modifiers and types."""

    def register(run: Operation) -> Operation:
        for name in names.split():
            _operations[name] = run, frozenset(modifiers.split())
        return run

    return register


def _look_up(instruction: Instruction) -> Operation:
    parts = instruction.parts
    for n in range(len(parts), 0, -1):
        run, modifiers = _operations.get(".".join(parts[:n]), (None, ()))
        if run is not None and all(part in modifiers or part in DTYPES for part in parts[n:]):
            return run
    raise NotImplementedError(f"PTX instruction {instruction.text}")


class Block:
    """One block of a grid, about to run. A mask is a bool of each thread.

    parameters: their bits; maps: of those which are tensor maps, by position.
    """

    def __init__(
        self,
        program: Program,
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: list[int],
        maps: dict[int, TensorMap],
        memory: GlobalMemory,
        shared_bytes: int,
    ):
        self.program, self.index, self.maps, self.memory = program, index, maps, memory
        image = b"".join((bits % (1 << 64)).to_bytes(PARAMETER_BYTES, "little") for bits in parameters)
        self.parameters = np.frombuffer(image, np.uint8)
        self.threads = program.threads
        self.shared = SharedMemory(shared_bytes)
        self.stores = Groups()  # of TMA
        self.thread = np.arange(self.threads)
        self.lane = self.thread % WARP
        self.everyone = np.ones(self.threads, bool)
        self.registers: dict[Register, np.ndarray] = {}
        self.products: dict[Register, np.ndarray] = {}  # what registers really hold that wgmma is writing
        self.multiplications = Groups()
        self._constants: dict[tuple[Operand, str], np.ndarray] = {}
        self._special = {"%tid.x": self.thread}
        for i, axis in enumerate("xyz"):
            self._special |= {f"%ctaid.{axis}": self.everyone * index[i], f"%nctaid.{axis}": self.everyone * grid[i]}
        # Threads by the instruction they are at: ready for it, at a barrier, or at a wait that is not over.
        self._ready: dict[int, np.ndarray] = {0: self.everyone}
        self._arrived: list[tuple[int, np.ndarray]] = []
        self._stalled: list[tuple[int, np.ndarray]] = []

    def get(self, operand: Operand, type: str) -> np.ndarray:
        """The operand in each thread, as numbers of a PTX type (bf16 and packed types as bits). Not to be changed."""
        dtype = DTYPES[type]
        if operand.__class__ is Register:
            value = self.registers.get(operand)
            if value is None:
                raise Fault(f"{operand.name} has never been written")
            if value.dtype.itemsize > dtype.itemsize:
                value = value.astype(UNSIGNED[8 * dtype.itemsize])
            if value.dtype.itemsize < dtype.itemsize:
                raise Fault(f"{operand.name} is narrower than {type}")
            return value.view(dtype)
        key = operand, type
        if key not in self._constants:
            self._constants[key] = self._constant(operand, dtype)
        return self._constants[key]

    def _constant(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        if dtype.kind == "b":
            return np.full(self.threads, int(operand.text) != 0)
        bits = 8 * dtype.itemsize
        if isinstance(operand, Immediate):
            # 0f and 0d begin the bits of a float32 or float64 (PTX ISA: Floating-Point Constants).
            kind = operand.text[:2].lower()
            number = int(operand.text[2:], 16) if kind in ("0f", "0d") else int(operand.text.rstrip("U"), 0)
            return np.full(self.threads, number & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)
        name = operand.name
        if name in self._special:
            whole = self._special[name]
        elif name in self.program.shared:
            whole = np.full(self.threads, SHARED_BASE)
        elif name in self.program.parameters:
            whole = np.full(self.threads, PARAMETERS + PARAMETER_BYTES * self.program.parameters[name])
        else:
            raise NotImplementedError(f"PTX: {name}")
        return whole.astype(UNSIGNED[bits]).view(dtype)

    def put(self, register: Operand, value: np.ndarray, mask: np.ndarray) -> None:
        """Write a value of each thread; one that is narrower than the register is extended by its sign."""
        if register.__class__ is not Register:
            if isinstance(register, Symbol) and register.name == "_":
                return
            raise NotImplementedError(f"PTX: a result for {register}")
        if register in self.products:
            raise Fault(f"{register.name} is written while a product that writes it runs")
        if register.bits > 1:
            size = register.bits // 8
            if value.dtype.itemsize < size:
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
            value = value.view(UNSIGNED[register.bits])
        if mask is not self.everyone and not mask.all():
            value = np.where(mask, value, self.registers[register] if register in self.registers else _blank(value))
        self.registers[register] = value

    def address(self, operand: Address) -> np.ndarray:
        """(threads,) int64."""
        base = operand.base
        wide = base.bits == 64 if isinstance(base, Register) else base.name in self.program.parameters
        return self.get(base, "u64" if wide else "u32").astype(np.int64) + operand.offset

    def tensor_map(self, address: int) -> TensorMap:
        position, offset = divmod(address - PARAMETERS, PARAMETER_BYTES)
        if offset or position not in self.maps:
            raise Fault(f"no tensor map at {address:#x}")
        return self.maps[position]

    def whole_warps(self, mask: np.ndarray) -> None:
        """A fault where only part of a warp runs what all of it must."""
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise Fault("part of a warp runs this")

    def finish_stores(self, left: int) -> None:
        """All but the last `left` groups: shared memory, as it was when they began, goes to the matrix."""

        def finish(job: tuple[np.ndarray, TensorMap, np.ndarray, np.ndarray]) -> None:
            places, matrix, targets, data = job
            if (self.shared.bytes[places] != data).any():
                raise Fault("shared memory was written that a store still read")
            matrix.bytes[targets] = data

        self.stores.wait(left, finish)

    def run(self) -> None:
        """Until every thread has returned. The threads that are furthest behind go first: they meet the others."""
        with np.errstate(all="ignore"):
            while self._ready or self._stalled or self._arrived:
                if self._ready:
                    at = min(self._ready)
                    self._explained(self.program.code[at], self._ready.pop(at), self._step, at)
                elif self._stalled:
                    at, threads = self._stalled[0]
                    self._explained(self.program.code[at], threads, _never_over)
                else:  # a barrier needs no number of arrivals: all that have not returned are at it
                    self._release(self._arrived, 1)
            self._explained(self.program.code[-1], self.everyone, self._finish)

    def _explained(self, instruction: Instruction, threads: np.ndarray, act: Callable, *arguments) -> None:
        try:
            act(*arguments, instruction, threads)
        except Fault as fault:
            which = np.nonzero(threads)[0]
            where = f"block {self.index} of {self.program.name}, threads {which[0]} to {which[-1]}"
            raise Fault(f"{fault}\n  {instruction.text}\n  {where}") from None

    def _step(self, at: int, instruction: Instruction, active: np.ndarray) -> None:
        mask = active
        if instruction.predicate is not None:
            holds = self.get(instruction.predicate, "pred")
            mask = active & (~holds if instruction.negated else holds)
            if not mask.any():
                return self._go(at + 1, active)
            if mask.all():
                mask = self.everyone
        kind = instruction.parts[0]
        if kind == "bra":
            self._go(instruction.target, mask)
        elif instruction.opcode in BARRIERS:
            if [operand.text for operand in instruction.operands] != ["0"]:
                raise NotImplementedError(f"PTX instruction {instruction.text}")
            self._arrived.append((at, mask))
        elif kind != "ret":
            if instruction.run is None:
                instruction.run = _look_up(instruction)
            if instruction.run(self, instruction, mask):
                self._stalled.append((at, mask))
            else:
                return self._go(at + 1, active)
        if mask is not active and (rest := active & ~mask).any():
            self._go(at + 1, rest)

    def wake(self) -> None:
        """Something has happened that a stalled thread may wait for."""
        self._release(self._stalled, 0)

    def _release(self, held: list[tuple[int, np.ndarray]], ahead: int) -> None:
        for at, threads in held:
            self._go(at + ahead, threads)
        held.clear()

    def _go(self, at: int, threads: np.ndarray) -> None:
        other = self._ready.get(at)
        if other is not None:
            threads = threads | other
            if threads.all():
                threads = self.everyone
        self._ready[at] = threads

    def _finish(self, instruction: Instruction, threads: np.ndarray) -> None:
        under_way = {
            "loads": self.shared.loads,
            "copies": self.shared.copies.jobs,
            "products": self.multiplications.jobs,
        }
        if left := [name for name, jobs in under_way.items() if jobs]:
            raise Fault(f"the block ends before its {' and '.join(left)}")
        self.stores.commit()
        self.finish_stores(0)


def _never_over(instruction: Instruction, threads: np.ndarray) -> None:
    raise Fault("this wait can never end")


def _blank(like: np.ndarray) -> np.ndarray:
    """Of a register that nothing was written to."""
    return np.zeros_like(like) if like.dtype.kind == "b" else np.full_like(like, np.iinfo(like.dtype).max)

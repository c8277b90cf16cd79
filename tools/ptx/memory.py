"""What memory holds, and what is on its way there: tensors, shared memory, mbarriers, boxes of tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

POISON = 0xFF  # each byte of it; a NaN in every float that is not 8 bits
SHARED_BASE = 1024  # what a kernel calls the address 0 of its own: the machine's own comes before, as on sm_90
SWIZZLES = (16, 32, 64, 128)  # bytes that a CUtensorMapSwizzle permutes 16-byte chunks within


class Fault(Exception):
    """A kernel did what the machine does not allow."""


class GlobalMemory:
    """What of this process's memory a kernel may touch."""

    def __init__(self):
        self._regions: list[tuple[int, np.ndarray]] = []

    def add(self, base: int, size: int) -> np.ndarray:
        """Allow `size` bytes from `base` on. Their uint8 view."""
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)) if size else np.empty(0, np.uint8)
        if not any(start <= base and base + size <= start + len(other) for start, other in self._regions):
            self._regions.append((base, view))
        return view

    def _found(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(view, which of the addresses lie in it, (n, size) indices of their bytes)."""
        left = np.ones(len(addresses), bool)
        for base, view in self._regions:
            inside = left & (addresses >= base) & (addresses + size <= base + len(view))
            if inside.any():
                left &= ~inside
                yield view, inside, (addresses[inside] - base)[:, None] + np.arange(size)
        if left.any():
            raise Fault(f"outside the launch's tensors: {', '.join(hex(x) for x in addresses[left][:4])}")

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n, size) bytes at n addresses."""
        data = np.empty((len(addresses), size), np.uint8)
        for view, inside, places in self._found(addresses, size):
            data[inside] = view[places]
        return data

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """(n, size) bytes to n addresses."""
        for view, inside, places in self._found(addresses, data.shape[1]):
            view[places] = data[inside]


class Groups:
    """Asynchronous work in groups, oldest first (PTX ISA: Async-group mechanism)."""

    def __init__(self):
        self._open, self._closed = [], []

    @property
    def jobs(self) -> list:
        return [job for group in (*self._closed, self._open) for job in group]

    def add(self, job: object) -> None:
        self._open.append(job)

    def commit(self) -> None:
        self._closed.append(self._open)
        self._open = []

    def wait(self, left: int, finish: Callable[[Any], None]) -> None:
        """Finish the jobs of all but the last `left` groups."""
        while len(self._closed) > left:
            for job in self._closed.pop(0):
                finish(job)


@dataclass
class Barrier:
    """An mbarrier object (PTX ISA: Parallel Synchronization and Communication Instructions: mbarrier)."""

    count: int
    left: int = field(init=False)
    expected: int = 0  # bytes still to come in this phase
    phase: int = 0

    def __post_init__(self):
        self.left = self.count

    def settle(self) -> None:
        if self.left < 0:
            raise Fault("more arrivals than the mbarrier counts")
        if self.left == 0 and self.expected == 0:
            self.phase, self.left = self.phase + 1, self.count


class SharedMemory:
    """A block's shared memory, addressed from SHARED_BASE on, and what is on its way there."""

    def __init__(self, size: int):
        self.bytes = np.full(SHARED_BASE + size, POISON, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.loads: list[tuple[int, np.ndarray, np.ndarray]] = []  # (mbarrier, places, data), oldest first
        self.copies = Groups()

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n, size) bytes at n addresses."""
        return self.bytes[self._places(addresses, size)]

    def write(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """(n, size) bytes to n addresses."""
        self.bytes[self._places(addresses, data.shape[1])] = data

    def copy(self, address: int, data: np.ndarray) -> None:
        """Begin to copy bytes there, as cp.async does."""
        places = self._places(np.array([address]), len(data))[0]
        self.bytes[places] = POISON
        self.copies.add((places, data))

    def wait_for_copies(self, left: int) -> None:
        self.copies.wait(left, lambda job: self._arrive(*job))

    def load(self, barrier: int, places: np.ndarray, data: np.ndarray) -> None:
        """Begin to load bytes whose arrival the mbarrier is told of."""
        self.barrier(barrier)
        self.check(places)
        if any(np.intersect1d(places, other).size for _, other, _ in self.loads):
            raise Fault("two loads to one place are under way")
        self.bytes[places] = POISON
        self.loads.append((barrier, places, data))

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"no mbarrier at {address:#x}")
        return self.barriers[address]

    def wait(self, address: int, parity: int) -> bool:
        """Whether the mbarrier's phase of that parity is over, once what is on its way has arrived as far as needed."""
        barrier = self.barrier(address)
        for load in [load for load in self.loads if load[0] == address]:
            if barrier.phase & 1 != parity:
                break  # what else comes is of a later phase
            self.loads.remove(load)
            self._arrive(*load[1:])
            barrier.expected -= load[2].size
            barrier.settle()
        return barrier.phase & 1 != parity

    def check(self, places: np.ndarray) -> None:
        if places.size and (places.min() < SHARED_BASE or places.max() >= len(self.bytes)):
            raise Fault(f"outside shared memory: {places.min():#x} to {places.max():#x} of {len(self.bytes):#x}")

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        places = addresses[:, None] + np.arange(size)
        self.check(places)
        return places

    def _arrive(self, places: np.ndarray, data: np.ndarray) -> None:
        self.bytes[places] = data


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where the byte of that address lies: 16-byte chunks are permuted within `span` bytes by the bits from 128 on (PTX
    ISA: Tensors: Swizzling modes). 16 leaves all in place."""
    return addresses ^ ((addresses >> 7 & (span // 16 - 1)) << 4)


@dataclass
class TensorMap:
    """A CUtensorMap of a matrix: what TMA copies boxes of."""

    bytes: np.ndarray  # of the matrix, from its first element on
    shape: tuple[int, int]
    stride: int  # bytes from a row to the next
    element: int  # bytes
    box: tuple[int, int]
    swizzle: int  # CUtensorMapSwizzle

    def __post_init__(self):
        if self.bytes.ctypes.data % 16 or self.stride % 16:
            raise Fault(f"a tensor map of {self.shape}: neither its address nor its stride may be other than 16 n")
        if self.swizzle and self.box[1] * self.element > SWIZZLES[self.swizzle]:
            raise Fault(f"a box of {self.box} is wider than its swizzle")

    def places(self, row: int, col: int, address: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each byte of the box from (row, col) on: its place in shared memory, its index in `bytes`, and whether it
        lies in the matrix, each (box rows, bytes of a box row)."""
        span = SWIZZLES[self.swizzle]
        if address % (8 * span):
            raise Fault(f"a box with swizzle {span} at {address:#x}")
        width = self.box[1] * self.element
        rows, cols = np.arange(self.box[0])[:, None], np.arange(width)[None]
        where = swizzled(address + rows * width + cols, span)
        rows, cols = row + rows, col * self.element + cols
        inside = (rows >= 0) & (rows < self.shape[0]) & (cols >= 0) & (cols < self.shape[1] * self.element)
        return where, rows * self.stride + cols, inside

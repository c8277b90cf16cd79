"""Running a grid of blocks."""

from __future__ import annotations

import random

from . import arithmetic, formats, tensor, transfers  # noqa: F401  they register instructions
from .machine import Block
from .memory import GlobalMemory, TensorMap
from .program import Program


def execute(
    program: Program,
    grid: tuple[int, int, int],
    parameters: list[int],
    memory: GlobalMemory,
    shared_bytes: int = 0,
    maps: dict[int, TensorMap] | None = None,
) -> None:
    """Run every block, in any order. parameters: their bits; maps: of those which are tensor maps, by position."""
    blocks = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
    random.shuffle(blocks)
    for index in blocks:
        Block(program, index, grid, parameters, maps or {}, memory, shared_bytes).run()

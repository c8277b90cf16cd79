"""From tensors to kernel arguments: what every launch of this backend shares."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import ops
from .config import Tile, cdiv
from .tiles import id_range_kernel


def rows_of(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, however far apart they are; else a copy."""
    if x.stride(1) == 1:
        return x
    # A single column has no second element for its stride to reach, but descriptors look at it.
    return x.as_strided(x.shape, (x.stride(0), 1)) if x.shape[1] == 1 else x.contiguous()


def ids_of(ids: Tensor | None) -> Tensor | None:
    return ids if ids is None else ids.contiguous()


def id_ranges(
    row_ids: Tensor | None, col_ids: Tensor | None, exclude: int, tile: Tile
) -> tuple[Tensor | None, Tensor | None]:
    """Smallest and largest id of each tile.grain rows and columns, where they tell which tiles need no mask."""
    if row_ids is None or exclude not in (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_SAME_ID_OFF_DIAGONAL):
        return None, None
    rows = _ranges(row_ids, tile.grain)
    return rows, rows if col_ids is None or col_ids is row_ids else _ranges(col_ids, tile.grain)


def _ranges(ids: Tensor, grain: int) -> Tensor:
    blocks = cdiv(ids.numel(), grain)
    ranges = ids.new_empty(blocks, 2)
    id_range_kernel[(blocks,)](ids, ranges, ids.numel(), GRAIN=grain, num_warps=1)
    return ranges


def on(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def operand(x: Tensor, rows: int, tile: Tile) -> Tensor | TensorDescriptor:
    """What a kernel loads (rows, tile.depth) tiles of x through."""
    if not tile.descriptor:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, tile.depth])


def output(panel: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    """What a kernel writes (rows, cols) tiles of a panel through."""
    if not tile.descriptor:
        return panel
    return TensorDescriptor(panel, list(panel.shape), list(panel.stride()), [tile.rows, tile.cols])


def processors(x: Tensor) -> int:
    return _processors(x.device) if x.is_cuda else 2


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_constants(width: int, element_unit: int, tile: Tile, how: str) -> dict:
    """Compile-time constants of a kernel that multiplies tiles."""
    return {
        "WIDTH": width,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLS": tile.cols,
        "DEPTH": tile.depth,
        "UNIT": element_unit,
        "DESCRIPTOR": tile.descriptor,
        "PRECISION": how,
    }


def measure(run) -> float:
    """Milliseconds of run(), median, for config's tuning."""
    return triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median")

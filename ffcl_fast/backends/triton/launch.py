"""From tensors to kernel arguments: what every launch of this backend shares.

What a call launches follows from the kinds of its tensors, so it is worked out once for each (a "plan", kept by
:func:`planned`) and only carried out after that: for a batch of a few thousand rows the host is what takes the time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import ops
from . import tuning
from .config import Tile, cdiv
from .tiles import IDS_APART, id_range_kernel

Grid = tuple[int, int, int]
PLANS = 256  # of an operator; for a million rows one is half a megabyte
_plans: list = []  # of each planned function, the plans it keeps


def planned(build: Callable) -> Callable:
    """Keep what ``build`` returns, by its arguments."""
    kept = functools.lru_cache(maxsize=PLANS)(build)
    _plans.append(kept)
    return kept


def forget_plans() -> None:
    """For tests and measurements: the next call of everything is a first one."""
    for kept in _plans:
        kept.cache_clear()


def kinds(*tensors: Tensor | None) -> tuple:
    """What plans may depend on of a call's tensors, and Triton compiles differently for: the device, and each tensor's
    dtype, shape, strides and whether it begins at a multiple of 16 bytes."""
    found = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors]
    return tensors[0].device, *found


def beyond_32_bits(*scalars: int) -> tuple[bool, ...]:
    """Which of these Triton passes on as 64 bits: what a plan's key needs of scalars that differ between its calls."""
    return tuple([x >= 1 << 31 for x in scalars])


class Launch:
    """A kernel with its grid, the scalars that follow its tensors, compile-time constants and options.

    The first call goes through Triton's launch, which looks at each argument and chooses what it has compiled. Those
    after it hand their arguments to that choice and look at none: keep a Launch by the :func:`kinds` of every tensor it
    is called with. Tensors that were just allocated need not be among them, but what they follow from must be
    in the key: their sizes, and which of them are None.
    """

    __slots__ = ("kernel", "grid", "scalars", "constants", "values", "compiled")

    def __init__(self, kernel: triton.runtime.KernelInterface, grid: Grid, scalars: tuple, **constants: object):
        self.kernel, self.grid, self.scalars, self.constants = kernel, grid, scalars, constants
        # What is no parameter is an option of the compiler.
        self.values = [constants[name] for name in kernel.arg_names if name in constants]
        self.compiled = None

    def __call__(
        self,
        *tensors: Tensor | TensorDescriptor | None,
        grid: Grid | None = None,
        scalars: tuple | None = None,
    ) -> None:
        """``grid`` and ``scalars`` replace this Launch's own for one call. Triton must compile nothing else for them:
        they may differ where a kernel has do_not_specialize, on one side of 32 bits."""
        grid = self.grid if grid is None else grid
        scalars = self.scalars if scalars is None else scalars
        if self.compiled is not None:
            self.compiled[grid](*tensors, *scalars, *self.values)
        else:  # Triton's interpreter compiles nothing, so there this is every call
            self.compiled = self.kernel[grid](*tensors, *scalars, **self.constants)


def rows_of(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, however far apart they are; else a copy."""
    if x.stride(1) == 1:
        return x
    # A single column has no second element for its stride to reach, but descriptors look at it.
    return x.as_strided(x.shape, (x.stride(0), 1)) if x.shape[1] == 1 else x.contiguous()


def ids_of(ids: Tensor | None) -> Tensor | None:
    return ids if ids is None else ids.contiguous()


def leaves_out_equal_ids(exclude: int) -> bool:
    """Whether parts of S in which no ids can meet need no masks."""
    return exclude in (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_SAME_ID_OFF_DIAGONAL)


class Share(NamedTuple):
    """A launch's share of S or of a panel, where several launches with other masks have it together."""

    op: str  # what tuning.pick calls it
    ids: int  # ANY_IDS, IDS_APART or IDS_MEET
    exclude: int  # what it leaves out itself
    cells: int = 0  # of the forward pass: which super-tiles

    def tile(self, q: Tensor, k: Tensor, timing: Callable[[], float] | None) -> Tile:
        """Of a call whose pairs are left out by id the part without masks, which may be any, says nothing of tiles."""
        masks_ids = self.exclude > ops.EXCLUDE_DIAGONAL
        return tuning.pick(self.op, q, k, masks_ids, None if self.ids == int(IDS_APART) else timing)


def id_ranges(
    row_ids: Tensor | None, col_ids: Tensor | None, exclude: int, tiles: Sequence[Tile]
) -> tuple[Tensor | None, Tensor | None]:
    """Smallest and largest id of each few rows and columns, where they tell which of the tiles need no mask."""
    if row_ids is None or not leaves_out_equal_ids(exclude):
        return None, None
    grain = smallest_grain(tiles)
    rows = _ranges(row_ids, grain)
    return rows, rows if col_ids is None or col_ids is row_ids else _ranges(col_ids, grain)


def smallest_grain(tiles: Sequence[Tile]) -> int:
    """Rows whose smallest and largest id are known."""
    return min([tile.grain for tile in tiles])


def _ranges(ids: Tensor, grain: int) -> Tensor:
    ranges = ids.new_empty(cdiv(ids.numel(), grain), 2)
    _range_launch(kinds(ids), grain)(ids, ranges)
    return ranges


@planned
def _range_launch(kinds: tuple, grain: int) -> Launch:
    (rows,) = kinds[1][1]
    return Launch(id_range_kernel, (cdiv(rows, grain), 1, 1), (rows,), GRAIN=grain, num_warps=1)


def on(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one: Triton launches there."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():  # to ask is cheaper than to set it again
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def operand(x: Tensor, rows: int, tile: Tile) -> Tensor | TensorDescriptor:
    """What a kernel loads (rows, tile.depth) tiles of x through."""
    if not tile.descriptor:
        return x
    return _described(x, rows, tile.depth)


def output(panel: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    """What a kernel writes (rows, cols) tiles of a panel through."""
    if not tile.descriptor:
        return panel
    return _described(panel, tile.rows, tile.cols)


def _described(x: Tensor, *block: int) -> TensorDescriptor:
    """TensorDescriptor(x, ...) without its checks, which take longer than a launch and pass or fail by kind. x begins
    at a multiple of 16 bytes: see :func:`..aligned.aligned_rows`."""
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_description(x.dtype, x.shape, x.stride(), block), base=x)
    return descriptor


@planned
def _description(dtype: torch.dtype, shape: torch.Size, strides: tuple, block: tuple) -> dict:
    """The attributes of a checked TensorDescriptor, of a tensor without memory."""
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return vars(TensorDescriptor(like, list(shape), list(strides), list(block)))


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


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
    """Milliseconds of run(), median, for tuning.pick."""
    return triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median")

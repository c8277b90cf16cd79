"""The tiles a kernel may run with, by chip, dtype and width. :mod:`.tuning` takes one of them for a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WIDTH = 4096
REGISTER_WIDTH = 128  # embeddings this narrow keep their gradient's accumulators in registers
WORKSPACE = 64 << 20  # bytes of partial sums that one launch may write


# Triton has both, but as functions that kernels can call, which cost 13 us each on the way to every launch.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """Shape and schedule of one kernel: rows x cols of S, `depth` of the embedding a step."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    descriptor: bool = False  # loads by the bulk tensor copy engine (TMA)
    fold: int = 0  # warps whose rows repeat (see similarity_forward.fold_rows); 0 where threads hold rows otherwise
    registers: int = 0  # most a thread may use, 0 for no limit: 168 lets three blocks of 4 warps share a multiprocessor
    settle: bool = False  # a step ends with its products; else the last may run on beside the next step's loads
    group: int = 8  # blocks of rows that walk the columns together

    @property
    def grain(self) -> int:
        """Rows whose smallest and largest id are to be known: no side of the tile is shorter."""
        return min(64, self.rows, self.cols)

    @property
    def options(self) -> dict:
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


# Shared memory a block may have, bytes: the smallest of a family's members (sm_86, sm_89 and sm_120 for "sm80").
SHARED_LIMIT = {"sm80": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx942": 64 << 10, "interpret": 1 << 30}


@functools.cache
def family(device: torch.device) -> str:
    """Chip family of the table: "sm80", "sm90", "sm100", "gfx942", or "interpret" for the CPU."""
    if device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def precision(x: Tensor) -> str:
    """How a tile product multiplies: float32 stays float32 unless torch's own switch allows TF32."""
    if x.device.type == "cpu":
        return "interpret"
    if x.dtype != torch.float32 or not has_tf32(x.device):
        return "ieee"  # the one value that every chip takes; it has no meaning for 16-bit operands
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision
    return "tf32" if setting == "tf32" else "ieee"


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether the chip has TF32 products: NVIDIA's from sm_80 on, of AMD's only gfx942."""
    return torch.version.hip is None or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def parts(x: Tensor) -> int:
    """Partial results of a reduction over all rows: enough blocks to fill a chip, few enough for one to reduce."""
    return 128 if x.is_cuda else 4


def gain(dtype: torch.dtype) -> float:
    """What gradients of pairs, at most 2 in size, are multiplied by before they are rounded to dtype."""
    return 2.0**14 if dtype == torch.float16 else 1.0


PANEL_SIDE = {2: 8192, 4: 2048}  # by bytes an element: 128 and 16 MiB; whole tiles of any shape


def panel_side(x: Tensor) -> int:
    """Rows and columns of a panel of pair gradients."""
    return PANEL_SIDE[x.element_size()]


def kind(dtype: torch.dtype, how: str) -> str:
    """Operand class of the table: "half", "tf32" or "float"."""
    return "half" if dtype != torch.float32 else {"tf32": "tf32"}.get(how, "float")


def depth_for(width: int, limit: int) -> int:
    """Depth of a step: `limit`, or half where that pads the embedding at least a tenth less.

    A narrower embedding takes one step of `limit` too: its product costs nothing beside its exponentials, and every
    depth is another kernel to compile, check and tune.
    """
    if width <= limit:
        return limit
    half = limit // 2
    padded = cdiv(width, limit) * limit
    return half if cdiv(width, half) * half < 0.9 * padded else limit


def _half(op: str, chip: str, width: int, ids: bool) -> list[Tile]:
    """16-bit operands. `ids`: pairs are excluded by id, whose columns take as many registers as 64 columns of S; of
    "rows", which takes them by halves, only where the diagonal stays."""
    deep = chip in ("sm90", "sm100")
    depth = depth_for(width, 64 if deep else 32)
    whole = max(depth, next_power_of_2(width))
    # Narrow: a block keeps its columns' embeddings, the rows stream past.
    stays = op in ("forward", "triangle") and width <= REGISTER_WIDTH
    if op == "online":
        return [Tile(64, 64, depth, 8 if chip == "sm100" else 4, 2)]
    if op == "rows":
        if chip == "sm90":
            # Three blocks a multiprocessor hide each other's exponentials.
            return [Tile(64, 64, whole, 4, 3, True, registers=0 if ids else 168, settle=True)]
        if chip == "sm100":
            return [Tile(128, 64, whole, 8, 3, True)]
        return [Tile(64, 64, whole, 4, 1) if chip == "gfx942" else Tile(64, 64, whole, 8, 2)]
    if chip == "sm90":
        if stays:
            if ids:
                return [Tile(128, 64, whole, 4, 2, True, fold=4)]
            narrow = Tile(64, 128, whole, 4, 3, True, fold=4)
            # The triangle's masks leave no registers for the large one.
            return [narrow] if op == "triangle" else [Tile(128, 128, whole, 4, 2, True, fold=4), narrow]
        if ids or op == "siglip":
            return [Tile(128, 128, depth, 8, 3, True, fold=8), Tile(128, 64, depth, 4, 3, True, fold=4)]
        if op == "panel":
            return [Tile(128, 128, depth, 4, 3, True), Tile(128, 128, depth, 8, 3, True)]
        # Two small blocks a multiprocessor hide each other's exponentials; one large block loads less for its products.
        pair, single = Tile(128, 128, depth, 4, 3, True, fold=4), Tile(256, 128, depth, 8, 3, True, fold=8)
        if op == "triangle":  # the diagonal's masks leave no registers for the large one
            return [pair]
        return [pair, single]
    if chip == "sm100":
        return [Tile(128, 64, whole if stays and not ids else depth, 8, 3, True)]
    if chip == "gfx942":
        return [Tile(128, 128, depth, 8, 2)]
    # Masks by id leave no registers for column sums of several rows.
    return [Tile(128, 128, depth, 8, 4, fold=0 if ids else 8)]


@functools.cache
def candidates(op: str, chip: str, operands: str, width: int, ids: bool = False) -> list[Tile]:
    """Configurations worth timing for kernel `op`, the default first.

    op: "forward", "triangle" (the forward pass where k = q), "panel" (gradient panels), "siglip", "rows" (gradients in
    registers), "online" (the rescue path).
    """
    if chip == "interpret":
        return [Tile(32, 32, 32 if op != "rows" else max(16, next_power_of_2(width)), 4, 1, fold=1)]
    if operands == "float":  # no matrix unit multiplies float32: small tiles, bound by FMA and registers
        if chip == "gfx942":
            return [Tile(64, 64, 16, 8, 2)]
        # ptxas, left alone, would spill a few numbers to fit one more block on a multiprocessor.
        return [Tile(64, 64, 16, 8 if ids or op == "online" else 4, 2, registers=255)]
    if operands == "tf32":
        if op == "online":
            return [Tile(64, 64, 32, 8 if chip == "sm100" else 4, 2)]
        return [Tile(128, 64, 32, 8 if chip == "sm100" else 4, 2 if chip == "gfx942" else 3, chip in ("sm90", "sm100"))]
    return _half(op, chip, width, ids)

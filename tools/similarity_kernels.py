"""Every similarity kernel that ``auto`` can launch on a chip, as compilations for :mod:`tools.kernels`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ffcl_fast import ops
from ffcl_fast.backends.triton import config
from ffcl_fast.backends.triton.config import Tile
from ffcl_fast.backends.triton.gradient_panels import combine_constants, combine_kernel
from ffcl_fast.backends.triton.siglip import siglip_constants, siglip_kernel
from ffcl_fast.backends.triton.similarity_backward import (
    panel_constants,
    panel_kernel,
    range_constants,
    range_kernel,
    rows_constants,
    rows_kernel,
    vector_constants,
    vector_kernel,
)
from ffcl_fast.backends.triton.similarity_forward import (
    ABOVE,
    ALL,
    ON_DIAGONAL,
    SPAN,
    UPPER,
    finish_constants,
    finish_kernel,
    norm_constants,
    norm_kernel,
    sums_constants,
    sums_kernel,
)
from ffcl_fast.backends.triton.tiles import ANY_IDS, IDS_APART, IDS_MEET, id_range_kernel

from .kernels import Compilation

PARTS = 128
IDS = ops.EXCLUDE_SAME_ID_OFF_DIAGONAL
COMBINED = {"out": "*bf16", "size": "i64", "more": "*fp32", "more_out": "*bf16", "more_size": "i64"}
FLOATS = {
    *("scale", "bias", "norms", "ranges", "vectors", "frame", "x_vectors", "y_vectors", "row_vectors", "col_vectors"),
    *("row_part", "col_part", "sums", "row_lse", "col_lse", "rests", "row_grad", "col_grad"),
}


def _arguments(kernel, constants: dict, dtype: str, tile=None, types: dict | None = None, ids: bool = False) -> dict:
    """Argument types of a launch: the names say what they are."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if types and name in types:
            signature[name] = types[name]
        elif name == "panel":
            described = tile.descriptor
            signature[name] = f"tensordesc<{dtype}[{tile.rows}, {tile.cols}]>" if described else f"*{dtype}"
        elif name in ("q", "k", "x", "y"):
            rows = tile.rows if tile and name in ("q", "x") else tile.cols if tile else 0
            whole = tile is not None and tile.descriptor
            signature[name] = f"tensordesc<{dtype}[{rows}, {tile.depth}]>" if whole else f"*{dtype}"
        elif name.endswith("_ids"):
            signature[name] = "*i64" if ids else None
        elif name.endswith("_ranges"):  # of no use where equal ids are what stays
            signature[name] = "*i64" if ids and constants["EXCLUDE"] != ops.EXCLUDE_DIFFERENT_ID else None
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in ("headroom", "lost_below"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
    return signature


def _operands() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(operand class, element type, precision, widths at which each kernel's every variant is compiled)."""
    yield "half", "bf16", "ieee", (512, 128)
    yield "tf32", "fp32", "tf32", (512,)
    yield "float", "fp32", "ieee", (512,)


def tiles(op: str, chip: str, operands: str, ids: bool, first: tuple[int, ...]) -> Iterator[tuple[Tile, int, bool]]:
    """(tile, width, whether the width is one of `first`): every tile there is for `op`, at one width at least."""
    seen = set()
    # 200 is no multiple of a step; the rest are the smallest widths of their tiles, which end to differ below 600. All
    # are multiples of 16 bytes, as `aligned_rows` makes them.
    for width in dict.fromkeys((*first, 200, *range(8, 600, 8), config.MAX_WIDTH)):
        if op == "rows" and width > config.REGISTER_WIDTH:
            continue
        if op == "panel" and operands == "half" and width <= config.REGISTER_WIDTH:
            continue
        for tile in config.candidates(op, chip, operands, width, ids):
            if width in first or tile not in seen:
                seen.add(tile)
                yield tile, width, width in first


def compilations(chip: str) -> Iterator[Compilation]:
    for operands, dtype, how, main in _operands():
        for op in ("forward", "triangle", "panel", "siglip", "rows", "online"):
            if op == "rows" and operands != "half":
                continue
            for ids in (False, True) if op in ("forward", "triangle", "panel", "rows") else (False,):
                yield from (
                    item
                    for tile, width, usual in tiles(op, chip, operands, ids, main)
                    for item in _variants(op, tile, width, dtype, how, ids, usual)
                )
    yield from _float16(chip)
    yield from _exclusions(chip)
    yield from _vectors()


def _float16(chip: str) -> Iterator[Compilation]:
    """Every tile of 16-bit operands: what differs from bfloat16 is one instruction's name, and a factor."""
    for op, width in (("forward", 512), ("triangle", 512), ("panel", 512), ("siglip", 512), ("online", 512),
                      ("forward", 128), ("triangle", 128), ("rows", 128)):  # fmt: skip
        for ids in (False, True) if op not in ("siglip", "online") else (False,):
            for tile in config.candidates(op, chip, "half", width, ids):
                yield from _variants(op, tile, width, "fp16", "ieee", ids, False)


def _exclusions(chip: str) -> Iterator[Compilation]:
    """Every other exclusion of every kernel that masks, and the shorter super-tiles of small problems."""
    others = {False: (ops.EXCLUDE_DIAGONAL,), True: (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_DIFFERENT_ID)}
    for op, width in (("forward", 512), ("triangle", 512), ("panel", 512), ("forward", 128), ("triangle", 128),
                      ("rows", 128)):  # fmt: skip
        for ids, modes in others.items():
            # Of the gradients in registers only those that keep the diagonal have another tile for ids.
            tile = config.candidates(op, chip, "half", width, ids and op != "rows")[0]
            for mode in modes:
                yield from _variants(op, tile, width, "bf16", "ieee", ids, False, mode)
        if op in ("forward", "triangle"):
            tile = config.candidates(op, chip, "half", width)[0]
            for span in range(1, SPAN):
                if span & (span - 1) == 0 and span * tile.rows >= tile.cols:
                    yield from _variants(op, tile, width, "bf16", "ieee", False, False, span=span)


def _variants(
    op: str,
    tile: Tile,
    width: int,
    dtype: str,
    how: str,
    ids: bool,
    usual: bool,
    mode: int | None = None,
    span: int = SPAN,
) -> Iterator[Compilation]:
    """The ways to launch a kernel with this tile; off the usual widths the one that needs the most registers."""
    unit = 4 if dtype == "fp32" else 8
    matrix = how == "ieee" and dtype != "fp32"
    gain = config.gain(torch.float16 if dtype == "fp16" else torch.float32)
    exclude = mode if mode is not None else IDS if ids else 0
    note = (
        (" ids" if ids else "") + (f" x{mode}" if mode is not None else "") + (f" span {span}" if span < SPAN else "")
    )

    def item(name: str, kernel, constants: dict, types: dict | None = None, with_ids: bool = ids) -> Compilation:
        signature = _arguments(kernel, constants, dtype, tile, types, with_ids)
        return Compilation(name + note, kernel, signature, constants, tile, dtype, width, matrix)

    if op in ("forward", "triangle"):
        meet = ANY_IDS if not ids or exclude == ops.EXCLUDE_DIFFERENT_ID else IDS_MEET
        if op == "triangle":
            ways = [("triangle", exclude, True, UPPER if ids else ON_DIAGONAL, meet)]
        else:
            ways = [("both", exclude, True, ALL, meet)]
            if not exclude:
                ways += [("above", 0, True, ABOVE, ANY_IDS)]
            if usual and not ids and dtype == "bf16":
                ways += [("apart", 0, True, ALL, IDS_APART), ("above apart", 0, True, ABOVE, IDS_APART)]
                ways += [("rows only", ops.EXCLUDE_DIAGONAL, False, ALL, ANY_IDS)] if width == 512 else []
        for name, left_out, both, cells, meet in ways:
            kind = left_out, both, int(cells), span, int(meet)
            c = sums_constants(tile, width, unit, how, PARTS, *kind, tile.grain)
            yield item(f"sums {name}", sums_kernel, c, with_ids=meet != ANY_IDS or ids)
    elif op == "panel":
        meet = ANY_IDS if not ids or exclude == ops.EXCLUDE_DIFFERENT_ID else IDS_MEET
        ways = [("both", 3, meet)]
        if usual and not ids and dtype == "bf16":
            ways += [("one side", 1, meet)]
        if not exclude:
            ways += [("apart", 3, IDS_APART)]
        for name, sides, meet in ways:
            side = max(tile.rows, tile.cols)
            c = panel_constants(tile, width, unit, how, exclude, sides, int(meet), side, tile.grain)
            yield item(f"panel {name}", panel_kernel, c, with_ids=meet != ANY_IDS or ids)
    elif op == "siglip":
        for gradient in (True, False) if (dtype, width) == ("bf16", 512) else (True,):
            c = siglip_constants(tile, width, unit, how, True, gradient, gain)
            types = {"totals": "*fp64"} | ({} if gradient else {"panel": None})
            yield item(f"siglip{'' if gradient else ' loss'}", siglip_kernel, c, types)
    elif op == "rows":
        for sides, split in ((3, False), (3, True), (1, True)) if usual else ((3, True),):
            c = rows_constants(tile, width, unit, how, exclude, sides, split, gain)
            out = "*fp32" if split else f"*{dtype}"
            yield item(f"rows {'both' if sides == 3 else 'one side'}", rows_kernel, c, {"out": out})
    else:
        for triangle in (False, True):
            c = finish_constants(tile, width, unit, how, PARTS, IDS, triangle)
            yield item(f"finish + rescue{' triangle' if triangle else ''}", finish_kernel, c, with_ids=True)


def _vectors() -> Iterator[Compilation]:
    """Kernels over rows and vectors, whose one configuration is the same for all."""
    for name, kernel, c, dtype, types in (
        ("norms", norm_kernel, norm_constants(512, 8, PARTS), "bf16", None),
        ("range", range_kernel, range_constants(True, PARTS), "fp32", None),
        ("vectors", vector_kernel, vector_constants(1.0, PARTS), "fp32", None),
        ("id ranges", id_range_kernel, {"GRAIN": 64}, "fp32", {"ids": "*i64", "ranges": "*i64"}),
        ("combine", combine_kernel, combine_constants(1, 1.0, True, "ieee"), "bf16", COMBINED),
    ):
        yield Compilation(name, kernel, _arguments(kernel, c, dtype, types=types), c, None, dtype,
                          c.get("WIDTH", 0), False)  # fmt: skip

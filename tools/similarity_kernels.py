"""Every similarity kernel that ``auto`` can launch on a chip, as compilations for :mod:`tools.kernels`."""

from __future__ import annotations

from collections.abc import Iterator

from ffcl_fast import ops
from ffcl_fast.backends.triton import config
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
    SPAN,
    finish_constants,
    finish_kernel,
    norm_constants,
    norm_kernel,
    sums_constants,
    sums_kernel,
)

from .kernels import Compilation

PARTS = 128
IDS = ops.EXCLUDE_SAME_ID_OFF_DIAGONAL
FLOATS = {
    *("scale", "bias", "norms", "ranges", "vectors", "frame", "x_vectors", "y_vectors", "row_vectors", "col_vectors"),
    *("row_part", "col_part", "sums", "row_lse", "col_lse", "row_grad", "col_grad"),
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
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in ("headroom", "lost_below"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
    return signature


def _operands(chip: str) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(operand class, element type, precision, widths): what changes the code, one width a way through it."""
    yield "half", "bf16", "tf32", (128, 200, 512)
    yield "half", "fp16", "tf32", (512,)
    yield "tf32", "fp32", "tf32", (512,)
    yield "float", "fp32", "ieee", (512,)


def compilations(chip: str) -> Iterator[Compilation]:
    for operands, dtype, how, widths in _operands(chip):
        unit = 4 if dtype == "fp32" else 8
        matrix = operands == "half"
        for width in widths:
            main = width != 200 and dtype != "fp16"
            for exclude, triangle in ((0, False), (ops.EXCLUDE_DIAGONAL, True), (IDS, True))[: 3 if main else 1]:
                for tile in config.candidates("forward", chip, operands, width, exclude == IDS):
                    c = sums_constants(tile, width, unit, how, PARTS, exclude, True, triangle, SPAN)
                    yield Compilation(
                        f"sums {'triangle' if triangle else 'both'}{' ids' if exclude == IDS else ''}", sums_kernel,
                        _arguments(sums_kernel, c, dtype, tile, ids=exclude == IDS), c, tile, dtype, width, matrix,
                    )  # fmt: skip
            for exclude in (0, IDS)[: 0 if matrix and width <= config.REGISTER_WIDTH else 2 if main else 1]:
                for tile in config.candidates("panel", chip, operands, width, exclude == IDS):
                    c = panel_constants(tile, width, unit, how, exclude, 3)
                    yield Compilation(
                        f"panel{' ids' if exclude else ''}", panel_kernel,
                        _arguments(panel_kernel, c, dtype, tile, ids=exclude == IDS), c, tile, dtype, width, matrix,
                    )  # fmt: skip
            if not main:
                continue
            for tile in config.candidates("siglip", chip, operands, width):
                c = siglip_constants(tile, width, unit, how, True, True, 1.0)
                types = {"totals": "*fp64"}
                yield Compilation("siglip", siglip_kernel, _arguments(siglip_kernel, c, dtype, tile, types), c, tile,
                                  dtype, width, matrix)  # fmt: skip
            tile = config.candidates("online", chip, operands, width)[0]
            c = finish_constants(tile, width, unit, how, PARTS, IDS, True)
            yield Compilation("finish + rescue", finish_kernel, _arguments(finish_kernel, c, dtype, tile, ids=True), c,
                              tile, dtype, width, matrix)  # fmt: skip
            if operands == "half" and width <= config.REGISTER_WIDTH:
                for sides, exclude in ((1, 0), (3, IDS)):
                    for tile in config.candidates("rows", chip, operands, width, exclude == IDS):
                        c = rows_constants(tile, width, unit, how, exclude, sides, False, 1.0)
                        yield Compilation(
                            f"rows {'both ids' if exclude else 'one side'}", rows_kernel,
                            _arguments(rows_kernel, c, dtype, tile, {"out": f"*{dtype}"}, exclude == IDS), c, tile,
                            dtype, width, matrix,
                        )  # fmt: skip
    c = norm_constants(512, 8, PARTS)
    yield Compilation("norms", norm_kernel, _arguments(norm_kernel, c, "bf16"), c, None, "bf16", 512, False)
    c = range_constants(True, PARTS)
    yield Compilation("range", range_kernel, _arguments(range_kernel, c, "fp32"), c, None, "fp32", 0, False)
    c = vector_constants(1.0, PARTS)
    yield Compilation("vectors", vector_kernel, _arguments(vector_kernel, c, "fp32"), c, None, "fp32", 0, False)
    c = combine_constants(1, 1.0, True, "tf32")
    types = {"out": "*bf16", "size": "i64"}
    yield Compilation("combine", combine_kernel, _arguments(combine_kernel, c, "bf16", types=types), c, None, "bf16", 0,
                      False)  # fmt: skip

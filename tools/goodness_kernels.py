"""Every goodness kernel that can be launched on a chip, as compilations for :mod:`tools.kernels`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ffcl_fast.backends.triton import class_positives, positives, rows
from ffcl_fast.backends.triton.goodness import (
    backward_kernel,
    constants,
    goodness_kernel,
    gradient_kernel,
    normalize_kernel,
    partial_kernel,
)
from ffcl_fast.backends.triton.goodness_many import cut as many_cut
from ffcl_fast.backends.triton.goodness_many import many_backward_kernel, many_kernel
from ffcl_fast.backends.triton.linear_goodness import kernel_constants, linear_goodness_kernel
from ffcl_fast.backends.triton.normalize import constants as unit_constants
from ffcl_fast.backends.triton.normalize import unit_backward_kernel, unit_kernel
from ffcl_fast.backends.triton.pair_cosine import (
    SCALE_BLOCK,
    pair_backward_kernel,
    pair_cosine_kernel,
    pair_finish_kernel,
    pair_partial_kernel,
    scale_kernel,
)
from ffcl_fast.backends.triton.pool_goodness import maps, pool_backward_kernel, pool_finish_kernel, pool_kernel
from ffcl_fast.backends.triton.rows import Cut, add_parts_kernel

from .kernels import Compilation
from .similarity_kernels import tiles

MULTIPROCESSORS = 132
BYTES = {"bf16": 2, "fp32": 4, "fp16": 2}
ACTIVATIONS = ("h", "h1", "h2", "other", "grad_out", "out", "dh", "d1", "d2", "x", "weight", "bias")
FLOATS = ("goodness", "grad_goodness", "partials", "target", "loss", "coefficients", "grad", "pooled", "grad_pooled",
          "sums", "factor")  # fmt: skip
NUMBERS = ("inverse_width", "inverse_length", "goodness_factor", "eps", "margin", "scale")
SLOTS = 16  # ResNet-18's eight blocks, positive and negative


def _arguments(kernel, c: dict, dtype: str, types: dict | None = None, without: tuple[str, ...] = ()) -> dict:
    """Argument types of a launch: the names say what they are."""
    signature: dict = {}
    for name in kernel.arg_names:
        if name in c:
            continue
        if name in without:
            signature[name] = None
        elif types and name in types:
            signature[name] = types[name]
        elif name in ACTIVATIONS:
            signature[name] = f"*{dtype}"
        elif name in FLOATS:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
    return signature


def _item(name, kernel, c: dict, cut, dtype: str, width: int, types: dict | None = None, without=()) -> Compilation:
    return Compilation(name, kernel, _arguments(kernel, c, dtype, types, without), c, cut, dtype, width, False)


def _row_kernels(chip: str, dtype: str) -> Iterator[Compilation]:
    """Short rows, ragged rows, long rows of many samples, and rows that many programs share."""
    size = BYTES[dtype]
    short, long = ((65536, 2048), (65536, 16384)), ((65536, 30000), (64, 200704))
    # 7001 is loaded an element at a time. float32 has the code of 16 bits with other widths of its loads, float16
    # bfloat16's with other conversions.
    shapes = (*short, *long) if dtype != "bf16" else ((65536, 96), *short, (65536, 4096), (65536, 7001), *long)
    for count, width in shapes:
        unit = math.gcd(16 // size, width)
        common = constants(unit, True)
        last = {"MEAN": True, "PRECISION": "hardware"}
        one, two = (rows.cut(count, width, tensors, chip, size, MULTIPROCESSORS) for tensors in (1, 2))
        if one.parts == 1:
            yield _item("goodness", goodness_kernel, common | last | one.constants, one, dtype, width)
        else:
            c = common | {"BLOCK": one.block}
            yield _item("partial squares", partial_kernel, c, one, dtype, width, without=("other",))
            yield _item("normalize", normalize_kernel, common | last | one.part_constants, one, dtype, width)
            without = ("grad_out", "partials")
            c = common | last | one.part_constants
            yield _item("gradient of g", gradient_kernel, c, one, dtype, width, without=without)
        if two.parts == 1:
            yield _item("backward", backward_kernel, common | last | two.constants, two, dtype, width)
        else:
            yield _item("partial along", partial_kernel, common | {"BLOCK": two.block}, two, dtype, width)
            yield _item("gradient", gradient_kernel, common | last | two.part_constants, two, dtype, width)
        yield from _pair_kernels(dtype, width, common, two)


def _pair_kernels(dtype: str, width: int, common: dict, cut: Cut) -> Iterator[Compilation]:
    how = {"PRECISION": "hardware"}
    if cut.parts == 1:
        yield _item("pair cosine", pair_cosine_kernel, common | how | cut.constants, cut, dtype, width)
    else:
        yield _item("pair partial", pair_partial_kernel, common | {"BLOCK": cut.block}, cut, dtype, width)
        yield _item("pair finish", pair_finish_kernel, common | how | cut.part_constants, cut, dtype, width)
    c = common | how | {"ROWS": cut.rows, "BLOCK": cut.block}
    yield _item("pair backward", pair_backward_kernel, c, cut, dtype, width)


def _pool_kernels(chip: str, dtype: str) -> Iterator[Compilation]:
    size = BYTES[dtype]
    for channels, length in ((64, 3136), (512, 49))[: 2 if dtype == "bf16" else 1]:
        for last in (False, True):
            unit = math.gcd(16 // size, channels if last else length)
            for count in (64, 8192):
                cut = maps(count, channels, length, last, unit, chip, MULTIPROCESSORS)
                whole = cut.channel_parts * cut.position_parts == 1
                c = cut.constants | {"WHOLE": whole, "RELU": True}
                yield _item(f"pool {'whole' if whole else 'shared'}", pool_kernel, c, cut, dtype, channels * length)
            c = cut.constants | {"RELU": True, "PRECISION": "hardware"}
            yield _item("pool backward", pool_backward_kernel, c, cut, dtype, channels * length)


def _many_kernels(chip: str, dtype: str) -> Iterator[Compilation]:
    for widths in ([2000] * SLOTS, [200704, 25088]):
        side, block, warps = many_cut(widths, [256], chip)
        cut = Cut(side, block, warps, True)
        c = {"UNIT": 16 // BYTES[dtype], "SLOTS": SLOTS, "ROWS": side, "BLOCK": block, "MEAN": True, "RELU": True}
        types = {"pointers": (f"*{dtype}",) * SLOTS, "gradients": (f"*{dtype}",) * SLOTS, "table": "*i64"}
        yield _item("many", many_kernel, c, cut, dtype, widths[0], types)
        c = c | {"PRECISION": "hardware"}
        yield _item("many backward", many_backward_kernel, c, cut, dtype, widths[0], types)


def _unit_kernels(chip: str) -> Iterator[Compilation]:
    """L2-normalisation of narrow rows, wide ones, ragged ones and ones walked in steps; last as autocast has it."""
    for width, dtype, out in ((128, "bf16", "bf16"), (4096, "bf16", "bf16"), (1001, "bf16", "bf16"),
                              (512, "fp32", "fp32"), (30000, "bf16", "bf16"), (768, "fp32", "bf16"),
                              (512, "fp16", "fp16")):  # fmt: skip
        size = BYTES[dtype]
        unit = math.gcd(16 // size, width)
        forward, backward = (rows.cut(65536, width, tensors, chip, size, MULTIPROCESSORS) for tensors in (1, 2))
        types = {"z": f"*{out}", "norms": "*fp32"}
        yield _item("unit rows", unit_kernel, unit_constants(forward, unit, "hardware"), forward, dtype, width, types)
        types |= {"dz": f"*{out}", "dx": f"*{dtype}"}
        c = unit_constants(backward, unit, "hardware")
        yield _item("unit rows backward", unit_backward_kernel, c, backward, dtype, width, types)


_WIDTHS = ((128, "bf16"), (512, "bf16"), (512, "fp32"), (512, "fp16"), (1001, "bf16"), (4096, "bf16"), (4096, "fp32"))


def _positive_kernels(chip: str) -> Iterator[Compilation]:
    """The positives of a contrast: each pairing, decoupled or not, one column side or two, narrow and widest rows."""
    for width, dtype in _WIDTHS:
        unit = math.gcd(16 // BYTES[dtype], width)
        odds, add = (positives.whole_rows(65536, width, tensors, chip) for tensors in (2, 4))
        types = {name: f"*{dtype}" for name in ("q", "positive", "dq", "d_positive")} | {
            name: "*fp32"
            for name in ("scale", "row_lse", "col_lse", "loss", "slope", "col_slope", "logits", "grad", "inner")
        }
        for pairing in range(3) if width == 512 else (0,):
            without = ("col_lse", "col_slope", "d_positive") if pairing else ()
            c = positives.constants(odds, unit) | {"PAIRING": pairing, "DECOUPLED": pairing == 1}
            present = {name: kind for name, kind in types.items() if name not in without}
            yield _item("odds", positives.odds_kernel, c, odds, dtype, width, present, without)
            c = positives.constants(add, unit) | {"PAIRING": pairing, "PRECISION": "hardware"}
            yield _item("add positives", positives.add_kernel, c, add, dtype, width, present, without)


def _class_kernels(chip: str) -> Iterator[Compilation]:
    """SupCon's positives: narrow, ragged and widest rows, with weights and without."""
    numbers = ("weight", "parts", "sums", "taken", "counts", "scale", "row_lse", "loss", "slope", "logits", "share",
               "inner")  # fmt: skip
    for width, dtype in _WIDTHS:
        unit = math.gcd(16 // BYTES[dtype], width)
        types = {name: f"*{dtype}" for name in ("x", "q", "dq")} | dict.fromkeys(numbers, "*fp32")
        types |= dict.fromkeys(("group", "table", "members", "spoilt"), "*i64") | {"out": f"*{dtype}"}
        for kernel, tensors, more in (
            (class_positives.largest_kernel, 2, {"PARTS": 128}),
            (class_positives.add_to_class_kernel, class_positives.PAIR_TENSORS, {"PARTS": 128}),
            (class_positives.class_sums_kernel, 2, {"PARTS": 128}),
            (class_positives.class_odds_kernel, 4, {}),
            (class_positives.add_class_kernel, 8, {"PRECISION": "hardware"}),
        ):
            cut = positives.whole_rows(65536, width, tensors, chip)
            c = positives.constants(cut, unit) | more
            name = kernel.fn.__name__.removesuffix("_kernel").replace("_", " ")
            yield _item(name, kernel, c, cut, dtype, width, types)
            if "weight" in kernel.arg_names and width == 512:
                yield _item(name, kernel, c, cut, dtype, width, types, ("weight",))


def _linear_kernels(chip: str) -> Iterator[Compilation]:
    for operands, dtype, how in (
        ("half", "bf16", "ieee"), ("half", "fp16", "ieee"), ("tf32", "fp32", "tf32"), ("float", "fp32", "ieee"),
    ):  # fmt: skip
        for tile, width, _ in tiles("linear", chip, operands, False, (784,)):
            c = kernel_constants(tile, width, 16 // BYTES[dtype], how, True)
            types = {}
            if tile.descriptor:
                types = {
                    name: f"tensordesc<{dtype}[{side}, {tile.depth}]>"
                    for name, side in (("x", tile.rows), ("weight", tile.cols))
                }
            signature = _arguments(linear_goodness_kernel, c, dtype, types)
            yield Compilation("linear goodness", linear_goodness_kernel, signature, c, tile, dtype, width,
                              operands == "half")  # fmt: skip


def compilations(chip: str) -> Iterator[Compilation]:
    for dtype in BYTES:
        for item in _row_kernels(chip, dtype):
            yield item
            if dtype == "bf16":  # views of other tensors, which these kernels take as they are
                yield replace(item, name=f"{item.name} unaligned", aligned=False)
        yield from _pool_kernels(chip, dtype)
        yield from _many_kernels(chip, dtype)
        c = {"BLOCK": SCALE_BLOCK, "PRECISION": "hardware"}
        yield _item("scale", scale_kernel, c, None, dtype, 0, {"x": f"*{dtype}", "size": "i64"})
    yield from _unit_kernels(chip)
    yield from _positive_kernels(chip)
    yield from _class_kernels(chip)
    yield from _linear_kernels(chip)
    yield _item("add parts", add_parts_kernel, {"ROWS": 16, "SLOTS": 64}, None, "fp32", 0,
                {"out": "*fp32", "row_stride": "i64", "slot_stride": "i64", "factor": "fp32"})  # fmt: skip
    yield _item("pool finish", pool_finish_kernel, {"CHANNELS": 512}, None, "fp32", 512)

"""Compile every Triton kernel configuration that ``auto`` can choose, for every chip, without a GPU.

    python -m tools.kernels [--chips sm90,gfx942] [--only REGEX] [--jobs N] [--json FILE]

Prints a table: registers, spills, shared memory and the matrix instructions in the assembly. Exit status 1 where a
kernel spills to memory, needs more shared memory than its chip has, does not compile, multiplies 16-bit tiles on
sm_90 without wgmma or with a wait behind every wgmma, or where nothing was compiled. Disassembling takes as long as
compiling, so on NVIDIA chips the instructions are read from the PTX, of which ptxas makes one for one, and a kernel
without a stack has no spills; only the waits, which ptxas puts there, are read from the machine code.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ffcl_fast.backends.triton.config import SHARED_LIMIT, Tile

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Modules whose compilations(chip) yields what their family can launch there.
FAMILIES = ("tools.similarity_kernels", "tools.goodness_kernels")
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)[\w.:]*")
SHORTER = re.compile(r"\.(?:sync|aligned|row|col|cta_group::\d)\b")  # what every one of them has in its name
STATIC_SHARED = 1024  # what the driver keeps of a block's shared memory


@dataclass(frozen=True)
class Compilation:
    """One kernel to compile: `arguments` maps a name to its type, a tuple of types, or None where None is passed."""

    name: str
    kernel: Any
    arguments: dict[str, str | tuple[str, ...] | None]
    constants: dict[str, Any]
    tile: Any  # what the launch takes its options from: a Tile, another cut with `options`, or None
    dtype: str
    width: int
    matrix: bool  # must use the chip's matrix instructions
    aligned: bool = True  # whether tensors begin at a multiple of 16 bytes: views of others may not

    @property
    def key(self) -> tuple:
        """What the compiler sees of it."""
        options = self.tile.options if self.tile else {}
        parts = self.arguments, self.constants, options
        return (
            self.kernel.__name__,
            self.aligned,
            *(tuple(sorted((name, repr(x)) for name, x in part.items())) for part in parts),
        )


def describe(tile: Any) -> str:
    if not isinstance(tile, Tile):
        return "-" if tile is None else str(tile)
    text = f"{tile.rows}x{tile.cols}x{tile.depth} w{tile.warps} s{tile.stages}"
    text += f" r{tile.registers}" if tile.registers else ""
    return text + (" tma" if tile.descriptor else "")


def compile_one(chip: str, item: Compilation) -> dict:
    """Compile and read the assembly: a row of the table."""
    names = item.kernel.arg_names
    signature, constants = {}, {}
    for name in names:
        kind = None if name in item.constants else item.arguments[name]
        signature[name] = kind or "constexpr"
        if kind is None:
            constants[(names.index(name),)] = item.constants.get(name)
    # What the launcher would see at worst: strides count units and may be any number of them, but a panel's own.
    attributes = {}
    for i, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            if item.aligned:
                attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(kind))}
        elif name == "panel_stride" or (kind.startswith("*") and item.aligned):
            attributes[(i,)] = [["tt.divisibility", 16]]
    row: dict[str, Any] = {"chip": chip, "kernel": item.name, "dtype": item.dtype, "width": item.width}
    row["config"] = describe(item.tile)
    options = item.tile.options if item.tile else {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a failing compiler prints the whole assembly
            compiled = triton.compile(
                ASTSource(item.kernel, signature, constants, attributes), target=TARGETS[chip], options=options
            )
    except Exception as error:  # any failure of the compiler is a failed row, not the end of the table
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "fatal" in line), lines[-1])
        return row | {"problem": f"does not compile: {reason}"}
    row["shared"] = compiled.metadata.shared
    amd_chip = chip.startswith("gfx")
    row |= amd(compiled.asm["amdgcn"]) if amd_chip else nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
    found = problems(chip, item, row)
    return row | ({"problem": ", ".join(found)} if found else {})


def problems(chip: str, item: Compilation, row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel, from its row of the table."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] + (0 if chip.startswith("gfx") else STATIC_SHARED) > SHARED_LIMIT[chip]:
        found.append(f"shared memory over {SHARED_LIMIT[chip]}")
    if item.matrix and not row["matrix"]:
        found.append("no matrix instruction")
    # The rescue path may use the older instructions: it is off the usual way.
    elif item.matrix and chip == "sm90" and "wgmma" not in row["matrix"] and not item.name.startswith("finish"):
        found.append("no wgmma")
    if row.get("serialized"):
        found.append("a wait behind every wgmma (ptxas -v says why)")
    return found


def nvidia(ptx: str, cubin: bytes) -> dict:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [tools / "cuobjdump", flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        local = int(re.search(r"STACK:(\d+)", usage)[1]) or int(re.search(r"LOCAL:(\d+)", usage)[1])
        machine_code = dump("-sass") if local or "wgmma" in ptx else ""
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", machine_code)) if local else 0,
        "matrix": matrix_instructions(ptx),
        "serialized": serialized(machine_code),
    }


def serialized(machine_code: str) -> bool:
    """Whether ptxas took the asynchronous products one by one: then each begins a group of its own."""
    products = len(re.findall(r"\bHGMMA\b", machine_code))
    groups = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", machine_code))
    return products > 1 and 2 * groups > products


def amd(assembly: str) -> dict:
    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    # Scalar registers spill into lanes of vector registers, not into memory; only vector spills count.
    return {
        "registers": read("vgpr_count"),
        "spills": read("vgpr_spill_count"),
        "matrix": matrix_instructions(assembly),
    }


def matrix_instructions(assembly: str) -> str:
    found = collections.Counter(SHORTER.sub("", match.group(0)) for match in MATRIX.finditer(assembly))
    return " ".join(f"{count} {name}" for name, count in found.most_common(2))


def work(task: tuple[str, str, int]) -> dict:
    """Compile item `index` of a family: kernels do not pickle, their position does."""
    family, chip, index = task
    started = time.monotonic()
    row = compile_one(chip, items(family, chip)[index])
    return row | {"seconds": round(time.monotonic() - started, 2)}


@functools.cache
def items(family: str, chip: str) -> list[Compilation]:
    """What a family can launch on a chip, each kernel once: sizes that are arguments do not make another."""
    different = {item.key: item for item in reversed(list(importlib.import_module(family).compilations(chip)))}
    return list(reversed(different.values()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(TARGETS), help="comma-separated, of %(default)s")
    parser.add_argument("--only", default="", help="regular expression on 'kernel dtype width config'")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args(arguments)
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only: {options.only!r} is no regular expression: {error}")
    chips = options.chips.split(",")
    if unknown := set(chips) - set(TARGETS):
        parser.error(f"--chips: {', '.join(sorted(unknown))} is none of {', '.join(TARGETS)}")
    tasks = [
        (family, chip, index)
        for chip in chips
        for family in FAMILIES
        for index, item in enumerate(items(family, chip))
        if re.search(options.only, f"{item.name} {item.dtype} {item.width} {describe(item.tile)}")
    ]
    columns = ("chip", "kernel", "dtype", "width", "config", "registers", "spills", "shared", "matrix", "problem")
    sizes = (6, 18, 5, 5, 24, 9, 6, 7, 40, 0)
    print(" ".join(name.ljust(size) for name, size in zip(columns, sizes, strict=True)))
    rows = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for row in pool.imap(work, tasks):
            rows.append(row)
            cells = (str(row.get(name, "")).ljust(size) for name, size in zip(columns, sizes, strict=True))
            print(" ".join(cells).rstrip(), flush=True)
    if options.json:
        partial = options.json.with_suffix(".tmp")
        partial.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
        partial.replace(options.json)
    bad = sum("problem" in row for row in rows)
    print(f"{len(rows)} kernels, {bad} with a problem (Triton {triton.__version__})")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

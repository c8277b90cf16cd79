"""Read the machine code of every CUDA C++ kernel in the compiled module, without a GPU.

    python -m tools.cuda_kernels [--module FILE] [--only REGEX] [--json FILE]

Prints a table: registers, stack, spills, and the instructions each kernel was written for. Exit status 1 where a kernel
spills or has a stack, where one that should load or store 16 bytes at a time does not, where the tensor-core kernels
lack their matrix instruction (HMMA, on sm_90a HGMMA) or their loads (cp.async, on sm_90a TMA with multicast), where one
is not among EXPECTED, and where a kernel or a whole architecture that the module was built for is not there. Needs the
module built with nvcc, and Triton's package for cuobjdump.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# What the machine code of a kernel must hold. The names in PACKED are asked only of kernels cut into packs of 16 bytes,
# the rest always.
EXPECTED = {
    "over_rows": ("128",),
    "many_rows": ("128",),
    "pair_forward": ("128", "copies"),
    "pair_backward": ("128",),
    "scale_kernel": ("128",),
    "pool_warp": ("128",),
    "pool_staged": ("128",),
    "pool_last": ("128",),
    "pool_finish": (),
    "pool_backward": ("128",),
    "largest_norms": ("128",),
    "finish": ("128",),
    "ranges_of": (),
    "vectors_of": (),
    "sums80": (r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128", r"LDSM"),
    "panel80": (r"HMMA\.16816\.F32", r"LDGSTS\.E\.BYPASS\.128", r"LDSM", r"STG\.E\.128"),
    "sums90": (r"HGMMA", r"UTMALDG\.2D\.MULTICAST", r"USETMAXREG"),
    "panel90": (r"HGMMA", r"UTMALDG\.2D\.MULTICAST", r"USETMAXREG", r"STG\.E\.128"),
}
PACKED = {
    "128": ("no 16-byte loads", r"\bLDG(?:\.E)?[.\w]*\.128"),
    "copies": ("no 16-byte copies", r"\bLDGSTS\.E\.BYPASS\.128"),
}
# Stores of less than 16 bytes that kernels cut into packs may have: the one number or the few of a row. nvcc makes four
# of one store where it cannot tell that they do not overlap others.
NARROW_STORES = {"over_rows": 1, "many_rows": 2, "pair_forward": 4, "pair_backward": 0, "scale_kernel": 0,
                 "pool_backward": 0}  # fmt: skip
NARROW_STORE = r"\bSTG\.E(?![.\w]*\.128)"
OURS = "4ffcl"  # the namespace, in a mangled name
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
SHOWN = re.compile(r"\b(HGMMA|HMMA|UTMALDG\.2D\.MULTICAST|LDGSTS\.E\.BYPASS\.128|LDG\.E\.128|STG\.E\.128)")


def describe(symbol: str) -> tuple[str, str, list[int], str] | None:
    """(kernel, dtype, integer template arguments, template template argument) of a mangled name; None for no kernel of
    ours."""
    for name in sorted(EXPECTED, key=len, reverse=True):
        found = re.search(rf"(?:_cu_[0-9a-f]{{8}}|(?<!\d)){len(name)}{name}(I.*)?E", symbol)
        if not found:
            continue
        arguments = found[1] or ""
        dtype = "fp16" if "6__half" in arguments else "bf16" if "13__nv_bfloat16" in arguments else "fp32"
        inner = re.search(r"(Forward|Backward)", arguments)
        return name, dtype, [int(n) for n in re.findall(r"L[ib](\d+)E", arguments)], inner[1].lower() if inner else ""
    return None


def sections(listing: str, pattern: str) -> list[tuple[str, str, str]]:
    """(architecture, function, text) for each function of a cuobjdump listing."""
    chip, found = "", []
    for line in listing.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            chip = match[1]
        elif match := re.match(pattern, line):
            found.append([chip, match[1], []])
        elif found:
            found[-1][2].append(line)
    return [(chip, name, "\n".join(lines)) for chip, name, lines in found]


def row_of(chip: str, symbol: str, usage: str, sass: str) -> dict | None:
    """A row of the table."""
    known = describe(symbol)
    if known is None:
        unknown = {"chip": chip, "kernel": symbol, "dtype": "", "config": "", "problem": "not among EXPECTED"}
        return unknown if OURS in symbol else None
    name, dtype, numbers, inner = known
    row = {"chip": chip, "kernel": f"{name} {inner}".strip(), "dtype": dtype}
    row["config"] = "x".join(map(str, numbers)) or "-"
    for column, key in (("registers", "REG"), ("stack", "STACK"), ("shared", "SHARED")):
        row[column] = int(re.search(rf"\b{key}:(\d+)", usage)[1])
    row["spills"] = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    counts = collections.Counter(match[1] for match in SHOWN.finditer(sass))
    row["instructions"] = " ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    problems = [f"{row[what]} {what}" for what in ("spills", "stack") if row[what]]
    packed = not numbers or numbers[0] * SIZES[dtype] == 16
    for wanted in EXPECTED[name]:
        if wanted in PACKED:
            problem, pattern = PACKED[wanted]
            if packed and not re.search(pattern, sass):
                problems.append(problem)
        elif not re.search(wanted, sass):
            problems.append("no " + wanted.replace("\\", ""))
    narrow = len(re.findall(NARROW_STORE, sass))
    if packed and narrow > NARROW_STORES.get(name, narrow):
        problems.append(f"{narrow} stores of less than 16 bytes, of at most {NARROW_STORES[name]}")
    return row | ({"problem": ", ".join(problems)} if problems else {})


def chips_of(archs: Sequence[str]) -> set[str]:
    """The chips that a build for ``archs``, as CMake writes them, holds machine code of."""
    return {f"sm_{arch.removesuffix('-real')}" for arch in archs if not arch.endswith("-virtual")}


def missing(rows: list[dict], built_for: Iterable[str] = ()) -> list[str]:
    """Kernels of which a chip has none, where it should: a name that is no longer understood is not a kernel less.
    ``built_for``: chips that must be there."""
    seen = {(row["chip"], row["kernel"].split()[0]) for row in rows}
    chips = sorted({chip for chip, _ in seen} | set(built_for))
    wanted = [(chip, name) for chip in chips for name in EXPECTED if not name.endswith("90") or chip == "sm_90a"]
    return [f"{chip} {name}" for chip, name in wanted if (chip, name) not in seen]


def table(module: Path) -> list[dict]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, sass = (
        subprocess.run([tool, flag, module], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    code = {(chip, name): text for chip, name, text in sections(sass, r"\s*Function : (\S+)")}
    rows = [
        row_of(chip, name, text, code[chip, name]) for chip, name, text in sections(usage, r"\s*Function (\S+):\s*$")
    ]
    return sorted(filter(None, rows), key=lambda r: (r["chip"], r["kernel"], r["dtype"], r["config"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=Path, help="the compiled module (default: ffcl_fast._native)")
    parser.add_argument("--only", default="", help="regular expression on 'chip kernel dtype config'")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args(arguments)
    built_for: set[str] = set()
    if options.module is None:
        from ffcl_fast.backends import native

        if native.module is None or not native.module.cuda_built():
            print("ffcl_fast._native was built without the CUDA kernels: nothing to read")
            return 0
        options.module = Path(native.module.__file__)
        built_for = chips_of(native.module.build_info()["cuda_archs"])
    elif not options.module.is_file():
        parser.error(f"--module: there is no file {options.module}")
    found = table(options.module)
    rows = [
        row
        for row in found
        if re.search(options.only, " ".join(str(row[c]) for c in ("chip", "kernel", "dtype", "config")))
    ]
    columns = ("chip", "kernel", "dtype", "config", "registers", "stack", "spills", "shared", "instructions", "problem")
    sizes = (7, 20, 5, 10, 9, 5, 6, 6, 60, 0)
    for row in ({column: column for column in columns}, *rows):
        print(" ".join(str(row.get(c, "")).ljust(size) for c, size in zip(columns, sizes, strict=True)).rstrip())
    if options.json:
        partial = options.json.with_suffix(".tmp")
        partial.write_text(json.dumps({"rows": rows}, indent=1))
        partial.replace(options.json)
    bad, absent = sum("problem" in row for row in rows), missing(found, built_for)
    chips = ", ".join(sorted({row["chip"] for row in rows}))
    print(f"{len(rows)} kernels, {bad} with a problem (CUDA C++; {chips})")
    if absent:
        print(f"not found in the module: {', '.join(absent)}", file=sys.stderr)
    return 1 if bad or absent or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

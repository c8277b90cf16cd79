"""``python -m tools.kernels``: it fails on what it is there to find, and its list leaves out no tile."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from ffcl_fast.backends.triton import config  # noqa: E402
from ffcl_fast.backends.triton.config import Tile  # noqa: E402
from tools import kernels  # noqa: E402
from tools.kernels import Compilation, compile_one, problems  # noqa: E402


@triton.jit
def product_kernel(x, y, out, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    row, col, depth = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for d in range(0, 4 * DEPTH, DEPTH):
        a = tl.load(x + row[:, None] * 4 * DEPTH + depth[None, :] + d)
        b = tl.load(y + col[:, None] * 4 * DEPTH + depth[None, :] + d)
        acc = tl.dot(a, b.T, acc)
    tl.store(out + row[:, None] * COLS + col[None, :], acc)


def item(tile: Tile, name: str = "product", arguments: dict | None = None) -> Compilation:
    constants = {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth}
    types = {"x": "*bf16", "y": "*bf16", "out": "*fp32"} | (arguments or {})
    return Compilation(name, product_kernel, types, constants, tile, "bf16", 4 * tile.depth, True)


GOOD = Tile(64, 64, 64, 4, 2)


def test_a_good_kernel_has_no_problem():
    row = compile_one("sm90", item(GOOD))
    assert "problem" not in row and "wgmma" in row["matrix"] and row["spills"] == 0 and row["registers"] > 16


@pytest.mark.parametrize(
    "tile, problem",
    [
        (Tile(128, 256, 32, 4, 2), r"[1-9]\d* spills"),  # 256 sums a thread, and it has 255 registers
        (Tile(16, 64, 64, 4, 2), "no wgmma"),  # it multiplies 64 rows at least
        (Tile(128, 256, 128, 8, 4), "shared memory over 232448"),
    ],
    ids=["spill", "no wgmma", "shared memory"],
)
def test_a_bad_kernel_fails(tile, problem):
    row = compile_one("sm90", item(tile))
    assert re.search(problem, row.get("problem", "none")), row


def test_a_wait_behind_every_product_fails():
    rows = next(
        k for k in kernels.items("tools.similarity_kernels", "sm90") if k.name == "rows both" and k.width == 128
    )
    assert "problem" not in compile_one("sm90", rows)
    assert (
        "a wait behind every wgmma"
        in compile_one("sm90", replace(rows, constants=rows.constants | {"SETTLE": False}))["problem"]
    )


def test_a_kernel_that_does_not_compile_is_a_row():
    row = compile_one("sm90", item(GOOD, arguments={"out": "*bf16", "y": "*fp32"}))
    assert row["problem"].startswith("does not compile")


def test_the_assembler_s_own_words_are_the_problem():
    row = compile_one("sm90", item(Tile(128, 128, 32, 4, 2, registers=32)))
    assert "Insufficient registers" in row["problem"]


def test_what_counts_as_a_problem():
    fine = {"spills": 0, "shared": 1000, "matrix": "8 wgmma.mma_async.m64n64k16.f32.bf16.bf16"}
    kernel = item(GOOD)
    assert problems("sm90", kernel, fine) == []
    assert problems("sm90", kernel, fine | {"spills": 3}) == ["3 spills"]
    assert problems("sm90", kernel, fine | {"serialized": False}) == []
    assert problems("sm90", kernel, fine | {"serialized": True}) == ["a wait behind every wgmma (ptxas -v says why)"]
    assert problems("sm90", kernel, fine | {"matrix": ""}) == ["no matrix instruction"]
    assert problems("sm90", kernel, fine | {"matrix": "8 mma.m16n8k16.f32.bf16.bf16.f32"}) == ["no wgmma"]
    assert problems("sm80", kernel, fine | {"matrix": "8 mma.m16n8k16.f32.bf16.bf16.f32"}) == []
    assert problems("sm90", item(GOOD, "finish + rescue"), fine | {"matrix": "8 mma.m16n8k16.f32.bf16.bf16.f32"}) == []
    for chip, limit in config.SHARED_LIMIT.items():
        kept = 0 if chip.startswith("gfx") else kernels.STATIC_SHARED  # by the driver
        assert not any("shared" in p for p in problems(chip, kernel, fine | {"shared": limit - kept}))
        assert any("shared" in p for p in problems(chip, kernel, fine | {"shared": limit - kept + 1}))


@pytest.mark.parametrize("problem", [None, "2 spills"])
def test_the_exit_status_and_the_table_say_so(problem, monkeypatch, tmp_path, capsys):
    row = {"chip": "sm90", "kernel": "sums", "dtype": "bf16", "width": 512, "config": "-", "seconds": 0.1}
    monkeypatch.setattr(kernels, "work", lambda task: row | ({"problem": problem} if problem else {}))
    monkeypatch.setattr(kernels.multiprocessing, "get_context", lambda kind: Serial)
    path = tmp_path / "rows.json"
    status = kernels.main(["--chips", "sm90", "--only", "^norms", "--json", str(path)])
    assert status == (1 if problem else 0)
    assert f"1 kernels, {1 if problem else 0} with a problem" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert kernels.main(["--chips", "sm90", "--only", "no such kernel"]) == 1  # nothing compiled shows nothing


class Serial:
    """multiprocessing's pool in this process."""

    def __init__(self, jobs: int) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    @staticmethod
    def imap(function, tasks):
        return map(function, tasks)

    Pool = classmethod(lambda cls, jobs: cls(jobs))


@pytest.mark.parametrize("chip", kernels.TARGETS)
def test_the_list_leaves_out_no_tile_and_no_argument(chip):
    """Each (kernel, tile) that the table of tiles can give for any width is in the list."""
    listed = [kernel for family in kernels.FAMILIES for kernel in kernels.items(family, chip)]
    for kernel in listed:
        assert set(kernel.arguments) | set(kernel.constants) == set(kernel.kernel.arg_names), kernel.name
    names = {"forward": "sums both", "triangle": "sums triangle", "panel": "panel both", "siglip": "siglip",
             "rows": "rows both", "online": "finish", "linear": "linear"}  # fmt: skip
    compiled = [(f"{k.name} ", k.dtype, k.tile) for k in listed if isinstance(k.tile, Tile)]
    found = {(name, dtype, tile) for text, dtype, tile in compiled for name in names.values() if text.startswith(name)}
    widths = {"rows": range(1, config.REGISTER_WIDTH + 1)}
    for (op, name), operands in itertools.product(names.items(), ("half", "tf32", "float")):
        first = config.REGISTER_WIDTH + 1 if op == "panel" and operands == "half" else 1
        for width in widths.get(op, (*range(first, 600), *range(600, config.MAX_WIDTH + 1, 61), config.MAX_WIDTH)):
            for ids in (False, True) if op in ("forward", "triangle", "panel", "rows") else (False,):
                if op != "rows" or operands == "half":
                    for tile in config.candidates(op, chip, operands, width, ids):
                        dtype = "bf16" if operands == "half" else "fp32"
                        assert (name, dtype, tile) in found, f"{op} {operands} {width}: {tile}"

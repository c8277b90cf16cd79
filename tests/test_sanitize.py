"""csrc/'s CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

A program of its own (tests/sanitize/), without Python and PyTorch, runs them on random ragged problems: gaps between
rows and everything beside a buffer is poisoned, fresh memory holds NaN, and results are compared with double precision.
`make sanitize` runs this; `make test` does not.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import build

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GCC's sanitizers are for Linux")

# 0xff bytes are NaN in every dtype: memory that is read before it was written shows in a result.
OPTIONS = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
# Problems of each kind: small ones, ones of several panels and tasks, and threads that call at once.
SIZES = {"address": (60, 3, 1), "thread": (3, 1, 3)}


@pytest.fixture(scope="session", params=("address", "thread"))
def driver(request: pytest.FixtureRequest) -> tuple[str, Path]:
    folder = build(f"sanitize-{request.param}", FFCL_SANITIZE=request.param)
    return request.param, folder / "driver"


def _openmp(sanitizer: str, folder: Path) -> str:
    """GNU OpenMP itself; where threads are watched, a stand-in whose synchronisation ThreadSanitizer can see."""
    if sanitizer == "thread":
        return str(folder / "libopenmp.so")
    found = subprocess.run(
        ["g++", "-print-file-name=libgomp.so.1"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(found).is_absolute(), "g++ has no libgomp.so.1"
    return found


@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512", "portable_bf16", "avx512_bf16", "portable_amx"))
@pytest.mark.parametrize("threads", ("std", "openmp"))
def test_kernels(driver: tuple[str, Path], isa: str, threads: str, seed: int) -> None:
    sanitizer, program = driver
    command = [str(program), str(seed), *map(str, SIZES[sanitizer])]
    if threads == "openmp":
        command.append(_openmp(sanitizer, program.parent))
    if sanitizer == "thread" and shutil.which("setarch"):
        # GCC 12's ThreadSanitizer knows fewer places for a mapping than newer kernels choose from.
        command = ["setarch", platform.machine(), "-R", *command]
    done = subprocess.run(command, env={**os.environ, **OPTIONS, "FFCL_ISA": isa}, capture_output=True, text=True)
    if "this processor has" in done.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert done.returncode == 0, done.stderr[-6000:] + done.stdout
    assert done.stdout.splitlines()[-1] == f"{isa}: 0 wrong" and not done.stderr, done.stderr

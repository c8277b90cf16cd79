"""The CUDA kernels on the CPU: csrc/*.cu compiled as C++ against tests/emulation/, behind ``backend="cuda"``."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ffcl_fast.backends import cuda, native

ROOT = Path(__file__).resolve().parent.parent
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block may ask for


def _tool(package: str, attribute: str) -> str:
    folder = getattr(pytest.importorskip(package), attribute)
    return str(Path(folder) / package)


def build(name: str, **options: str) -> Path:
    """The folder build/``name`` with what CMakeLists.txt describes for these ``options``, built anew where sources have
    changed."""
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    work = ROOT / "build" / name
    work.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(work),
        **options,
    }
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *(f"-D{k}={v}" for k, v in options.items())]
    with (work / "lock").open("w") as lock:  # every worker of pytest-xdist comes here
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(work)]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return work


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The module of tests/emulation/module.cpp, built by CMake where its sources have changed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulator needs Linux's contexts")
    pybind11 = pytest.importorskip("pybind11")
    work = build(
        f"emulation-{sys.implementation.cache_tag}",
        Python_EXECUTABLE=sys.executable,
        pybind11_DIR=pybind11.get_cmake_dir(),
        FFCL_EMULATED="ON",
    )
    (path,) = work.glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``backend="cuda"`` takes CPU tensors and runs them in the emulator, as a device of compute capability 9.0."""
    monkeypatch.setattr(native, "module", emulated_module)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    use(emulated_module, 90)
    yield emulated_module


def use(module: ModuleType, capability: int, processors: int = 2, shared: int | None = None) -> None:
    """Emulate another device."""
    cuda.chip.cache_clear()
    cuda.emulated = cuda.Chip(capability, processors)
    module.set_device(capability, processors, SHARED[capability] if shared is None else shared)

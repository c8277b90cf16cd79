"""Builds ``ffcl_fast._native`` by CMake and Ninja; everything else about the package is in pyproject.toml.

Environment: FFCL_CUDA=0 leaves the CUDA kernels out, FFCL_CUDA=1 insists on them, unset compiles them where nvcc is
found; FFCL_CUDA_ARCHS names their architectures as CMake does (default "80;90a;100", less those nvcc does not know).
FFCL_LOCAL_VERSION=1, for wheels, tells in the version what was compiled: 0.1.0+cu130, or 0.1.0+cpu.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "90a", "100")


class BuildError(SetupError):
    """The native module cannot be built as asked; the message says what to change."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: its own nvcc (no wrapper), its version, the architectures it compiles for ("80", "90", ...)."""

    nvcc: Path
    version: str
    archs: tuple[str, ...]


def candidates(env: Mapping[str, str], system: Path = Path("/usr/local")) -> list[Path]:
    """Where an nvcc may be: CUDACXX, CUDA_HOME, CUDA_PATH, the PATH, then versioned folders, newest first."""
    found = [Path(env["CUDACXX"])] if env.get("CUDACXX") else []
    found += [Path(env[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    on_path = shutil.which("nvcc", path=env.get("PATH", ""))
    found += [Path(on_path)] if on_path else []

    def version(folder: Path) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", folder.name)]

    found += [folder / "bin" / "nvcc" for folder in sorted(system.glob("cuda*"), key=version, reverse=True)]
    return found


def inspect(nvcc: Path) -> Toolkit | None:
    """The toolkit behind ``nvcc``, or None if it cannot be run or its toolkit lacks the headers.

    An nvcc on the PATH may be a wrapper script in a folder that says nothing about the toolkit, so the compiler itself
    is asked where it lives.
    """
    if not os.access(nvcc, os.X_OK):
        return None
    plan = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if not top or not version:
        return None
    root = Path(top[1].strip()).resolve()
    own = root / "bin" / "nvcc"
    headers = [root / "include", *root.glob("targets/*/include")]
    if not own.exists() or not any((folder / "cuda_runtime.h").exists() for folder in headers):
        return None
    return Toolkit(own, version[1], tuple(re.findall(r"sm_(\d+)", _output(own, "--list-gpu-code"))))


def find_toolkit(env: Mapping[str, str], places: list[Path] | None = None) -> tuple[Toolkit | None, str]:
    """``(toolkit, message)`` that FFCL_CUDA asks for; the toolkit is None for a build without CUDA.

    Raises BuildError where FFCL_CUDA=1 and there is no usable nvcc, or where FFCL_CUDA is neither 0, 1 nor empty.
    """
    wanted = env.get("FFCL_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FFCL_CUDA must be 0, 1 or unset; got {wanted!r}")
    if wanted == "0":
        return None, "CUDA kernels left out: FFCL_CUDA=0"
    places = candidates(env) if places is None else places
    for place in places:
        toolkit = inspect(place)
        if toolkit:
            return toolkit, f"CUDA kernels: nvcc {toolkit.version}, {toolkit.nvcc}"
    looked = ", ".join(map(str, places)) or "the PATH, CUDA_HOME and /usr/local/cuda*"
    if wanted == "1":
        raise BuildError(
            f"FFCL_CUDA=1 asks for the CUDA kernels, but no working nvcc was found (looked at {looked}). Install the"
            " CUDA toolkit, or point CUDA_HOME at it, or set FFCL_CUDA=0 to build for the CPU alone."
        )
    return None, f"CUDA kernels left out: no working nvcc (looked at {looked}); the CPU kernels are built"


def choose_archs(env: Mapping[str, str], toolkit: Toolkit) -> str:
    """CMake's list of architectures: FFCL_CUDA_ARCHS as given, else the defaults that this nvcc knows."""
    given = env.get("FFCL_CUDA_ARCHS", "").replace(",", ";").replace(" ", "")
    if not given:
        return ";".join(arch for arch in DEFAULT_ARCHS if arch.rstrip("a") in toolkit.archs)
    for arch in given.split(";"):
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?", arch):
            raise BuildError(f"FFCL_CUDA_ARCHS must be like '80;90a;100'; got {env['FFCL_CUDA_ARCHS']!r}")
    return given


def version(env: Mapping[str, str], places: list[Path] | None = None) -> str:
    """The distribution's version; where FFCL_LOCAL_VERSION=1 with what is compiled as its local part.

    Raises BuildError where FFCL_LOCAL_VERSION is neither 0, 1 nor empty, and what find_toolkit raises.
    """
    wanted = env.get("FFCL_LOCAL_VERSION", "")
    if wanted not in ("", "0", "1"):
        raise BuildError(f"FFCL_LOCAL_VERSION must be 0, 1 or unset; got {wanted!r}")
    if wanted != "1":
        return public_version()
    toolkit, _ = find_toolkit(env, places)
    return f"{public_version()}+{'cu' + toolkit.version.replace('.', '') if toolkit else 'cpu'}"


def public_version() -> str:
    """ffcl_fast.__version__, without importing the package, which needs torch."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "ffcl_fast" / "__init__.py").read_text(), re.MULTILINE)[1]


def _output(*command: object) -> str:
    """What a command prints on stdout and stderr; nothing where it cannot be started."""
    try:
        return subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _tool(name: str, folder_attribute: str) -> str:
    """An executable from the PyPI package of that name, else from the PATH."""
    try:
        path = Path(getattr(__import__(name), folder_attribute)) / name
        if path.exists():
            return str(path)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if not found:
        raise BuildError(f"{name} was not found: pip install {name}, or leave out --no-build-isolation")
    return found


class CMakeBuild(build_ext):
    """build_ext that hands csrc/ to CMake; its folder stays in build/, which makes a second build incremental."""

    def copy_extensions_to_source(self) -> None:
        # A running process may have the old file mapped: give the new one a new inode instead of writing over it.
        for ext in self.extensions:
            Path(self.get_finalized_command("build_py").get_package_dir("ffcl_fast"), self._file_name(ext)).unlink(True)
        super().copy_extensions_to_source()

    def _file_name(self, ext: Extension) -> str:
        return Path(self.get_ext_filename(ext.name)).name

    def toolkit(self) -> Toolkit | None:
        """The CUDA toolkit to build with, after telling the choice: a warning where nobody asked for the CPU alone."""
        toolkit, message = find_toolkit(os.environ)
        asked = toolkit or os.environ.get("FFCL_CUDA") == "0"
        self.announce(f"ffcl_fast: {message}", level=logging.INFO if asked else logging.WARNING)
        return toolkit

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        toolkit = self.toolkit()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        kind = f"cuda{toolkit.version}" if toolkit else "cpu"
        work = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-{kind}"
        work.mkdir(parents=True, exist_ok=True)
        cmake = _tool("cmake", "CMAKE_BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": _tool("ninja", "BIN_DIR"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FFCL_VERSION": public_version(),
            "FFCL_CUDA": "ON" if toolkit else "OFF",
        }
        if toolkit:
            options["CMAKE_CUDA_COMPILER"] = toolkit.nvcc
            options["FFCL_CUDA_ARCHS"] = choose_archs(os.environ, toolkit)
        configure = [cmake, "-G", "Ninja", "-S", ROOT, "-B", work, *(f"-D{k}={v}" for k, v in options.items())]
        for command in (configure, [cmake, "--build", work]):
            try:
                subprocess.run([str(part) for part in command], check=True)
            except subprocess.CalledProcessError as error:
                hint = " FFCL_CUDA=0 builds without the CUDA kernels." if toolkit else ""
                raise BuildError(f"CMake failed (its messages are above).{hint}") from error


if __name__ == "__main__":
    # The kernels use GCC's and Clang's vector extensions. Elsewhere the package runs on plain PyTorch.
    native = [] if sys.platform == "win32" else [Extension("ffcl_fast._native", sources=[])]
    setup(version=version(os.environ), ext_modules=native, cmdclass={"build_ext": CMakeBuild})

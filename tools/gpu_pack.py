"""Rivals of `make gpu-check` for a GPU machine that has PyTorch, a compiler and pytest but no network: their wheels,
beside a script that installs them there, builds the kernels and runs the check.

    python -m tools.gpu_pack [--to .gpu] [--python 3.12] [--build PYTHON]     here
    sh .gpu/check.sh [OPTIONS of tools.gpu_check]            there, in a copy of the tree that has .gpu/ with it

--build names a Python of that version here, with its headers: the native module is compiled with it and goes along, so
that the GPU's time is not spent on it. Libraries without a wheel for that Python are named and left out: the table says
"not installed" of them. Exit status 1 where there is none at all.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .files import write_text
from .gpu_check import ROOT
from .gpu_measure import commit

# Without what they need in turn, which PyTorch's own surroundings have, but for ftfy and its wcwidth.
LIBRARIES = (
    "memeff", "inf-cl", "open-clip-torch", "ftfy", "wcwidth", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "siglip-kernel", "lightly", "pytorch-metric-learning", "info-nce-pytorch",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SCRIPT = """\
#!/bin/sh
# Written by tools/gpu_pack.py: run it in the repository, on the machine with the GPU.
set -e
here=$(dirname "$0")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$here"/*.whl
export PYTHONPATH="$site" FFCL_COMMIT={commit}
loads="import sys; from ffcl_fast.backends import native; sys.exit(not (native.module and native.module.cuda_built()))"
if ! {{ cp "$here"/_native*.so ffcl_fast/ && python3 -c "$loads"; }} 2>/dev/null; then
    rm -f ffcl_fast/_native*.so
    FFCL_CUDA=1 python3 setup.py -q build_ext --inplace
fi
python3 -m tools.gpu_check "$@"
"""


def download(library: str, folder: Path, python: str) -> str | None:
    """One wheel, without what it needs; the reason where there is none."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder),
        *(f"--platform={name}" for name in PLATFORMS), library,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), f"pip gave {done.returncode}")


def build(python: str, folder: Path) -> None:
    """The native module by the interpreter ``python``, with CUDA kernels for the usual chips."""
    environment = {name: value for name, value in os.environ.items() if name != "FFCL_CUDA_ARCHS"}
    environment |= {"FFCL_CUDA": "1", "PIP_CONSTRAINT": "constraints.txt"}  # the build tools' versions too
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, "."]
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("ffcl_fast/_native"):
                    (folder / Path(name).name).write_bytes(archive.read(name))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_pack", description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(".gpu"), help="its wheels are replaced (default %(default)s)")
    parser.add_argument("--python", default="3.12", help="the GPU machine's (default %(default)s)")
    parser.add_argument("--build", metavar="PYTHON", help="compile the native module too, with this interpreter")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for old in options.to.glob("_native*.so"):
        old.unlink()
    if options.build:
        build(options.build, options.to)
    with tempfile.TemporaryDirectory(dir=options.to) as scratch:
        for library in LIBRARIES:
            if problem := download(library, Path(scratch), options.python):
                print(f"{library}: left out: {problem}")
        wheels = sorted(Path(scratch).glob("*.whl"))
        if not wheels:
            return 1
        for old in options.to.glob("*.whl"):
            old.unlink()
        for wheel in wheels:
            wheel.rename(options.to / wheel.name)
    write_text(options.to / "check.sh", SCRIPT.format(commit=shlex.quote(commit() or "unknown")))
    size = sum(path.stat().st_size for path in options.to.iterdir())
    what = f"{len(wheels)} wheels, {'the native module, ' if options.build else ''}check.sh"
    print(f"{what} in {options.to}, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

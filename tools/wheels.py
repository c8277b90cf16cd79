"""Build the sdist, and from it, as an installer would, a CPU wheel and, where there is an nvcc, a CUDA wheel.

    python -m tools.wheels [--dist dist]

The CUDA wheel has the CUDA version in its own (0.1.0+cu130), so that the two can lie side by side; the sdist and the
CPU wheel have no such part. FFCL_CUDA=0 makes no CUDA wheel, FFCL_CUDA=1 insists on it; FFCL_CUDA_ARCHS as in setup.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import setup

ROOT = Path(__file__).resolve().parent.parent


def kinds(env: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What is to be built, with its changes of the environment. Raises setup.BuildError as setup.find_toolkit does."""
    toolkit, message = setup.find_toolkit(env)
    print(f"wheels: {message}", flush=True)
    found = {"CPU": {"FFCL_CUDA": "0", "FFCL_LOCAL_VERSION": "0"}}
    return found | ({"CUDA": {"FFCL_CUDA": "1", "FFCL_LOCAL_VERSION": "1"}} if toolkit else {})


def build(source: Path, what: str, dist: Path, changes: Mapping[str, str]) -> None:
    """``what``, "sdist" or "wheel", of the sources in a folder."""
    # the build tools are those of this environment, which constraints.txt pins
    command = [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", dist, source]
    subprocess.run([str(part) for part in command], env={**os.environ, **changes}, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="its wheels and sdists are replaced")
    dist = parser.parse_args().dist.resolve()
    try:
        wanted = kinds(os.environ)
    except setup.BuildError as error:
        raise SystemExit(f"wheels: {error}") from None
    for old in (*dist.glob("*.whl"), *dist.glob("*.tar.gz")):
        old.unlink()
    try:
        build(ROOT, "sdist", dist, {"FFCL_LOCAL_VERSION": "0"})
        (sdist,) = dist.glob("*.tar.gz")
        for changes in wanted.values():
            with tempfile.TemporaryDirectory() as scratch, tarfile.open(sdist) as archive:
                archive.extractall(scratch, filter="data")
                build(Path(scratch, sdist.name.removesuffix(".tar.gz")), "wheel", dist, changes)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

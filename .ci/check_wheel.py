"""Install the wheel that was built from the sdist where there is no compiler, and run the sdist's tests against it.

    python .ci/check_wheel.py [--dist dist] [pytest arguments]

The new environment has its own pip and nothing else: torch and the tests' packages are lent from the environment that
runs this, through a path file that does not bring that one's editable ffcl_fast along. Its PATH holds the environment's
own programs only. Exit status: that of the first step that failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TESTS = (
    "test_build.py", "test_cli.py", "test_functional.py", "test_goodness.py", "test_losses.py", "test_nn.py",
    "test_ops.py", "test_pair_cosine.py", "test_similarity_cpu.py",
)  # fmt: skip
# PyTorch's own default compiler needs a C++ compiler on a CPU; the others take minutes and depend on no packaging.
LEFT_OUT = "not inductor and not instruction_set and not ctrl_c and not evaluate_repeats"
NEEDED = ("ffcl_fast/py.typed", "ffcl_fast/_native", "ffcl_fast/backends/triton/tiles.py", "/entry_points.txt")
FOREIGN = ("tests/", "benchmarks/", "csrc/", "tools/", "docs/")
PROBE = """
import pathlib, shutil, sys
import ffcl_fast
from ffcl_fast import _native
assert pathlib.Path(ffcl_fast.__file__).is_relative_to(sys.prefix), ffcl_fast.__file__
found = [name for name in ("cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja") if shutil.which(name)]
assert not found, f"a compiler is on the PATH: {found}"
print(ffcl_fast.__version__, _native.build_info())
"""


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"check_wheel: expected one {pattern} in {folder}, found {[p.name for p in found]}")
    return found[0]


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [part for part in NEEDED if not any(part in name for name in names)]
    foreign = [name for name in names if name.startswith(FOREIGN)]
    if missing or foreign:
        raise SystemExit(f"check_wheel: {wheel.name} lacks {missing} and should not hold {foreign[:5]}")


def environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel; its python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    lent = dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    # Python 3.11's venv brings an old setuptools, which would hide the lent one.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    Path(own, "lent.pth").write_text("\n".join(lent) + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    options, pytest_arguments = parser.parse_known_args()
    wheel, sdist = only(options.dist, "*.whl").resolve(), only(options.dist, "*.tar.gz").resolve()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(Path(scratch, "venv"), wheel)
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        sources = only(Path(scratch), "ffcl_fast-*")
        # The tests put their own root first on the path: the package itself must not be there.
        (sources / "ffcl_fast").rename(Path(scratch, "sources_of_the_package"))
        clean = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "PYTHONPATH")}
        clean["PATH"] = str(python.parent)
        steps = (
            [python, "-c", PROBE],
            [python.parent / "ffcl", "doctor"],
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *pytest_arguments]
            + [f"tests/{name}" for name in TESTS],
        )
        for command in steps:
            status = subprocess.run(command, cwd=sources, env=clean).returncode
            if status:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Install each wheel that was built from the sdist where there is no compiler, and run the sdist's tests against it.

    python .ci/check_wheel.py [--dist dist] [pytest arguments]

Each new environment has its own pip and nothing else: torch and the tests' packages are lent from the environment that
runs this, through a path file that does not bring that one's editable ffcl_fast along. Its PATH holds the environment's
own programs only, and it sees no GPU. FFCL_CUDA=1 insists on a CUDA wheel. Exit status: that of the first step that
failed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# Of a CPU wheel every file of tests/ runs but those that import one of these.
LEFT_OUT = {
    "tools": "not in the wheel",
    "benchmarks": "not in the wheel",
    "emulated": "compiles",
    "processes": "several processes, minutes",
    "ffcl_fast.train": "trainings, minutes",
    "ffcl_fast.pretrain": "trainings, minutes",
}
COMMAND_LINE = "test_cli.py"  # runs though it trains: it stands for the trainer's own tests
# Of a CUDA wheel only what a GPU build could break: its CPU kernels are compiled from the same sources.
CUDA_TESTS = ("tests/test_backend_cuda.py", "tests/test_backends.py", "tests/test_build.py")
NEEDED = ("ffcl_fast/py.typed", "ffcl_fast/_native", "ffcl_fast/backends/triton/tiles.py", "/entry_points.txt")
FOREIGN = ("tests/", "benchmarks/", "csrc/", "tools/", "docs/")
# What the native module may ask a machine for: all of it is in manylinux' list, and nothing of it is CUDA's.
LIBRARIES = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux[-\w]*)\.so\.\d+")
PROBE = """
import pathlib, shutil, sys
from importlib import metadata
import torch
import ffcl_fast
from ffcl_fast import _native
assert pathlib.Path(ffcl_fast.__file__).is_relative_to(sys.prefix), ffcl_fast.__file__
found = [name for name in ("cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja") if shutil.which(name)]
assert not found, f"a compiler is on the PATH: {found}"
assert not torch.cuda.is_available(), "a GPU is in sight"
info = _native.build_info()
print(metadata.version("ffcl-fast"), info)
"""
# A CUDA wheel without a GPU: its version and the doctor tell what was compiled, the backend says why it cannot run, and
# the default does without it.
CUDA_PROBE = """
from ffcl_fast import backends, doctor
assert info["cuda"] and info["cuda_archs"], info
cuda = "".join(info["cuda"].split(".")[:2])
assert metadata.version("ffcl-fast") == f"{ffcl_fast.__version__}+cu{cuda}", metadata.version("ffcl-fast")
machine = doctor.machine()
assert info["cuda"] in machine["cuda kernels"] and machine["gpus"] == [], machine
q = torch.randn(9, 7, dtype=torch.bfloat16, requires_grad=True)
try:
    ffcl_fast.functional.clip(q, q.detach(), 10.0, backend="cuda")
except RuntimeError as error:
    assert "backend='cuda' cannot run" in str(error) and "it takes CUDA tensors only" in str(error), error
else:
    raise AssertionError("backend='cuda' ran without a GPU")
ffcl_fast.functional.clip(q, q.detach(), 10.0).backward()
assert q.grad.isfinite().all() and backends._auto("similarity_forward", q)[0] == "cpu"
"""


def only(found: list[Path], what: str) -> Path:
    if len(found) != 1:
        raise SystemExit(f"check_wheel: expected one {what}, found {[p.name for p in found]}")
    return found[0]


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        names = archive.namelist()
        missing = [part for part in NEEDED if not any(part in name for name in names)]
        foreign = [name for name in names if name.startswith(FOREIGN)]
        if missing or foreign:
            raise SystemExit(f"check_wheel: {wheel.name} lacks {missing} and should not hold {foreign[:5]}")
        for name in names:
            if name.endswith(".so"):
                check_libraries(wheel, Path(archive.extract(name, scratch)))


def check_libraries(wheel: Path, module: Path) -> None:
    """The module needs nothing but what every Linux has, and looks for it nowhere but where the system does."""
    command = ["readelf", "--dynamic", "--wide", module]
    entries = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", entries.stdout)
    foreign = [name for name in needed if not LIBRARIES.fullmatch(name)]
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", entries.stdout)
    if not needed or foreign or paths:
        raise SystemExit(f"check_wheel: {wheel.name}: {module.name} needs {foreign} and looks in {paths}")


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


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, and the packages they are in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {".".join(parts[:i]) for parts in (name.split(".") for name in found) for i in range(1, len(parts))}


def chosen(tests: Path) -> list[str]:
    """The files of tests/ that run against a CPU wheel, by what they import."""
    files = sorted([*tests.glob("test_*.py"), *tests.glob("compat/test_*.py")])
    kept = [path for path in files if path.name == COMMAND_LINE or not imports(path) & LEFT_OUT.keys()]
    print(f"check_wheel: {len(kept)} of {len(files)} files of tests run; the others import", end=" ")
    print(*(f"{name} ({why})" for name, why in LEFT_OUT.items()), sep=", ", flush=True)
    return [str(path.relative_to(tests.parent)) for path in kept]


def check(wheel: Path, sdist: Path, cuda: bool, pytest_arguments: list[str]) -> int:
    """Install ``wheel`` and run what belongs to it; the status of the first step that failed."""
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        python = environment(Path(scratch, "venv"), wheel)
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        sources = only(list(Path(scratch).glob("ffcl_fast-*")), "folder in the sdist")
        # The tests put their own root first on the path: the package itself, and what tells its version, must not be
        # there.
        for name in ("ffcl_fast", "ffcl_fast.egg-info"):
            (sources / name).rename(Path(scratch, f"not_on_the_path_{name}"))
        clean = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CUDACXX", "CUDA_HOME", "PYTHONPATH")}
        clean |= {"PATH": str(python.parent), "CUDA_VISIBLE_DEVICES": ""}
        options = ["-q", "-p", "no:cacheprovider", "-m", "not compiler and not long and not gpu", *pytest_arguments]
        steps = (
            [python, "-c", PROBE + CUDA_PROBE if cuda else PROBE],
            [python.parent / "ffcl", "doctor"],
            [python, "-m", "pytest", *options, *(CUDA_TESTS if cuda else chosen(sources / "tests"))],
        )
        for command in steps:
            status = subprocess.run(command, cwd=sources, env=clean).returncode
            if status:
                return status
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=Path("dist"))
    options, pytest_arguments = parser.parse_known_args()
    wheels = [path.resolve() for path in sorted(options.dist.glob("*.whl"))]
    sdist = only(list(options.dist.glob("*.tar.gz")), "sdist").resolve()
    plain = only([path for path in wheels if "+" not in path.name], "wheel for the CPU alone")
    with_cuda = [path for path in wheels if path != plain]
    if with_cuda or os.environ.get("FFCL_CUDA") == "1":
        with_cuda = [only(with_cuda, "CUDA wheel (+cu...)")]
    for wheel in (plain, *with_cuda):
        print(f"check_wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        status = check(wheel, sdist, wheel != plain, pytest_arguments)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Break the kernels on purpose, one way at a time in a copy, and show that the tests see it: ``make mutate``.

    python -m tools.mutate [--only TEXT] [--again]    results in docs/results/mutants.json and a table in docs/trust.md
    python -m tools.mutate --list

What has been run on the same sources and tests is not run again, unless ``--again``. Exit code 1 where a mutant
survives. A mutant counts as killed only where a test fails, or runs into the time limit, that passes without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
RESULTS = ROOT / "docs" / "results" / "mutants.json"
PAGE = ROOT / "docs" / "trust.md"
LIMIT = 600  # seconds for the tests of one mutant: an endless loop is a death too
MARKERS = "<!-- mutants: written by tools/mutate.py -->", "<!-- end of mutants -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose name holds this text")
    parser.add_argument("--list", action="store_true", help="name the mutants and end")
    parser.add_argument("--again", action="store_true", help="run what has been run, too")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.name]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    known = {} if not RESULTS.exists() else {r["name"]: r for r in json.loads(RESULTS.read_text())["mutants"]}
    copy_sources()
    due = [m for m in chosen if options.again or known.get(m.name, {}).get("stamp") != stamp(m)]
    for kind in dict.fromkeys(m.kind for m in due):
        check_soundness(kind, sorted({m.tests for m in due if m.kind == kind}))
    for mutant in due:
        known[mutant.name] = run(mutant)
        print(f"{known[mutant.name]['verdict']:9} {mutant.name}: {known[mutant.name]['by']}", flush=True)
        write([known[m.name] for m in MUTANTS if m.name in known])
    records = [known[m.name] for m in MUTANTS if m.name in known]
    write(records)
    bad = [r["name"] for r in records if r["verdict"] != "killed"]
    print(f"{len(records) - len(bad)} of {len(records)} mutants killed" + "".join(f"\nnot killed: {b}" for b in bad))
    return bool(bad)


def copy_sources() -> None:
    """Every file that git knows or would add, into build/mutants/; files that have not changed keep their times."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        source, target = ROOT / name, COPY / name
        is_result = name.startswith(("docs/", "benchmarks/")) and not name.endswith(".py")
        if is_result or not source.is_file():
            continue
        if not target.exists() or source.read_bytes() != target.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)  # with a time of its own: a build must see it


def compiled_with(name: str) -> list[str]:
    """The files of csrc/ that a compiler reads together with ``name``: those that include it, and all they include."""
    texts = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "csrc").iterdir()}
    included = {
        n: {i for i in re.findall(r'^#include "(.+)"', text, re.MULTILINE) if i in texts} for n, text in texts.items()
    }

    def reach(start: str) -> set[str]:
        found, due = {start}, [start]
        while due:
            new = included[due.pop()] - found
            found |= new
            due += new
        return found

    return sorted(f"csrc/{n}" for n in set().union(*(r for r in map(reach, texts) if name in r)))


def stamp(mutant: Mutant) -> int:
    """Changes where the mutant, what it breaks or the tests that judge it do."""
    files = [mutant.file, *re.findall(r"tests/\S+\.py", mutant.tests), "tests/helpers.py"]
    if mutant.kind in ("cpu", "cuda"):
        files += compiled_with(Path(mutant.file).name)
    value = zlib.crc32(repr(mutant).encode())
    for name in files:
        value = zlib.crc32((ROOT / name).read_bytes(), value)
    return value


def check_soundness(kind: str, tests: list[str]) -> None:
    """The tests must pass where nothing is broken, or a mutant's death would mean nothing."""
    build(kind)
    for words in tests:
        failed = test(kind, words)
        if failed is not None:
            sys.exit(f"not a mutant's fault: {failed} of {words}")


def run(mutant: Mutant) -> dict:
    began = time.monotonic()
    path = COPY / mutant.file
    sound = (ROOT / mutant.file).read_text(encoding="utf-8")
    record = {"name": mutant.name, "file": mutant.file, "stamp": stamp(mutant)}
    if sound.count(mutant.old) != 1:
        return record | {"verdict": "error", "by": f"its text occurs {sound.count(mutant.old)} times", "seconds": 0}
    path.write_text(sound.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        build(mutant.kind)
        by = test(mutant.kind, mutant.tests)
    except subprocess.CalledProcessError as error:
        return record | {"verdict": "error", "by": f"does not compile: {error.stdout[-300:]}", "seconds": 0}
    finally:
        path.write_text(sound, encoding="utf-8")
    verdict = "survived" if by is None else "killed"
    return record | {"verdict": verdict, "by": by or "nothing", "seconds": round(time.monotonic() - began)}


def build(kind: str) -> None:
    """The native module of the copy, for the portable instruction set alone. The emulated one is built by its tests."""
    for old in (COPY / "ffcl_fast").glob("_native*.so"):
        old.unlink()
    if kind != "cpu":
        for source in (ROOT / "ffcl_fast").glob("_native*.so"):
            shutil.copy2(source, COPY / "ffcl_fast")
        return
    import cmake
    import ninja
    import pybind11

    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": COPY / "ffcl_fast",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FFCL_PORTABLE": "ON",
    }
    work = COPY / "build" / "native"
    settings = [f"-D{key}={value}" for key, value in options.items()]
    for command in ([program, "-G", "Ninja", "-S", COPY, "-B", work, *settings], [program, "--build", work]):
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def test(kind: str, words: str) -> str | None:
    """The first test that fails, None where all pass. Raises RuntimeError where there is no test to run."""
    environment = {**os.environ, "PYTHONPATH": str(COPY), "FFCL_ISA": "portable", "OMP_NUM_THREADS": "2"}
    environment["FFCL_TEST_SEED"] = "1"
    if kind == "triton":
        environment |= {"TRITON_INTERPRET": "1"}
    if kind != "cpu":
        del environment["FFCL_ISA"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(words)]
    try:
        done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode < 0:
        return f"a crash (signal {-done.returncode})"
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"{words}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1].partition("::")[2].partition("[")[0]


def write(records: list[dict]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"mutants": records}, indent=1) + "\n", encoding="utf-8")
    if not PAGE.exists():
        return
    rows = "\n".join(f"| {r['name']} | `{Path(r['file']).name}` | {r['verdict']} | `{r['by']}` |" for r in records)
    table = f"| mutant | file | verdict | by |\n|---|---|---|---|\n{rows}\n"
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(MARKERS[0])
    _, _, tail = rest.partition(MARKERS[1])
    PAGE.write_text(f"{head}{MARKERS[0]}\n\n{table}\n{MARKERS[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

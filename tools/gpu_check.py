"""Everything to run on a GPU, in steps that can be cut and resumed: tests, memory checker, measurements.

    python -m tools.gpu_check [--out DIR] [--budget SECONDS] [--only STEP,...] [--again] [--dry-run]

DIR/state.json has each step's exit status, DIR/STEP.log its output, DIR/passed.txt the tests that passed, DIR/gpu.json
the raw measurements and DIR/gpu.md their table. A second call goes on where the first was cut, inside a step as well,
unless the sources have changed since (--again: forget all). No step is started that the budget (default 540 s) leaves
no time for. --dry-run needs no GPU: it collects each step's tests, checks that no GPU test is in none, calls every
measured function on a CPU and compiles the kernels for sm_90. Nothing here needs a network.
Exit status 1 where a step failed, 2 where one is missing for lack of time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .files import write_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ffcl_fast/**/*.py", "csrc/*", "tests/test_gpu*.py", "tools/gpu_*.py")
# A GPU's first call compiles what it needs; a dry run has no GPU to make it.
COMPILE = [sys.executable, "-m", "tools.kernels", "--chips", "sm90"]
LEAST = 20.0  # seconds under which no step is started


@dataclass(frozen=True)
class Step:
    """A command of at most `seconds`; `dry` is what a machine without a GPU can check of it."""

    name: str
    command: list[str]
    seconds: int
    dry: list[str]
    environment: tuple[tuple[str, str], ...] = ()
    dry_environment: tuple[tuple[str, str], ...] = ()
    probe: list[str] | None = None  # a command without whose success the step is left out, with a word


def _pytest(files: list[str], expression: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_resume", "-m", "gpu"]
    return [*command, *(["-k", expression] if expression else []), *options, *files]


def tests(name: str, expression: str, seconds: int, parallel: bool = False) -> Step:
    """GPU-marked tests. `parallel`: their time is the compiler's, so several processes share the work."""
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_gpu*.py"))]
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if parallel and importlib.util.find_spec("xdist") else []
    return Step(name, _pytest(files, expression, *workers), seconds, _pytest(files, expression, "--collect-only"))


def memcheck(name: str, seconds: int) -> Step:
    """Small shapes under compute-sanitizer: out-of-bounds and misaligned accesses become failures."""
    checker = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    file = ["tests/test_gpu_small.py"]
    # The caching allocator would hide an access past a tensor inside its own blocks.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("FFCL_PASSED", "passed-memcheck.txt"))
    probe = [*checker, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).item()"]
    command = [*checker, *_pytest(file, "", "-x")]
    return Step(name, command, seconds, _pytest(file, "", "--collect-only"), environment, probe=probe)


def benchmark(seconds: int) -> Step:
    command = [sys.executable, "-m", "tools.gpu_measure"]
    return Step("measure", command, seconds, [*command, "--dry-run"], dry_environment=(("TRITON_INTERPRET", "1"),))


_REPEAT = "fifty or graph or streams or compile or autocast"
_LARGE = "million or elements"
STEPS = (
    tests("rule", f"not ({_REPEAT} or {_LARGE})", 130, parallel=True),
    tests("repeat", f"({_REPEAT}) and not ({_LARGE})", 90),
    tests("large", _LARGE, 60),
    benchmark(170),
    memcheck("memcheck", 80),
)


def version() -> str:
    """A hash of what the results depend on."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str], log: Path, environment: dict[str, str], limit: float) -> dict:
    """Run a command, its output to a log; {"status", "seconds"}, status "cut" where it ran out of time."""
    started = time.monotonic()
    with log.open("w") as file:
        try:
            status: int | str = subprocess.run(
                command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = "cut"
        except OSError as error:
            file.write(f"{error}\n")
            status = 127
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def previous(path: Path) -> dict:
    """The state of an earlier call; what other sources left is forgotten, results and passed tests included."""
    now = version()
    try:
        state = json.loads(path.read_text())
        if state["version"] == now:
            return state
        print("the sources have changed since the last call: starting anew")
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError) as error:
        print(f"{path} is damaged ({error}): starting anew")
    forget(path.parent)
    return {"version": now, "steps": {}}


def forget(out: Path) -> None:
    for name in ("state.json", "passed.txt", "passed-memcheck.txt", "gpu.json", "gpu.md"):
        (out / name).unlink(missing_ok=True)


def run_steps(steps: list[Step], out: Path, budget: float) -> int:
    """Run what is not done yet within the budget; the exit status."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    state = previous(out / "state.json")
    done = state["steps"]
    missing = failed = False
    for step in steps:
        if done.get(step.name, {}).get("status") == 0:
            print(f"{step.name:10} done before")
            continue
        left = budget - (time.monotonic() - started)
        if left < LEAST:
            print(f"{step.name:10} no time left")
            missing = True
            continue
        environment = dict(step.environment) | {"PYTHONUNBUFFERED": "1", "FFCL_OUT": str(out.resolve())}
        if step.probe and (problem := unfit(step.probe, out, environment, min(left, 60.0))):
            print(f"{step.name:10} left out: {problem}")
            continue
        left = budget - (time.monotonic() - started)
        result = run(step.command, out / f"{step.name}.log", environment, min(left, step.seconds))
        done[step.name] = result
        write_text(out / "state.json", json.dumps(state, indent=1))
        log = (out / f"{step.name}.log").read_text(errors="replace").strip().splitlines()
        print(f"{step.name:10} {result}  {log[-1] if log else ''}", flush=True)
        missing |= result["status"] == "cut"
        failed |= result["status"] not in (0, "cut")
    return 1 if failed else 2 if missing else 0


def unfit(probe: list[str], out: Path, environment: dict[str, str], limit: float) -> str | None:
    """Why a step's tool does not work on this machine, or None."""
    if not shutil.which(probe[0]):
        return f"{probe[0]} is not installed"
    log = out / "probe.log"
    status = run(probe, log, environment, limit)["status"]
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return f"{probe[0]} does not work here ({status}): {last}" if status else None


def dry_run(steps: list[Step], everything: bool) -> int:
    """Check all that needs no GPU; number of failures. `everything`: the kernels too, and that no test is left over."""
    bad, collected = 0, set()
    commands = [(step.name, step.dry, dict(step.dry_environment)) for step in steps]
    if everything:
        commands.append(("kernels for sm_90", COMPILE, {}))
    for name, command, environment in commands:
        started = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines() or [""]
        collected |= {line for line in lines if line.startswith("tests/")}
        verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{name:18} {verdict}  {time.monotonic() - started:.0f} s  {lines[-1]}", flush=True)
        if done.returncode:
            bad += 1
            print(done.stdout[-3000:] + done.stderr[-3000:])
    if everything and (forgotten := gpu_tests() - collected):
        bad += 1
        print("in no step: " + ", ".join(sorted(forgotten)))
    print(f"{len(commands)} checks, {bad} failed; the steps' limits add up to {sum(s.seconds for s in steps)} s")
    return bad


def gpu_tests() -> set[str]:
    """The node ids of every GPU-marked test in tests/test_gpu*.py."""
    done = subprocess.run(tests("", "", 0).dry, cwd=ROOT, capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if line.startswith("tests/")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu_check")))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all (default %(default)s)")
    parser.add_argument("--only", default="", help=f"comma-separated, of {','.join(s.name for s in STEPS)}")
    parser.add_argument("--again", action="store_true", help="forget finished steps")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: collect, compile, check arguments")
    options = parser.parse_args(arguments)
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {step.name for step in STEPS}:
        parser.error(f"--only: no step is called {', '.join(sorted(unknown))}")
    steps = [step for step in STEPS if not wanted or step.name in wanted]
    if options.dry_run:
        return 1 if dry_run(steps, not wanted) else 0

    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run checks what needs none")
    if options.again:
        forget(options.out)
    return run_steps(steps, options.out, options.budget)


if __name__ == "__main__":
    sys.exit(main())

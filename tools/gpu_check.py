"""Everything to run on a GPU, in steps that can be cut and resumed: tests, memory checker, measurements.

    python -m tools.gpu_check [--out DIR] [--budget SECONDS] [--only STEP,...] [--again] [--dry-run]

Each finished step is kept in DIR/state.json with its exit status, and DIR/STEP.log has its output; a second call goes
on where the first was cut (--again forgets). No step is started that the budget (default 540 s) does not leave time
for. --dry-run needs no GPU: it collects the tests, compiles the kernels for sm_90 and checks every step's command.
Exit status 1 where a step failed, 2 where one is missing for lack of time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Step:
    """A command of at most `seconds`; `dry` is what a machine without a GPU can check of it."""

    name: str
    command: list[str]
    seconds: int
    dry: list[str]
    environment: tuple[tuple[str, str], ...] = ()
    dry_environment: tuple[tuple[str, str], ...] = ()
    needs: str | None = None  # a program without which the step is left out, with a word


def tests(name: str, expression: str, seconds: int) -> Step:
    command = [*PYTEST, "-m", "gpu", "-k", expression, "tests/test_gpu.py"]
    return Step(name, command, seconds, [*command, "--collect-only"])


def memcheck(name: str, expression: str, seconds: int) -> Step:
    """Small shapes under compute-sanitizer: out-of-bounds and misaligned accesses become failures."""
    command = [*PYTEST, "-m", "gpu", "-x", "-k", expression, "tests/test_gpu.py"]
    checker = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    # The caching allocator would hide an access past a tensor inside its own blocks.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(name, [*checker, *command], seconds, [*command, "--collect-only"], environment, "compute-sanitizer")


def benchmark() -> Step:
    command = [sys.executable, "-m", "tools.gpu_measure"]
    return Step("measure", command, 150, [*command, "--dry-run"], dry_environment=(("TRITON_INTERPRET", "1"),))


STEPS = (
    tests("rule", "pair or self or temperatures or siglip or float32", 150),
    tests("repeat", "fifty or graph or streams or compile or autocast", 100),
    tests("large", "million or elements", 60),
    benchmark(),
    memcheck("memcheck", "(pair or self) and bfloat16 and (128 or 64 or 9 or 200)", 70),
)


def run(step: Step, out: Path, limit: float) -> dict:
    """Run a step's command, its output to a log; {"status", "seconds"}, status "cut" where it ran out of time."""
    started = time.monotonic()
    environment = os.environ | dict(step.environment) | {"PYTHONUNBUFFERED": "1", "FFCL_OUT": str(out)}
    with (out / f"{step.name}.log").open("w") as log:
        try:
            status: int | str = subprocess.run(
                step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = "cut"
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def save(path: Path, state: dict) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(state, indent=1))
    partial.replace(path)


def dry_run(steps: list[Step]) -> int:
    """Check all that needs no GPU; number of failures."""
    bad = 0
    commands = [(step.name, step.dry, dict(step.dry_environment)) for step in steps]
    commands.append(("kernels for sm_90", [sys.executable, "-m", "tools.kernels", "--chips", "sm90"], {}))
    for name, command, environment in commands:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"{name:18} {'ok' if done.returncode == 0 else f'FAILED ({done.returncode})'}  {last}", flush=True)
        if done.returncode:
            bad += 1
            print(done.stdout[-3000:] + done.stderr[-3000:])
    print(f"{len(commands)} checks, {bad} failed; the steps' limits add up to {sum(s.seconds for s in steps)} s")
    return bad


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
        return 1 if dry_run(steps) else 0

    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run checks what needs none")
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "state.json"
    state = json.loads(path.read_text()) if path.exists() and not options.again else {}
    missing = False
    for step in steps:
        if state.get(step.name, {}).get("status") == 0:
            print(f"{step.name:10} done before")
            continue
        if step.needs and not shutil.which(step.needs):
            print(f"{step.name:10} left out: {step.needs} is not installed")
            continue
        left = options.budget - (time.monotonic() - started)
        if left < 20:
            print(f"{step.name:10} no time left")
            missing = True
            continue
        state[step.name] = run(step, options.out, min(left, step.seconds))
        save(path, state)
        log = (options.out / f"{step.name}.log").read_text().strip().splitlines()
        print(f"{step.name:10} {state[step.name]}  {log[-1] if log else ''}", flush=True)
        missing |= state[step.name]["status"] == "cut"
    if any(state.get(step.name, {}).get("status") not in (None, 0, "cut") for step in steps):
        return 1
    return 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

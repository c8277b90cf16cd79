"""Everything to run on a GPU, in steps that can be cut and resumed: tests, memory checker, measurements.

    python -m tools.gpu_check [--out DIR] [--budget SECONDS] [--only STEP,...] [--again] [--dry-run | --collect]

DIR/state.json has each step's exit status, DIR/STEP.log its output, DIR/passed.txt the tests that passed, DIR/gpu.json
the raw measurements and DIR/gpu.md their table. A second call goes on where the first was cut, inside a step as well,
unless the sources, PyTorch, Triton or the GPU are others since (--again: forget all). No step is started that the
budget (default 540 s) leaves no time for. --dry-run needs no GPU: it collects each step's tests, checks that no GPU
test is in none, calls every measured function on a CPU and compiles the kernels for sm_90; --collect leaves the
compiling to `make kernels`. Nothing here needs a network.
Exit status 1 where a step failed, 2 where one is missing, for lack of time or of what it needs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .files import write_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ffcl_fast/**/*.py", "csrc/*", "tests/*.py", "tools/*.py", "setup.py", "CMakeLists.txt")
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
    probes: tuple[list[str], ...] = ()  # without the success of all of them the step is left out, with a word


# An error of CUDA spoils its whole process: each backend's tests have processes of their own.
TRITON = ("tests/test_gpu.py", "tests/test_gpu_goodness.py", "tests/test_gpu_small.py")
CUDA = ("tests/test_gpu_cuda.py",)
CUDA_BUILT = [
    sys.executable, "-c",
    "import sys; from ffcl_fast.backends import native; "
    "sys.exit(native.problem or (None if native.module.cuda_built() else 'built without the CUDA kernels'))",
]  # fmt: skip


def _pytest(files: tuple[str, ...], expression: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_resume", "-m", "gpu"]
    return [*command, *(["-k", expression] if expression else []), *options, *files]


def _probes(files: tuple[str, ...]) -> tuple[list[str], ...]:
    return (CUDA_BUILT,) if files == CUDA else ()


def tests(name: str, files: tuple[str, ...], expression: str, seconds: int, workers: int = 1) -> Step:
    """GPU-marked tests. `workers`: where their time is the compiler's, several processes share the work."""
    shared = workers > 1 and importlib.util.find_spec("xdist")
    options = ["-n", str(min(workers, os.cpu_count() or 1))] if shared else []
    dry = _pytest(files, expression, "--collect-only")
    return Step(name, _pytest(files, expression, *options), seconds, dry, probes=_probes(files))


def sanitizer(name: str, tool: str, files: tuple[str, ...], expression: str, seconds: int) -> Step:
    """Small shapes under a tool of compute-sanitizer: what memcheck (out of bounds, misaligned) or racecheck (shared
    memory) finds becomes a failure."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    # The caching allocator would hide an access past a tensor inside its own blocks.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"), ("FFCL_PASSED", f"passed-{name}.txt"))
    works = [*checker, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).item()"]
    if files == CUDA:
        checker += ["--kernel-name", "kns=4ffcl"]  # our namespace, mangled: PyTorch's kernels run unchecked, so fast
    dry = _pytest(files, expression, "--collect-only")
    command = [*checker, *_pytest(files, expression, "-x")]
    return Step(name, command, seconds, dry, environment, probes=(*_probes(files), works))


def benchmark(seconds: int) -> Step:
    command = [sys.executable, "-m", "tools.gpu_measure"]
    return Step("measure", command, seconds, [*command, "--dry-run"], dry_environment=(("TRITON_INTERPRET", "1"),))


_REPEAT = "fifty or graph or streams or compile or autocast"
_LARGE = "million or elements or large_batch"
_GOODNESS = "rows or pool or many or small_goodness"
_RACES = "small_goodness or small_races"  # without 16-bit products of the library, which racecheck stops at
# Each limit is what an H200 with 16 processors took, or by its pace would, and a margin. The last step may take what
# the others leave: 220 s by those times.
STEPS = (
    tests("rule", TRITON, f"not ({_REPEAT} or {_LARGE})", 115, workers=9),
    tests("cuda-rule", CUDA, f"not ({_LARGE} or {_GOODNESS})", 75, workers=4),
    tests("cuda-goodness", CUDA, _GOODNESS, 30, workers=3),
    tests("repeat", TRITON, f"({_REPEAT}) and not ({_LARGE})", 60, workers=5),
    tests("large", TRITON, _LARGE, 35),
    tests("cuda-large", CUDA, _LARGE, 20),
    sanitizer("memcheck", "memcheck", ("tests/test_gpu_small.py",), "", 90),
    sanitizer("cuda-memcheck", "memcheck", CUDA, "small", 30),
    sanitizer("cuda-racecheck", "racecheck", CUDA, _RACES, 20),
    benchmark(65),
)


def version(machine: str) -> str:
    """A hash of what the results depend on: the sources and, in ``machine``, what they run on."""
    digest = hashlib.sha256(machine.encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str], log: Path, environment: dict[str, str], limit: float) -> dict:
    """Run a command, its output to a log; {"status", "seconds"}, status "cut" where it ran out of time."""
    started = time.monotonic()
    status: int | str
    with log.open("w") as file:
        try:
            # A session of its own, so that it can be ended whole: pytest's workers and what the sanitizer runs would
            # go on using the GPU under the next step's measurements.
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        except subprocess.TimeoutExpired:
            status = "cut"
        except OSError as error:
            file.write(f"{error}\n")
            status = 127
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def machine() -> str:
    """The GPU and what drives it."""
    import torch

    from .gpu_measure import triton_version

    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_version()}"


def previous(path: Path, now: str) -> dict:
    """The state of an earlier call; what is of another version is forgotten, results and passed tests included."""
    try:
        state = json.loads(path.read_text())
        if state["version"] == now:
            return state
        print("the sources or the machine have changed since the last call: starting anew")
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError) as error:
        print(f"{path} is damaged ({error}): starting anew")
    forget(path.parent)
    return {"version": now, "steps": {}}


def forget(out: Path) -> None:
    for path in (*(out / name for name in ("state.json", "gpu.json", "gpu.md")), *out.glob("passed*.txt")):
        path.unlink(missing_ok=True)


def run_steps(steps: list[Step], out: Path, budget: float, machine: str = "") -> int:
    """Run what is not done yet within the budget; the exit status."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    state = previous(out / "state.json", version(machine))
    done = state["steps"]
    missing = failed = False
    for step in steps:
        if done.get(step.name, {}).get("status") == 0:
            print(f"{step.name:14} done before")
            continue
        left = budget - (time.monotonic() - started)
        if left < LEAST:
            print(f"{step.name:14} no time left")
            missing = True
            continue
        environment = dict(step.environment) | {"PYTHONUNBUFFERED": "1", "FFCL_OUT": str(out.resolve())}
        if problem := unfit(step.probes, out, environment, min(left, 60.0)):
            print(f"{step.name:14} left out: {problem}")
            missing = True
            continue
        left = budget - (time.monotonic() - started)
        limit = left if step is STEPS[-1] else min(left, step.seconds)
        result = run(step.command, out / f"{step.name}.log", environment, limit)
        done[step.name] = result
        write_text(out / "state.json", json.dumps(state, indent=1))
        log = (out / f"{step.name}.log").read_text(errors="replace").strip().splitlines()
        print(f"{step.name:14} {result}  {log[-1] if log else ''}", flush=True)
        missing |= result["status"] == "cut"
        failed |= result["status"] not in (0, "cut")
    return 1 if failed else 2 if missing else 0


def unfit(probes: tuple[list[str], ...], out: Path, environment: dict[str, str], limit: float) -> str | None:
    """Why a step's tool does not work on this machine, or None."""
    for probe in probes:
        if not shutil.which(probe[0]):
            return f"{probe[0]} is not installed"
        log = out / "probe.log"
        status = run(probe, log, environment, limit)["status"]
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            return f"{Path(probe[0]).name} does not work here ({status}): {last}"
    return None


def dry_run(steps: list[Step], everything: bool, kernels: bool) -> int:
    """Check all that needs no GPU; number of failures. `everything`: that no test is left over; `kernels`: compile."""
    bad, collected = 0, set()
    commands = [(step.name, step.dry, dict(step.dry_environment)) for step in steps]
    if kernels:
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
    files = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_gpu*.py")))
    done = subprocess.run(_pytest(files, "", "--collect-only"), cwd=ROOT, capture_output=True, text=True)
    return {line for line in done.stdout.splitlines() if line.startswith("tests/")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs" / "gpu_check")))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all (default %(default)s)")
    parser.add_argument("--only", default="", help=f"comma-separated, of {','.join(s.name for s in STEPS)}")
    parser.add_argument("--again", action="store_true", help="forget finished steps")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: collect, compile, check arguments")
    parser.add_argument("--collect", action="store_true", help="the same without compiling")
    options = parser.parse_args(arguments)
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {step.name for step in STEPS}:
        parser.error(f"--only: no step is called {', '.join(sorted(unknown))}")
    steps = [step for step in STEPS if not wanted or step.name in wanted]
    if options.dry_run or options.collect:
        return 1 if dry_run(steps, not wanted, not (wanted or options.collect)) else 0

    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run checks what needs none")
    if options.again:
        forget(options.out)
    return run_steps(steps, options.out, options.budget, machine())


if __name__ == "__main__":
    sys.exit(main())

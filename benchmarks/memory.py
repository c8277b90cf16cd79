"""Peak memory of one run in a process of its own: ``python -m benchmarks.memory FAMILY SHAPE PROVIDER``.

Prints one JSON object. The baseline is what is resident after the inputs are made and a tiny run has loaded libraries
and started threads; gradients are subtracted, since every provider has to return them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .measure import FAILURES, Call, limit_memory, peak_beyond, problem_of
from .variants import FAMILIES
from .workloads import Workload

_ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT = 600


def measure_here(workload: Workload, provider: str) -> dict[str, Any]:
    """Peak of the provider's first run at this size."""
    try:
        which = workload.providers()[provider]
        tiny = workload.resized(workload.family.quick)
        Call(which, workload.family, tiny.inputs())()
        call = Call(which, workload.family, workload.inputs())
        began = time.perf_counter()
        peak, _ = peak_beyond(call.results)
        seconds = time.perf_counter() - began
    except FAILURES as error:
        return {"problem": problem_of(error)}
    if peak is None:
        return {"problem": "this system does not tell a process's peak memory"}
    gradients = call.gradient_bytes()
    inputs = sum(x.numel() * x.element_size() for x in call.inputs.values())
    return {
        "peak_bytes": max(0, peak - gradients),
        "input_bytes": inputs,
        "gradient_bytes": gradients,
        "seconds_once": round(seconds, 4),
    }


def measure_apart(workload: Workload, provider: str) -> dict[str, Any]:
    """:func:`measure_here` in a fresh interpreter."""
    shape = "x".join(map(str, workload.shape))
    command = [sys.executable, "-m", "benchmarks.memory", workload.family.name, shape, provider]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done after {_TIMEOUT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"problem": f"exit status {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    family, shape, provider = arguments
    limit_memory()
    workload = Workload(FAMILIES[family], tuple(map(int, shape.split("x"))), (provider,))
    print(json.dumps(measure_here(workload, provider)))


if __name__ == "__main__":
    main(sys.argv[1:])

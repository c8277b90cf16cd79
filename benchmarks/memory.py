"""Peak memory of one run in a process of its own.

The baseline is what is resident after the inputs are made and a tiny run has loaded libraries
and started threads; gradients are subtracted, since every provider has to return them.
"""

from __future__ import annotations

import time
from typing import Any

from .apart import call_apart
from .measure import FAILURES, Call, limit_memory, peak_beyond, problem_of
from .variants import FAMILIES
from .workloads import Workload


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
    """:func:`measure_here` in a process of its own."""
    return call_apart(_measure, workload.family.name, workload.shape, provider)


def _measure(family: str, shape: tuple[int, ...], provider: str) -> dict[str, Any]:
    limit_memory()
    return measure_here(Workload(FAMILIES[family], shape, (provider,)), provider)

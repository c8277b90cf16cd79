"""Times on a GPU: of calls as a user makes them, and of their kernels alone, replayed from a captured CUDA graph."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch

_ENOUGH = 5.0  # milliseconds of replays in one timing, so that the gap before the first does not show


class Spoiled(Exception):
    """A call left this process unfit to measure anything else."""


def milliseconds(function: Callable[[], object], seconds: float = 1.0, once: bool = False) -> float:
    """Median over CUDA events of calls that fill about `seconds`, after two calls that nothing counts (`once`: of one
    call)."""
    if not once:
        function()
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < (1 if once else 3) or (not once and time.monotonic() < end and len(times) < 50):
        times.append(_timed(function))
    return statistics.median(times)


def _timed(function: Callable[[], object], repeats: int = 1) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def device_milliseconds(
    function: Callable[[], object], seconds: float = 1.0, ceiling: Callable[[], object] = lambda: None
) -> tuple[float, float] | None:
    """Median times of a replay of the function's kernels and of a call of `ceiling`, in turn: a chip that has run hot
    is slower at everything. None where the kernels cannot be captured.

    Raises Spoiled where the attempt has left PyTorch in a state that would falsify or fail later measurements.
    """
    torch.cuda.empty_cache()
    graph = None
    try:
        graph = _captured(function)
    except Exception:  # whatever a library says: its time as called is all there is
        pass
    if graph is None:
        if not healthy():
            raise Spoiled
        return None
    try:
        calls = graph.replay, ceiling
        repeats = [max(1, min(200, math.ceil(_ENOUGH / max(milliseconds(call, 0.0), 1e-3)))) for call in calls]
        ours: list[float] = []
        theirs: list[float] = []
        end = time.monotonic() + seconds
        while len(ours) < 3 or (time.monotonic() < end and len(ours) < 50):
            for call, count, times in zip(calls, repeats, (ours, theirs), strict=True):
                call()  # what comes after the other one's is not counted
                times.append(_timed(call, count))
        return statistics.median(ours), statistics.median(theirs)
    finally:
        torch.cuda.synchronize()
        graph.reset()
        torch.cuda.empty_cache()


def _captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what runs for the first time on a stream allocates and compiles
        function()
        function()
        _check_free_of_waits(function)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The outer block: torch.cuda.graph leaves its stream the current one where the end of a capture fails.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph


def _check_free_of_waits(function: Callable[[], object]) -> None:
    """Raise where a call waits for the GPU. A capture would end in an error that PyTorch does not recover from: its
    allocator and its random numbers stay in the state of capturing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def healthy() -> bool:
    """Whether memory can be handed back and had, random numbers drawn, and products computed, on the usual stream."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        x = torch.randn(64, 64, device="cuda")
        found = bool((x @ x).isfinite().all())
        return found and torch.cuda.current_stream() == torch.cuda.default_stream()
    except Exception:
        return False

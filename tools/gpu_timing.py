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


def milliseconds(function: Callable[[], object], seconds: float = 1.0, once: bool = False, repeats: int = 1) -> float:
    """Median over CUDA events of calls that fill about `seconds`, after two calls that nothing counts (`once`: of one
    call). `repeats`: a timing is of so many calls, and the first waits for one that is not counted."""
    if not once:
        function()
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < (1 if once else 3) or (not once and time.monotonic() < end and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if repeats > 1:
            function()
        start.record()
        for _ in range(repeats):
            function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / repeats)
    return statistics.median(times)


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
        repeats = [
            max(1, min(200, math.ceil(_ENOUGH / max(milliseconds(f, 0.0), 1e-3)))) for f in (graph.replay, ceiling)
        ]
        rounds: list[tuple[float, float]] = []
        end = time.monotonic() + seconds
        while len(rounds) < 3 or (time.monotonic() < end and len(rounds) < 50):
            rounds.append((_timed(graph.replay, repeats[0]), _timed(ceiling, repeats[1])))
        ours, theirs = zip(*rounds, strict=True)
        return statistics.median(ours), statistics.median(theirs)
    finally:
        torch.cuda.synchronize()
        graph.reset()
        torch.cuda.empty_cache()


def _timed(function: Callable[[], object], repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


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

"""What a call of the Triton backend costs the host, measured without a GPU: its launches are replaced by nothing.

    python -m tools.host_time [--only NAME,...] [--seconds S]

Tensors lie on the CPU and are small; Triton chooses what to launch as on an H200 and launches it into the void, so all
that Python and PyTorch do around the kernels is done, but for the driver's own part of a launch. Prints for each
workload of `tools.gpu_workloads` the launches of a call and the microseconds of the median of many, forward and with
the backward pass, beside those of an autograd function that does nothing. The last column has the backward pass in a
thread of its own, as autograd has that of a GPU's tensors: usually on another core, with empty caches. `taskset -c 0`
keeps both threads on one core.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ffcl_fast.backends.triton import config, gradient_panels

from . import no_gpu
from .gpu_measure import backward, passes
from .gpu_workloads import WORKLOADS, Products, Workload

ROWS = 64  # few: what PyTorch computes on them must not count


class Unlaunched(no_gpu.Kernel):
    """It counts its launches, and keeps the arguments of the last."""

    def __init__(self, kernel: JITFunction, launches: collections.Counter):
        self.name, self.parameters, self.launches = kernel.fn.__name__, len(kernel.arg_names), launches
        self.arguments: tuple = ()

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*arguments) -> None:
            if len(grid) != 3 or len(arguments) != self.parameters:
                raise TypeError(f"{self.name} takes {self.parameters} arguments: {len(arguments)} on grid {grid}")
            self.launches[self.name] += 1
            self.arguments = arguments

        return launch


@contextlib.contextmanager
def without_a_gpu() -> Iterator[collections.Counter]:
    """Launches of the Triton backend for CPU tensors count themselves, by name, and do nothing."""
    launches: collections.Counter = collections.Counter()

    def product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        launches["product"] += 1

    changes = (
        (config, "parts", lambda x: 128),
        (gradient_panels, "add_product", product),
        *((m, "processors", lambda device: 132) for m in no_gpu.modules_with("processors")),
    )
    with no_gpu.launching(lambda kernel, *_: Unlaunched(kernel, launches), "sm90", changes):
        yield launches


def small(workload: Workload) -> Workload:
    if isinstance(workload, Products):
        return Products(workload.name, ROWS, ROWS, workload.width, workload.work, workload.ours)
    shape = workload.shape
    return dataclasses.replace(
        workload, shape=(16, *shape[1:]) if len(shape) > 2 else (ROWS, *(512 for _ in shape[1:]))
    )


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """Of the median call."""
    for _ in range(20):
        call()
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, scale):
        ctx.save_for_backward(q, k, scale)
        return scale.clone()

    @staticmethod
    def backward(ctx, grad):
        q, k, _ = ctx.saved_tensors
        return q, k, grad


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of workloads, with commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each time")
    options = parser.parse_args(arguments)
    wanted = {name for name in options.only.split(",") if name}
    todo = {(w.name, w.width if isinstance(w, Products) else len(w.shape)): w for w in WORKLOADS if not w.once}
    if unknown := wanted - {name for name, _ in todo}:
        parser.error(f"--only: no workload is called {', '.join(sorted(unknown))}")
    print(f"{'workload':34}{'launches':>9}{'forward':>9}{'both':>9}{'2 threads':>11}  microseconds")
    with without_a_gpu() as launches, ThreadPoolExecutor(1) as other:
        nothing = WORKLOADS[0].small().inputs("cpu")
        _print("nothing, in autograd", 0, _Nothing.apply, nothing, other, options.seconds)
        for workload in [small(w) for (name, _), w in todo.items() if not wanted or name in wanted]:
            arguments = workload.inputs("cpu")
            launches.clear()
            passes(workload.ours, arguments)[1]()
            _print(workload.key, sum(launches.values()), workload.ours, arguments, other, options.seconds)


def _print(name: str, launches: int, loss: Callable, arguments: tuple, other: Executor, seconds: float) -> None:
    def handed_over() -> None:
        out = loss(*arguments)
        other.submit(backward, out, arguments).result()

    forward, both, two = (microseconds(call, seconds) for call in (*passes(loss, arguments), handed_over))
    print(f"{name:34}{launches:9}{forward:9.0f}{both:9.0f}{two:11.0f}")


if __name__ == "__main__":
    main()

"""Measure our kernels on this GPU beside its own product and copy, plain losses and peers; raw results, a table.

    python -m tools.gpu_measure [--seconds S] [--dry-run]

Medians over CUDA events, in milliseconds, on inputs drawn anew for each workload. `fraction` is the counted useful work
(similarity.md: 1 U = 2 N M D; forward 1 U, both passes 4 U, halved where k = q, SigLIP 3 U) over the rate of an
8192-cubed bf16 torch.matmul in the same run, or for memory-bound work the counted bytes over those of a device copy.
"triton" and "cuda" are our kernels; the latter only where they were built.
FFCL_OUT (default: the current folder) gets gpu.json after each workload, so that a cut run keeps what it measured and
the next goes on there, and gpu.md, its table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ffcl_fast.backends import native

from .files import write_text
from .gpu_peers import PEERS, problem_of
from .gpu_table import OURS, markdown
from .gpu_workloads import PLAIN_LIMIT, WORKLOADS, Products, Workload, by_cuda


def milliseconds(function: Callable[[], object], seconds: float = 1.0, once: bool = False) -> float:
    """Median over calls that fill about `seconds`, after two calls that nothing counts (`once`: of one call)."""
    if not once:
        function()
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < (1 if once else 3) or (not once and time.monotonic() < end and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def passes(loss: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[Callable, Callable]:
    def forward() -> None:
        with torch.no_grad():
            loss(*arguments)

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss(*arguments), arguments, allow_unused=True)

    return forward, both


def product_rate() -> float:
    """Operations a second of torch's 8192-cubed bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (1e-3 * milliseconds(lambda: a @ b))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy of a gigabyte."""
    a = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.numel() * 2 / (1e-3 * milliseconds(lambda: b.copy_(a)))


def losses(workload: Workload) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What runs on a workload, by name; each is built when its turn comes, and may fail then."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {"triton": lambda: workload.ours}
    if (cuda := by_cuda(workload)) and native.module is not None and native.module.cuda_built():
        found["cuda"] = lambda: cuda
    fits = True
    if isinstance(workload, Products):
        fits = workload.rows <= PLAIN_LIMIT and workload.cols <= 4 * PLAIN_LIMIT
        for peer in PEERS:
            if peer.family == workload.name and peer.fits(workload.rows, workload.width):
                found[peer.name] = peer.build
    plain = workload.plain
    if plain and fits:
        found |= {"plain": lambda: plain, "compiled": lambda: torch.compile(plain)}
    return found


def measure(workload: Workload, ceiling: float, seconds: float) -> dict:
    row: dict = {"key": workload.key, "name": workload.name}
    row |= {"rows": workload.rows, "width": workload.width} if isinstance(workload, Products) else {}
    arguments = workload.inputs("cuda")
    for name, build in losses(workload).items():
        try:
            row[name] = _one(build(), name in OURS, arguments, workload, ceiling, seconds)
        except Exception as error:  # a peer's failure costs its own column only; ours fails the run at its end
            row[name] = {"problem": problem_of(error)}
        torch.cuda.empty_cache()
    return row


def _one(
    loss: Callable[..., Tensor], ours: bool, arguments, workload: Workload, ceiling: float, seconds: float
) -> dict:
    forward, both = passes(loss, arguments)
    found: dict = {}
    if ours and not workload.once:
        first = both()
        found["same bits"] = all(
            torch.equal(a, b) for _ in range(3) for a, b in zip(first, both(), strict=True) if a is not None
        )
        del first
    if workload.once:  # its kernels, on fewer rows, so that nothing is compiled inside the one call
        fewer = tuple(x[:16384].detach().requires_grad_() if x.dim() else x for x in arguments)
        passes(loss, fewer)[1]()
    for which, function, work in zip(("forward", "both"), (forward, both), workload.useful(), strict=True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = milliseconds(function, seconds, workload.once)
        found[f"{which} ms"] = round(ms, 4)
        found[f"{which} fraction"] = round(work / (1e-3 * ms) / ceiling, 3)
        found["MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found


def check_arguments() -> list[str]:
    """Every call on tiny tensors on the CPU, ours under the interpreter: that names and arguments still fit. A line a
    peer: whether it is installed, and what it says on a CPU."""
    for workload in WORKLOADS:
        small = workload.small()
        arguments = tuple(x.detach().float().requires_grad_() for x in small.inputs("cpu"))
        for loss in filter(None, (small.plain, small.ours)):
            if loss is small.ours and os.environ.get("TRITON_INTERPRET") != "1":
                continue  # without the interpreter its backend needs a GPU
            torch.autograd.grad(loss(*arguments), arguments, allow_unused=True)
    lines = []
    for peer in PEERS:
        try:
            loss = peer.build()
            q, k, scale = (x.detach().float() for x in WORKLOADS[0].small().inputs("cpu"))
            lines.append(f"{peer.name}: {float(loss(q, k, scale)):.4f} on a CPU")
        except Exception as error:  # most need a GPU, and say so in many ways
            lines.append(f"{peer.name}: {problem_of(error)}")
    return lines


def stored(path: Path) -> dict:
    """What an earlier, cut run has measured on this GPU."""
    try:
        found = json.loads(path.read_text())
        return found if found["device"] == torch.cuda.get_device_name() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.4, help="per measured function (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check every workload's call on a CPU, measure nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print("\n".join(check_arguments()))
        print(f"{len(WORKLOADS)} workloads callable, {len(PEERS)} peers tried")
        return 0
    folder = Path(os.environ.get("FFCL_OUT", "."))
    path = folder / "gpu.json"
    product, copy = product_rate(), copy_rate()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "product_tflops": round(product / 1e12, 1),
        "copy_gbytes": round(copy / 1e9, 1),
        "rows": stored(path).get("rows", []),
    }
    print(f"{result['device']}: bf16 product {result['product_tflops']} TFLOP/s, copy {result['copy_gbytes']} GB/s")
    before = {row["key"] for row in result["rows"]}
    for workload in WORKLOADS:
        if workload.key in before:
            continue
        row = measure(workload, product if isinstance(workload, Products) else copy, options.seconds)
        result["rows"].append(row)
        write_text(path, json.dumps(result, indent=1))
        write_text(folder / "gpu.md", markdown(result))
        print(json.dumps(row), flush=True)
    failed = [f"{row['key']} ({name})" for row in result["rows"] for name in OURS if "problem" in row.get(name, {})]
    print(f"{len(result['rows'])} workloads measured" + (f"; ours failed on {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

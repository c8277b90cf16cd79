"""Measure the similarity kernels on this GPU against its own matrix product and the plain losses; write raw results.

    python -m tools.gpu_measure [--seconds S] [--dry-run]

Medians over CUDA events, in milliseconds, with inputs drawn anew for each workload. `fraction` is the counted useful
work (similarity.md: 1 U = 2 N M D; forward 1 U, both passes 4 U, halved where k = q, SigLIP 3 U) over the rate of an
8192-cubed bf16 torch.matmul in the same run. Results go to FFCL_OUT (default: the current folder) as gpu.json, written
after each workload, so that a cut run keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ffcl_fast import functional

PLAIN_LIMIT = 16384  # rows up to which the plain losses, which store N x M, are run beside ours


@dataclass(frozen=True)
class Workload:
    """One row of the table: `work` is (forward, both passes) in units of 2 N M D."""

    name: str
    rows: int
    cols: int
    width: int
    work: tuple[float, float]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor] | None = None


def _clip(backend: str) -> Callable[..., Tensor]:
    return lambda q, k, scale: functional.clip(q, k, scale, backend=backend)


def _plain_clip(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    s, labels = scale * (q @ k.T).float(), torch.arange(q.shape[0], device=q.device)
    return 0.5 * (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels))


def _info_nce(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return functional.similarity_lse(q, k, scale, both=False, backend="triton")[0].mean()


def _plain_info_nce(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return (scale * (q @ k.T).float()).logsumexp(1).mean()


def _nt_xent(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    half = q.shape[0] // 2
    return functional.nt_xent(q[:half], q[half:], 1 / scale, backend="triton")


def _self(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return functional.similarity_lse(q, None, scale, exclude="diagonal", backend="triton")[0].mean()


def _siglip(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    return functional.siglip(q, k, scale, -10.0, backend="triton")


SELF_SIZES = ((8192, 128), (32768, 128), (131072, 128), (32768, 256))
WORKLOADS = (
    *(
        Workload("clip", n, n, d, (1, 4), _clip("triton"), _plain_clip)
        for n, d in ((4096, 512), (8192, 512), (32768, 512), (65536, 512), (32768, 768), (32768, 1024), (131072, 512))
    ),
    Workload("clip panels", 32768, 32768, 512, (1, 4), _clip("panels")),
    Workload("info_nce", 4096, 65536, 128, (1, 4), _info_nce, _plain_info_nce),
    Workload("info_nce", 8192, 262144, 768, (1, 4), _info_nce),
    *(Workload("nt_xent", n, n, d, (0.5, 2), _nt_xent) for n, d in SELF_SIZES),
    *(Workload("self", n, n, d, (0.5, 2), _self) for n, d in SELF_SIZES),
    Workload("siglip", 65536, 65536, 768, (1, 3), _siglip),
    *(Workload("ragged clip", 30011, 30011, d, (1, 4), _clip("triton")) for d in (96, 200, 384, 1152)),
)


def inputs(workload: Workload, device: str) -> tuple[Tensor, Tensor, Tensor]:
    def unit(n: int) -> Tensor:
        return F.normalize(torch.randn(n, workload.width, device=device), dim=1).bfloat16().requires_grad_()

    return unit(workload.rows), unit(workload.cols), torch.tensor(20.0, device=device, requires_grad=True)


def milliseconds(function: Callable[[], object], seconds: float = 1.0) -> float:
    """Median over calls that fill about `seconds`, after two calls that nothing counts."""
    function()
    function()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or (time.monotonic() < end and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def passes(loss: Callable[..., Tensor], arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Callable, Callable]:
    def forward() -> None:
        with torch.no_grad():
            loss(*arguments)

    def both() -> None:
        torch.autograd.grad(loss(*arguments), arguments, allow_unused=True)

    return forward, both


def product_rate() -> float:
    """Operations a second of torch's 8192-cubed bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (1e-3 * milliseconds(lambda: a @ b))


def measure(workload: Workload, rate: float, seconds: float) -> dict:
    arguments = inputs(workload, "cuda")
    unit = 2 * workload.rows * workload.cols * workload.width
    row: dict = {"name": workload.name, "rows": workload.rows, "cols": workload.cols, "width": workload.width}
    losses = {"ours": workload.ours}
    if workload.plain and workload.rows <= PLAIN_LIMIT and workload.cols <= 4 * PLAIN_LIMIT:
        losses |= {"plain": workload.plain, "compiled": torch.compile(workload.plain)}
    for name, loss in losses.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for which, function, work in zip(("forward", "both"), passes(loss, arguments), workload.work, strict=True):
            ms = milliseconds(function, seconds)
            row[f"{name} {which} ms"] = round(ms, 4)
            if name == "ours":
                row[f"{which} fraction"] = round(work * unit / (1e-3 * ms) / rate, 3)
        row[f"{name} MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return row


def check_arguments() -> None:
    """Every workload's call on 32 rows on the CPU, ours under the interpreter: that names and arguments still fit."""
    for workload in WORKLOADS:
        q, k, scale = (x.detach().float().requires_grad_() for x in _small(workload))
        for loss in filter(None, (workload.plain, workload.ours)):
            if loss is workload.ours and os.environ.get("TRITON_INTERPRET") != "1":
                continue  # without the interpreter its backend needs a GPU
            torch.autograd.grad(loss(q, k, scale), (q, k, scale), allow_unused=True)


def _small(workload: Workload) -> tuple[Tensor, Tensor, Tensor]:
    small = Workload(workload.name, 32, 32, 16, workload.work, workload.ours)
    return inputs(small, "cpu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.7, help="per measured function (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check every workload's call on a CPU, measure nothing")
    options = parser.parse_args(arguments)
    if options.dry_run:
        check_arguments()
        print(f"{len(WORKLOADS)} workloads callable")
        return 0
    rate = product_rate()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "product_tflops": round(rate / 1e12, 1),
        "rows": [],
    }
    path = Path(os.environ.get("FFCL_OUT", ".")) / "gpu.json"
    print(f"{result['device']}: 8192-cubed bf16 product {result['product_tflops']} TFLOP/s")
    for workload in WORKLOADS:
        try:
            row = measure(workload, rate, options.seconds)
        except torch.cuda.OutOfMemoryError as error:
            row = {"name": workload.name, "rows": workload.rows, "problem": str(error).splitlines()[0]}
        result["rows"].append(row)
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(path)
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

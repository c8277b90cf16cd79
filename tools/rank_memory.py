"""Peak memory of one process of many, measured: by the number of processes and by the rows of each.

    python -m tools.rank_memory --json benchmarks/results/processes/memory.json
    python -m tools.rank_memory --worlds 2 4 --wide 512 512 --rows --losses clip

A step is forward and backward of a loss on processes of this machine (gloo). Its peak is what a process had resident at
most beyond what it had before the step: all tensors of the loss, workspace of kernels and transport, and the gradients
that it leaves. Every larger allocation is a mapping of its own here, so what is freed is gone. Linux with glibc. The
system keeps its count of resident pages per CPU and sums it up roughly: a peak repeats within a few MiB, more where
there are many CPUs. ``tensor_peak_of`` counts what PyTorch allocates instead, which repeats to some KiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn.functional import normalize

import ffcl_fast as ff

from .files import write_text
from .processes import run
from .schedule_model import Problem, memory

MIB = 1 << 20
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
WORLDS, WIDE = (2, 4, 8), (256, 2048)  # rows and width where blocks are large beside everything else
ROWS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Step:
    """A loss on ``rows`` pairs of embeddings a process; ``rows`` samples of two views for nt_xent and sup_con."""

    loss: str
    strategy: str
    rows: int
    dim: int


def _nt_xent(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    return ff.NTXentLoss(distributed=strategy)


def _sup_con(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    loss = ff.SupConLoss(distributed=strategy)
    return lambda x, y: loss(torch.stack((x, y), 1), torch.arange(len(x)) // 4)


def _clip(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    loss = ff.ClipLoss(distributed=strategy)
    return lambda x, y: loss(x, y, 10.0)


def _siglip(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    loss = ff.SigLipLoss(distributed=strategy)
    return lambda x, y: loss(x, y, 10.0, -5.0)


def _info_nce(strategy: str) -> Callable[[Tensor, Tensor], Tensor]:
    return ff.InfoNCELoss(distributed=strategy)


LOSSES = {"clip": _clip, "siglip": _siglip, "info_nce": _info_nce, "nt_xent": _nt_xent, "sup_con": _sup_con}


def peak_of(step: Callable[[], object]) -> int:
    """Bytes resident at most during ``step()`` beyond those before it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)  # fixed: glibc would raise it after the first large block is freed
    libc.mallopt(_TRIM_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from now
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def tensor_peak_of(step: Callable[[], object]) -> int:
    """Bytes in tensors at most during ``step()`` beyond those before it; workspace inside kernels is not among them."""
    gc.collect()
    with profile(profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system's /proc/self/status has no {name}")


def peaks(rank: int, world: int, steps: list[Step], measured: Callable = peak_of) -> list[int]:
    """Bytes of each step on this process; run in each of ``world`` processes of a group."""
    found = []
    for step in steps:
        loss = LOSSES[step.loss](step.strategy)
        for _ in range(2):  # once for what stays: libraries, buffers of the backend, thread pools
            x, y = (normalize(torch.randn(step.rows, step.dim), dim=1).requires_grad_() for _ in range(2))
            dist.barrier()
            peak = measured(lambda loss=loss, x=x, y=y: loss(x, y).backward())
        found.append(peak)
    return found


def measure(world: int, steps: list[Step]) -> list[int]:
    """The largest peak over ``world`` processes of each step, in bytes."""
    return [max(of_ranks) for of_ranks in zip(*run(world, peaks, steps), strict=True)]


def expected(step: Step, world: int) -> float:
    """Bytes that the model on paper gives, with the gradients that the step leaves and the rows that it normalises."""
    symmetric = step.loss in ("nt_xent", "sup_con")
    own = 4 * step.rows * step.dim
    problem = Problem(world, step.rows * (2 if symmetric else 1), step.dim, symmetric=symmetric)
    copies = 0 if step.loss in ("clip", "siglip") else 2
    return memory(problem, step.strategy) + (2 + copies) * own


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rank_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of processes")
    parser.add_argument("--wide", type=int, nargs=2, default=WIDE, help="rows and width on all numbers of processes")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="rows a process, on the first number of them")
    parser.add_argument("--dim", type=int, default=128, help="width of those")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--json", type=Path, help="file to write")
    flags = parser.parse_args(argv)
    records = []
    ways = [(loss, way) for loss in flags.losses for way in ("gather", "ring")]
    for world in flags.worlds:
        sizes = [tuple(flags.wide)]
        if world == flags.worlds[0]:
            sizes += [(rows, flags.dim) for rows in flags.rows]
        steps = [Step(*way, *size) for size in sizes for way in ways]
        for step, peak in zip(steps, measure(world, steps), strict=True):
            paper = expected(step, world)
            records.append({"world": world, **asdict(step), "peak_bytes": peak, "paper_bytes": int(paper)})
            print(
                f"{step.loss:8} {step.strategy:6} {world:3} processes, {step.rows:5} x {step.dim} each:"
                f" peak {peak / MIB:8.2f} MiB, on paper {paper / MIB:8.2f} MiB",
                flush=True,
            )
        if flags.json:
            _store(flags.json, records)
    return 0


def _store(path: Path, records: list[dict]) -> None:
    from benchmarks.machine import device
    from benchmarks.store import stamp

    what = {"what": "largest peak over the processes, bytes beyond those before a step, gradients included"}
    head = json.dumps({**what, "device": device()["name"], **stamp()})
    lines = ",\n".join("  " + json.dumps(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{head[:-1]},\n "records": [\n{lines}\n ]}}\n')


if __name__ == "__main__":
    sys.exit(main())

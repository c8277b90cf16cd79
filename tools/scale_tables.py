"""The tables of docs/large_batches.md, from stored measurements and from the model on paper.

    python -m tools.scale_tables           print them
    python -m tools.scale_tables --write   renew them in the page, between their markers, and the picture

``benchmarks/results/processes/`` holds the measurements: memory.json (tools.rank_memory) and schedule.json
(tools.simulate_ranks --real); times of kernels are those of one GPU's file beside it (tools.gpu_measure).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store

from . import pretrain_runs
from .files import write_text
from .schedule_model import Kernels, Machine, Problem, crossover, memory, seconds, traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "large_batches.md"
RESULTS = ROOT / "benchmarks" / "results" / "processes"
MIB = 1 << 20

GPU_RECORD = store.RESULTS / "gpu-nvidia-h200.json"  # of one GPU
# Stated, not measured, for every GPU; see the page.
LINKS = Machine(rate=0.0, bandwidth=4e10, latency=2e-5, hop=4e-6)
FREE, DIM, ELEMENT = 20e9, 512, 2
WORLDS, ROWS = (8, 64, 256, 1024), (256, 1024, 4096, 16384)


def load(name: str) -> dict[str, Any]:
    """One of the stored files."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the columns after the first are aligned right."""
    lines = [head, ["--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(found: dict[str, Any]) -> str:
    return f"{found['device']}, {found['when']}, commit {found['commit']}"


def memory_tables() -> str:
    """By number of processes at the widest size, then by rows on the fewest processes."""
    found = load("memory")
    records = found["records"]
    worlds = sorted({r["world"] for r in records})
    width, dim = max(r["dim"] for r in records), min(r["dim"] for r in records)
    wide = next(r["rows"] for r in records if r["dim"] == width)
    sizes = sorted({r["rows"] for r in records if r["dim"] == dim})
    by_key = {(r["loss"], r["strategy"], r["world"], r["rows"], r["dim"]): r for r in records}
    ways = list(dict.fromkeys((r["loss"], r["strategy"]) for r in records))

    def cell(*key: Any) -> str:
        return f"{by_key[key]['peak_bytes'] / MIB:.1f}"

    grown = [[f"{loss}, {way}", *(cell(loss, way, world, wide, width) for world in worlds)] for loss, way in ways]
    longer = [[f"{loss}, {way}", *(cell(loss, way, worlds[0], rows, dim) for rows in sizes)] for loss, way in ways]
    plain = [f"{4 * rows * rows * worlds[0] / MIB:.0f}" for rows in sizes]
    return "\n\n".join(
        (
            f"{wide} rows of {width} float32 a process ({4 * wide * width / MIB:g} MiB), MiB:",
            table(["loss", *(f"{world} processes" for world in worlds)], grown),
            f"{worlds[0]} processes, rows of {dim}, MiB; the last line is one matrix of a process's rows by all keys,"
            " which nothing holds:",
            table(
                ["loss", *(f"{rows} rows each" for rows in sizes)],
                [*longer, ["rows x keys, float32", *plain]],
            ),
            f"Measured on {source(found)}.",
        )
    )


def schedule_table() -> str:
    """Predicted and real times."""
    found = load("schedule")
    rows = []
    for r in found["records"]:
        machine, ratio = r["machine"], r["real_seconds"] / r["predicted_seconds"]
        rows.append(
            [
                f"{r['world']} processes, {r['rows']} rows of {r['dim']}, {r['strategy']}",
                f"{machine['rate'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.2f} GB/s,"
                f" {1e6 * machine['latency']:.0f} µs, {1e6 * machine['hop']:.0f} µs",
                f"{1e3 * r['predicted_seconds']:.1f} ms",
                f"{1e3 * r['real_seconds']:.1f} ms ({' to '.join(f'{1e3 * x:.0f}' for x in r['real_range'])})",
                f"{ratio:.2f}",
            ]
        )
    head = ["step of CLIP", "measured parts: rate, link, message, hop", "predicted", "real (range)", "real / predicted"]
    return f"{table(head, rows)}\n\nMeasured on {source(found)}."


def measured(dim: int | None = None) -> list[dict[str, Any]]:
    """The record's losses of CLIP in bfloat16 by the Triton kernels, of width ``dim`` or any, by size."""
    found = [
        r
        for r in store.load(GPU_RECORD)["records"]
        if (r["family"], r["provider"], r["dtype"]) == ("clip", "triton", "bfloat16")
        and (dim is None or r["shape"][1] == dim)
    ]
    if len(found) < 2:
        raise ValueError(f"{GPU_RECORD} has {len(found)} measurements of CLIP of width {dim}; two are needed")
    return sorted(found, key=lambda r: r["shape"])


def _passes(time: dict[str, Any], which: str) -> tuple[float, float]:
    """Seconds of the forward and the backward pass: "" as called, "device_" as the GPU worked."""
    forward = time[f"forward_{which}seconds"]
    return forward, time[f"{which}seconds"] - forward


def kernels(dim: int) -> Kernels:
    """What one GPU was measured to take for the loss of n rows by n keys: the GPU's own time by size, where it was
    measured apart (a step of seconds is the GPU's own anyway), and the least that any call took as called."""
    found = [(2.0 * r["shape"][0] ** 2 * dim, r["time"]) for r in measured(dim)]
    device = tuple((work, *_passes(t, "device_" if "device_seconds" in t else "")) for work, t in found)
    called = [_passes(t, "") for _, t in found]
    return Kernels(device, (min(f for f, _ in called), min(b for _, b in called)))


def gpu(dim: int = DIM) -> Machine:
    """A GPU as measured, on the links as stated."""
    return dataclasses.replace(LINKS, kernels=kernels(dim))


def rates_table() -> str:
    """What the model takes from the record, and how the rate falls for small blocks and narrow embeddings."""
    rows = []
    for r in measured():
        (n, dim), time = r["shape"], r["time"]
        if n % 1024:
            continue
        spent = time.get("device_seconds", time["seconds"])
        rows.append(
            [
                f"{n:,} x {dim}",
                *(f"{1e3 * x:,.2f} ms" for x in (time["forward_seconds"], time["seconds"])),
                *(
                    f"{1e3 * time[name]:,.2f} ms" if name in time else "the same"
                    for name in ("forward_device_seconds", "device_seconds")
                ),
                f"{8e-12 * n * n * dim / spent:.0f} TFLOP/s",
            ]
        )
    head = ["rows x D", "forward, as called", "and backward", "forward, GPU", "and backward, GPU", "4 U / GPU time"]
    times = sorted({f"{r['time']['when']}, commit {r['time']['commit']}" for r in measured()})
    host = kernels(DIM).host
    name = store.load(GPU_RECORD)["device"]["name"]
    return (
        f"{table(head, rows)}\n\nMeasured on one {name}, {'; '.join(times)} (`benchmarks/results/{GPU_RECORD.name}`):"
        f" CLIP in bfloat16, Triton kernels. With D = {DIM} no call took less than {1e3 * host[0]:.2f} ms forward and"
        f" {1e3 * host[1]:.2f} ms backward, however few its rows: that is the host's time."
    )


def _cell(p: Problem, way: str, machine: Machine) -> str:
    return f"{_size(traffic(p, way))}, {_size(memory(p, way))}, {1e3 * seconds(p, way, machine):.1f} ms"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def paper_table(machine: Machine | None = None, free: float = FREE, dim: int = DIM, element: int = ELEMENT) -> str:
    """Per step and process, for CLIP, by processes and batch; ``machine`` None: a GPU as measured."""
    machine = machine or gpu(dim)
    rows = []
    for world in WORLDS:
        for each in ROWS:
            p = Problem(world, each, dim, element)
            ways = [_cell(p, way, machine) for way in ("gather", "ring")]
            rows.append([str(world), str(each), f"{world * each:,}", *ways, crossover(p, machine, free)])
    head = ["GPUs", "rows each", "batch", "gather: sent, memory, time", "ring: sent, memory, time", "take"]
    return table(head, rows)


def crossover_table() -> str:
    """The rows a process from which on the ring is faster, by processes and speed of the link; the last line without
    what calls cost the host."""
    links = (1e10, 4e10, 1e11, 4e11)
    machine = gpu()
    idle = dataclasses.replace(machine, kernels=Kernels(kernels(DIM).device))

    def line(name: str, world: int, machine: Machine) -> list[str]:
        fewest = (ring_from(world, DIM, ELEMENT, dataclasses.replace(machine, bandwidth=link)) for link in links)
        return [name, *(str(rows or "never") for rows in fewest)]

    rows = [line(str(world), world, machine) for world in WORLDS]
    rows.append(line(f"{WORLDS[1]}, were calls free", WORLDS[1], idle))
    return table(["GPUs", *(f"{link / 1e9:g} GB/s" for link in links)], rows)


def ring_from(world: int, dim: int, element: int, machine: Machine, most: int = 1 << 17) -> int | None:
    """The fewest rows a process, to 64, from which on a ring's step is the faster one up to ``most`` rows."""
    fewest = None
    for rows in range(most, 0, -64):
        p = Problem(world, rows, dim, element)
        if seconds(p, "ring", machine) >= seconds(p, "gather", machine):
            break
        fewest = rows
    return fewest


def pretrain_table() -> str:
    """The stored pretraining runs."""
    return f"{table(pretrain_runs.HEAD, pretrain_runs.rows())}\n\nMeasured on {pretrain_runs.sources()}."


BLOCKS: dict[str, Callable[[], str]] = {
    "memory": memory_tables,
    "pretrain": pretrain_table,
    "schedule": schedule_table,
    "rates": rates_table,
    "paper": paper_table,
    "crossover": crossover_table,
}


def renewed(text: str) -> str:
    """``text`` with every block as it is now. Raises ValueError for a block without its markers."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: python -m tools.scale_tables --write -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{PAGE} has no {begin} ... {end}")
        text = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scale_tables", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="renew docs/large_batches.md")
    flags = parser.parse_args(argv)
    if flags.write:
        write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8")))
        if not pretrain_runs.is_current():
            pretrain_runs.draw()
    else:
        print("\n\n".join(make() for make in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tables of docs/large_batches.md, from stored measurements and from the model on paper.

    python -m tools.scale_tables           print them
    python -m tools.scale_tables --write   renew them in the page, between their markers

``benchmarks/results/processes/`` holds the measurements: memory.json (tools.rank_memory) and schedule.json
(tools.simulate_ranks --real).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .files import write_text
from .schedule_model import Machine, Problem, crossover, memory, seconds, traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "large_batches.md"
RESULTS = ROOT / "benchmarks" / "results" / "processes"
MIB = 1 << 20

# Assumed for every GPU; see the page.
GPU = Machine(rate=4e14, bandwidth=4e10, latency=2e-5, hop=4e-6, call=3e-5)
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
                f" {1e6 * machine['latency']:.0f} µs",
                f"{1e3 * r['predicted_seconds']:.1f} ms",
                f"{1e3 * r['real_seconds']:.1f} ms",
                f"{ratio:.2f}",
            ]
        )
    head = ["step of CLIP", "measured parts: rate, link, message", "predicted", "real", "real / predicted"]
    return f"{table(head, rows)}\n\nMeasured on {source(found)}."


def _cell(p: Problem, way: str, machine: Machine) -> str:
    return f"{_size(traffic(p, way))}, {_size(memory(p, way))}, {1e3 * seconds(p, way, machine):.1f} ms"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def paper_table(machine: Machine = GPU, free: float = FREE, dim: int = DIM, element: int = ELEMENT) -> str:
    """Per step and process, for CLIP, by processes and batch, from the assumptions alone."""
    rows = []
    for world in WORLDS:
        for each in ROWS:
            p = Problem(world, each, dim, element)
            ways = [_cell(p, way, machine) for way in ("gather", "ring")]
            rows.append([str(world), str(each), f"{world * each:,}", *ways, crossover(p, machine, free)])
    head = ["GPUs", "rows each", "batch", "gather: sent, memory, time", "ring: sent, memory, time", "take"]
    return table(head, rows)


def crossover_table(machine: Machine = GPU, dim: int = DIM, element: int = ELEMENT) -> str:
    """The rows a process from which on the ring is faster, by processes and speed of the link."""
    links = (1e10, 4e10, 1e11, 4e11)
    rows = []
    for world in WORLDS:
        cells = []
        for link in links:
            other = Machine(machine.rate, link, machine.latency, machine.hop, machine.call)
            cells.append(str(ring_from(world, dim, element, other) or "never"))
        rows.append([str(world), *cells])
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


BLOCKS: dict[str, Callable[[], str]] = {
    "memory": memory_tables,
    "schedule": schedule_table,
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
    else:
        print("\n\n".join(make() for make in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

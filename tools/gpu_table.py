"""Markdown of what ``tools.gpu_measure`` stored: a row a workload, and every GPU bar.

python -m tools.gpu_table FOLDER/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = ("triton", "cuda", "auto")  # our kernels; "panels", our plain PyTorch, is one of the others, but no peer
NO_PEERS = (*OURS, "key", "name", "rows", "width")


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, torch {result['torch']}: bf16 product {result['product_tflops']} TFLOP/s, "
        f"device copy {result['copy_gbytes']} GB/s.",
        "",
        "Milliseconds as called, and of the kernels alone (device): fractions are of the latter where there is one.",
        "",
        "| workload | kernels | forward ms | device | fraction | both ms | device | fraction | MiB | same bits "
        "| others: both ms (device) |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in result["rows"]:
        others = "; ".join(f"{name} {_both(x)}" for name, x in row.items() if name not in NO_PEERS)
        for name in OURS:
            if name in row:
                cells = " | ".join(_cells(row[name]))
                lines.append(f"| {row['key']} | {name} | {cells} | {others.replace('|', '/')} |")
    for name in OURS:
        if any(name in row for row in result["rows"]):
            lines += ["", f"| bar, {name} | measured | |", "|---|---|---|"]
            lines += [f"| {text} | {measured} | {verdict} |" for text, measured, verdict in bars(result["rows"], name)]
    return "\n".join(lines) + "\n"


def _cells(found: dict) -> list[str]:
    if "problem" in found:
        return [f"failed: {found['problem']}".replace("|", "/"), *[""] * 7]
    names = [f"{which} {what}" for which in ("forward", "both") for what in ("ms", "device ms", "fraction")]
    names += ["MiB", "same bits"]
    return [str(found.get(name, "")) for name in names]


def _both(found: dict) -> str:
    if "problem" in found:
        return found["problem"].split(":")[0]
    device = found.get("both device ms")
    return f"{found['both ms']}" + (f" ({device})" if device else "")


def bars(rows: list[Row], kernels: str) -> Iterator[tuple[str, str, str]]:
    """(bar, what was measured, "met", "missed" or "not measured") for the kernels of one of OURS."""
    done = [row for row in rows if "both ms" in row.get(kernels, {})]

    def of(name: str, **sizes: int) -> list[Row]:
        return [r for r in done if r["name"] == name and all(r[k] == v for k, v in sizes.items())]

    def ours(row: Row, what: str) -> float:
        return row[kernels][what]

    def bar(text: str, of_rows: list[Row], value: Callable[[Row], float | None], ok: Callable[[float], bool]):
        values = [(row["key"], v) for row in of_rows if (v := value(row)) is not None]
        if not values:
            return text, "", "not measured"
        shown = "; ".join(f"{key}: {v:.3g}" for key, v in values)
        return text, shown, "met" if all(ok(v) for _, v in values) else "missed"

    def over(*names: str) -> Callable[[Row], float | None]:
        """The fastest of the named others' time over ours, both as called: what a user gets."""

        def ratio(row: Row) -> float | None:
            times = [row[n]["both ms"] for n in names if "both ms" in row.get(n, {})]
            return min(times) / ours(row, "both ms") if times else None

        return ratio

    def fastest_peer(row: Row) -> float | None:
        return over(*(n for n in row if n not in (*NO_PEERS, "panels", "plain", "compiled")))(row)

    def own_symmetric(row: Row) -> float | None:
        same = of("clip", rows=row["rows"], width=row["width"])
        return ours(same[0], "both ms") / ours(row, "both ms") if same else None

    wide = [r for r in of("clip") if r["rows"] >= 32768 and r["width"] >= 512]
    triangle = [*of("nt_xent"), *of("sup_con")]
    memory = [*of("goodness + normalise"), *of("pair cosine"), *of("unit rows")]
    million = of("clip, a million")
    yield bar("CLIP, D >= 512, N >= 32k, forward: >= 80 % of the product", wide,
              lambda r: ours(r, "forward fraction"), lambda v: v >= 0.8)  # fmt: skip
    yield bar("CLIP, D >= 512, N >= 32k, both: >= 70 % of the product", wide,
              lambda r: ours(r, "both fraction"), lambda v: v >= 0.7)  # fmt: skip
    yield bar("CLIP, N = 65536, D = 512, both: <= 32 ms", of("clip", rows=65536, width=512),
              lambda r: ours(r, "both ms"), lambda v: v <= 32)  # fmt: skip
    yield bar("CLIP: >= 1.5 x memeff", of("clip"), over("memeff"), lambda v: v >= 1.5)
    yield bar("CLIP: >= 2 x eager", wide, over("open_clip", "plain"), lambda v: v >= 2)
    yield bar("CLIP, N <= 8k: not slower than compiled eager", [r for r in of("clip") if r["rows"] <= 8192],
              over("compiled"), lambda v: v >= 1)  # fmt: skip
    yield bar("NT-Xent, SupCon: >= 1.7 x our own symmetric path", triangle, own_symmetric, lambda v: v >= 1.7)
    yield bar("NT-Xent, SupCon: >= 2.5 x the fastest peer", triangle, fastest_peer, lambda v: v >= 2.5)
    yield bar("1M x 1M, D = 512, both: < 8.5 s", million, lambda r: ours(r, "both ms") / 1e3, lambda v: v < 8.5)
    yield bar("1M x 1M, D = 512: < 8 GB", million, lambda r: ours(r, "MiB") * 2**20 / 1e9, lambda v: v < 8)
    for which in ("forward", "both"):
        yield bar(f"Goodness, normalise, pair cosine, {which}: >= 88 % of a copy", memory,
                  lambda r, which=which: ours(r, f"{which} fraction"), lambda v: v >= 0.88)  # fmt: skip
    yield bar("The same bits on every run", done, lambda r: r[kernels].get("same bits"), lambda v: bool(v))


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")

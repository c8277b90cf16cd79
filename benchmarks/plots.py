"""The plots of the stored measurements."""

from __future__ import annotations

import os
from math import nan
from pathlib import Path
from typing import Any

from . import rooflines

Results = dict[str, Any]

PLOTS = {
    "speedups": "Time of other libraries over ours, forward and backward",
    "scaling": "Time and peak memory of NT-Xent against the batch size",
    "roofline": "Useful work per second against work per byte, under this machine's own product and copy",
    "fractions": "Our rate as a fraction of the ceiling measured in the same rounds",
}
SUMMARY = ("speedups", "scaling")  # those of the README; the site shows all

# Okabe and Ito's palette: told apart with any kind of colour vision
_OURS, _PANELS, _RIVAL, _OTHER = "#0072B2", "#56B4E9", "#D55E00", "#999999"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.hashsalt": "ffcl_fast",
}
_CURVE_SIZES = 3  # fewer points make no curve
_SPEEDUPS = (
    # workload, rival, label
    ("nt_xent-8192x128", "lightly", "NT-Xent, 8192 × 128, lightly"),
    ("nt_xent-8192x512", "lightly", "NT-Xent, 8192 × 512, lightly"),
    ("sup_con-8192x128", "SupContrast", "SupCon, 8192 × 128, SupContrast's formula"),
    ("sup_con-8192x512", "SupContrast", "SupCon, 8192 × 512, SupContrast's formula"),
    ("clip-8192x128", "open_clip", "CLIP, 8192 × 128, open_clip"),
    ("clip-8192x512", "open_clip", "CLIP, 8192 × 512, open_clip"),
    ("info_nce-8192x128", "info-nce-pytorch", "InfoNCE, 8192 × 128, info-nce-pytorch"),
    ("siglip-8192x512", "open_clip", "SigLIP, 8192 × 512, open_clip"),
    ("nt_xent-512x512", "lightly", "NT-Xent, 512 × 512, lightly"),
    ("sup_con-512x512", "SupContrast", "SupCon, 512 × 512, SupContrast's formula"),
    ("clip-512x512", "open_clip", "CLIP, 512 × 512, open_clip"),
    ("pair_cosine-64x64x56x56", "CosineEmbeddingLoss", "Pair cosine, 64 × 64 × 56², torch.nn"),
    ("goodness_normalize-4096x2048", "eager, shared", "ReLU + goodness + normalise, eager"),
)


def available(results: Results) -> list[str]:
    """The plots that there are measurements for."""
    sizes = {
        r["shape"][0]
        for r in results["records"]
        for name in rooflines.OURS
        if _on_curve(r, name) and "seconds" in r.get("time", {})
    }
    found = ["speedups"] if _speedup_rows(results) else []
    found += ["scaling"] if len(sizes) >= _CURVE_SIZES else []
    found += ["roofline"] if rooflines.roofs(results) and rooflines.points(results) else []
    return found + (["fractions"] if rooflines.fractions(results) else [])


def draw(name: str, results: Results, path: Path, digest: str) -> None:
    """Draw one of :data:`PLOTS` to ``path``, a .png or .svg, with ``digest`` in its metadata."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        drawn = {"speedups": _speedups, "scaling": _scaling, "roofline": rooflines.draw_roofline,
                 "fractions": rooflines.draw_fractions}  # fmt: skip
        figure = drawn[name](results)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        unstable = "Date" if path.suffix == ".svg" else "Software"  # what would differ from one drawing to the next
        try:
            figure.savefig(scratch, dpi=130, bbox_inches="tight", metadata={"Description": digest, unstable: None})
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
            pyplot.close(figure)


def _speedup_rows(results: Results) -> list[tuple[str, dict[str, Any]]]:
    times = {(r["workload"], r["provider"]): r.get("time", {}) for r in results["records"]}
    return [
        (label, times[workload, rival])
        for workload, rival, label in reversed(_SPEEDUPS)
        if "over_ours" in times.get((workload, rival), {})
    ]


def _speedups(results: Results):
    from matplotlib import pyplot

    rows = _speedup_rows(results)
    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.32 * len(rows)))
    values = [time["over_ours"] for _, time in rows]
    spread = [
        [v - t["over_ours_quartiles"][0] for v, (_, t) in zip(values, rows, strict=True)],
        [t["over_ours_quartiles"][1] - v for v, (_, t) in zip(values, rows, strict=True)],
    ]
    axes.barh([label for label, _ in rows], values, color=_OURS, height=0.66)
    axes.errorbar(values, range(len(rows)), xerr=spread, fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
    for y, (value, above) in enumerate(zip(values, spread[1], strict=True)):
        axes.annotate(f"{value:.1f} ×", (value + above, y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="#444444", linewidth=1, linestyle=":")
    axes.set_title(
        f"times faster than the library named, forward + backward, {results['device']['threads']} CPU threads",
        loc="left",
    )
    axes.set_xlim(0, 1.12 * max((v + a for v, a in zip(values, spread[1], strict=True))))
    axes.tick_params(axis="y", length=0)
    return figure


def _scaling(results: Results):
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    series = {
        "lightly": ("lightly", _RIVAL, "s"),
        "lightly, compiled": ("lightly, torch.compile", _OTHER, "D"),
        "panels": ("ffcl_fast, plain PyTorch", _PANELS, "^"),
        "cpu": ("ffcl_fast", _OURS, "o"),
        "triton": ("ffcl_fast, Triton", _OURS, "o"),
        "cuda": ("ffcl_fast, CUDA", "#009E73", "v"),
    }
    # a GPU's allocator tells the peak of every timed run; on a CPU it takes a process of its own
    memory = "time" if results["device"]["kind"] == "gpu" else "memory"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.1))
    for axes, part, value, unit, title in (
        (left, "time", "seconds", _seconds, "time, forward + backward"),
        (right, memory, "peak_bytes", _bytes, "peak memory beyond inputs and gradients"),
    ):
        curves = {
            provider: sorted(
                (r for r in results["records"] if _on_curve(r, provider) and part in r), key=lambda r: r["shape"][0]
            )
            for provider in series
        }
        ticks = sorted({r["shape"][0] for records in curves.values() for r in records})
        for provider, (label, colour, marker) in series.items():
            records = curves[provider]
            points = [(r["shape"][0], r[part][value]) for r in records if r[part].get(value)]
            if not points:
                continue
            seen = dict(points)  # no line across a size that was left out
            heights = [seen.get(n, nan) for n in ticks]
            axes.plot(ticks, heights, color=colour, marker=marker, markersize=4, label=label)
            lost = [r["shape"][0] for r in records if r[part].get("problem", "").startswith("out of memory")]
            if lost:
                n, y = points[-1]
                axes.plot([n, lost[0]], [y, y * (lost[0] / n) ** 2], color=colour, linestyle=":", linewidth=1)
                axes.plot(lost[0], y * (lost[0] / n) ** 2, marker="x", color=colour, markersize=8, mew=2)
                axes.annotate("out of memory", (lost[0], y * (lost[0] / n) ** 2), xytext=(-8, 2),
                              textcoords="offset points", ha="right", fontsize=8, color=colour)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [_thousands(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(unit))
        axes.grid(alpha=0.3)
        axes.set_xlabel("rows, 2N")
        axes.set_title(title, loc="left")
    left.legend(fontsize=8)
    figure.suptitle("NT-Xent, D = 128", x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    return figure


def _on_curve(record: dict[str, Any], provider: str) -> bool:
    rows, *width = record["shape"]
    doubled = not rows & (rows - 1)  # other sizes are of other questions
    return record["family"] == "nt_xent" and width == [128] and doubled and record["provider"] == provider


def _thousands(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _seconds(value: float, _: object) -> str:
    return f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms"


def _bytes(value: float, _: object) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"

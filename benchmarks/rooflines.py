"""How near to the machine: our rates under the roofs of its own matrix product and copy, from stored records only."""

from __future__ import annotations

import math
from typing import Any

Results = dict[str, Any]

OURS = ("cpu", "triton", "cuda")  # our kernels; the row panels are no kernel
_COLOURS = {"cpu": "#0072B2", "triton": "#0072B2", "cuda": "#009E73"}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Memory-bound families: (operations, bytes moved in float32) an element, forward and backward. ReLU, square, sum and
# division, then a dot product and two multiply-adds; pair cosine: three dot products and two gradients.
_PER_ELEMENT = {"goodness_normalize": (10, 20), "pair_cosine": (12, 16), "pair_cosine_nhwc": (12, 16)}


def _timed(results: Results, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    return [r for r in results["records"] if r.get("kind") in kinds and "seconds" in r.get("time", {})]


def roofs(results: Results) -> tuple[float, float] | None:
    """The best product in operations a second and the best copy in bytes a second, or None without both."""
    ceilings = _timed(results, ("ceiling",))
    products = [1e12 * r["time"]["tflops"] for r in ceilings if r["time"].get("tflops")]
    copies = [1e9 * r["time"]["gigabytes_per_second"] for r in ceilings if r["time"].get("gigabytes_per_second")]
    return (max(products), max(copies)) if products and copies else None


def points(results: Results) -> list[tuple[str, str, float, float]]:
    """(workload, provider, operations a byte, operations a second) of our kernels.

    Products are counted against the bytes of their inputs read twice and their gradients written once.
    """
    found = []
    for r in _timed(results, ("ours",)):
        time = r["time"]
        if r["provider"] not in OURS:
            continue
        if time.get("tflops"):
            work = 1e12 * time["tflops"] * time["seconds"]
            rows = sum(r["shape"][:-1]) * (1 if len(r["shape"]) == 3 or r["units"] == 2 else 2)
            moved = 3 * rows * r["shape"][-1] * _SIZES.get(r.get("dtype", ""), 4)
            found.append((r["workload"], r["provider"], work / moved, 1e12 * time["tflops"]))
        elif r["family"] in _PER_ELEMENT:
            operations, moved = _PER_ELEMENT[r["family"]]
            rate = 1e9 * time["gigabytes_per_second"]
            found.append((r["workload"], r["provider"], operations / moved, rate * operations / moved))
    return found


def fractions(results: Results) -> list[tuple[str, str, float]]:
    """(workload, provider, fraction of the ceiling) of our kernels."""
    return [
        (r["workload"], r["provider"], r["time"]["fraction_of_ceiling"])
        for r in _timed(results, ("ours",))
        if r["provider"] in OURS and r["time"].get("fraction_of_ceiling")
    ]


def draw_roofline(results: Results):
    from matplotlib import pyplot

    product, copy = roofs(results) or (math.nan, math.nan)
    found = points(results)
    figure, axes = pyplot.subplots(figsize=(7.5, 4))
    least, most = min(x for _, _, x, _ in found) / 2, 4 * max(max(x for _, _, x, _ in found), product / copy)
    line = [least, product / copy, most]
    axes.plot(line, [min(product, copy * x) for x in line], color="#444444", linewidth=1.2)
    axes.annotate(f"torch.mm, {product / 1e9:,.0f} GFLOP/s", (most, product), xytext=(0, 4), ha="right",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.annotate(f"copy, {copy / 1e9:.0f} GB/s", (least, copy * least), xytext=(10, 18),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    families = sorted({workload.partition("-")[0] for workload, *_ in found})
    markers = dict(zip(families, "osD^v<>Pp*Xhd1234" * (1 + len(families) // 17), strict=False))
    for family in families:
        own = [(x, y, _COLOURS[p]) for w, p, x, y in found if w.partition("-")[0] == family]
        axes.scatter(*zip(*[(x, y) for x, y, _ in own], strict=True), s=28, marker=markers[family], label=family,
                     c=[colour for *_, colour in own])  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("counted operations a byte that has to move")
    axes.set_ylabel("counted operations a second")
    axes.set_title("useful work, forward + backward", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_fractions(results: Results):
    from matplotlib import pyplot

    found = sorted(fractions(results), reverse=True)
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.2 * len(found)))
    places = range(len(found))
    axes.barh(places, [x for *_, x in found], color=[_COLOURS[p] for _, p, _ in found], height=0.7)
    axes.set_yticks(places, [f"{w}, {p}" for w, p, _ in found], fontsize=7)
    for y, (*_, x) in enumerate(found):
        axes.annotate(f"{x:.0%}", (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(1, color="#444444", linewidth=1, linestyle=":")
    axes.set_title("useful work over torch.mm's or copy_'s rate in the same rounds", loc="left")
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.01)
    return figure

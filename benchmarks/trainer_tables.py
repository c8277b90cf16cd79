"""What the stored measurements of the trainer say: two tables and two bars."""

from __future__ import annotations

from typing import Any

from .verdict import MET, MISSED, NOT_MEASURED, Bar, Results, Verdict

_PLAIN, _END_TO_END = "plain PyTorch, leaf modules", "end-to-end back-propagation"
_REQUIRED = 2.5
_EQUAL = 0.02  # largest difference of a layer's loss that is called the same training


def tables(stored: dict[str, Any]) -> str:
    """Time and memory as two Markdown tables."""
    head = "local stage, a step of {batch} pairs of {pixels} x {pixels}, {backbone}".format(**stored)
    lines = [f"| {head} | images/s | against plain PyTorch | largest difference of a layer's loss |"]
    lines += ["|---|--:|--:|--:|"]
    for name, record in stored["steps"].items():
        if "time" in record:
            t = record["time"]
            ratio = f"{t['speedup']:.2f} x" if "speedup" in t else ""
            loss = f"{t['loss_difference']:.1e}" if "speedup" in t else ""
            lines.append(f"| {name} | {t['images_per_second']:.0f} | {ratio} | {loss} |")
    if bound := _bound(stored["steps"]):
        lines += ["", bound]
    lines += ["", "| peak memory of a step beyond weights, gradients and Adam's state | MB |", "|---|--:|"]
    for name, record in stored["steps"].items():
        if "memory" in record:
            lines.append(f"| {name} | {record['memory']['peak_bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def _bound(steps: dict[str, Any]) -> str:
    """How much faster a step could be if all but its convolutions cost nothing."""
    seconds = {name: record["time"]["seconds"] for name, record in steps.items() if "seconds" in record.get("time", {})}
    alone = [value for name, value in seconds.items() if name.startswith("the convolutions alone")]
    if not alone or _PLAIN not in seconds:
        return ""
    share = min(alone) / seconds[_PLAIN]
    return (
        f"PyTorch's own convolutions take {share:.0%} of the plain step over leaf modules, in the better of the memory"
        f" formats: with them, no step can be more than {1 / share:.2f} x as fast, whatever the rest costs."
    )


def speed(results: Results) -> Verdict:
    """The better of our memory formats over the same stage written the usual way, module after module."""
    steps = results.get("trainer", {}).get("steps", {})
    times = {name: r["time"] for name, r in steps.items() if r.get("time", {}).get("over") == _PLAIN}
    if not times:
        return Verdict(NOT_MEASURED)
    name = max(times, key=lambda n: times[n]["speedup"])
    best = times[name]
    low, high = best["speedup_quartiles"]
    note = f"{name}: quartiles {low:.2f} to {high:.2f}, {best['rounds']} rounds"
    if best["loss_difference"] > _EQUAL:
        return Verdict(MISSED, f"{best['speedup']:.2f} x", f"losses differ by {best['loss_difference']:.1e}; {note}")
    return Verdict(MET if best["speedup"] >= _REQUIRED else MISSED, f"{best['speedup']:.2f} x", note)


def memory(results: Results) -> Verdict:
    """The most that a local step of ours takes, over a step of end-to-end back-propagation."""
    steps = results.get("trainer", {}).get("steps", {})
    peaks = {name: r["memory"]["peak_bytes"] for name, r in steps.items() if r.get("memory", {}).get("peak_bytes")}
    ours = [peak for name, peak in peaks.items() if name.startswith("ours")]
    if not ours or _END_TO_END not in peaks:
        return Verdict(NOT_MEASURED)
    ratio = max(ours) / peaks[_END_TO_END]
    return Verdict(MET if ratio < 1 else MISSED, f"{ratio:.2f} x", f"{max(ours) / 1e6:.0f} MB at most")


BARS = [
    Bar("Local stage's images a second, 64 px, batch 64, leaf modules, against plain PyTorch", ">= 2.5 x", speed),
    Bar("Peak memory of a local step, of end-to-end back-propagation's", "< 1 x", memory),
]

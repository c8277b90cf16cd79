"""The GPU's bars of the design and whether one GPU's stored measurements meet them.

Ours is the faster of our kernels in that run: a bar is met by what a user can ask for by name. Fractions of a ceiling
are of the kernels alone where that was measured (`device_seconds`); what is compared with rivals is a call as a user
makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .verdict import MET, MISSED, NOT_MEASURED, Bar, Results, Verdict

OURS = ("triton", "cuda")
_RESNET_AND_ROWS = ("pair_cosine", "pair_cosine_nhwc", "pool_goodness", "pool_goodness_nhwc", "goodness_normalize")
_FRACTION = "forward_fraction_of_ceiling"
_WIDE_CLIP = [f"clip-{n}x{d}" for n in (32768, 65536, 131072, 262144, 1 << 20) for d in (512, 768, 1024)]


def _time(results: Results, workload: str, provider: str) -> dict[str, Any] | None:
    """The timed part of a record, None where it was not run or failed."""
    record = next((r for r in results["records"] if (r["workload"], r["provider"]) == (workload, provider)), {})
    time = record.get("time", {})
    return time if "seconds" in time else None


def _ours(results: Results, workload: str, key: Callable[[dict[str, Any]], float] | None = None) -> dict | None:
    """The better of our kernels: of the shorter call, or of the smaller ``key``."""
    found = [time for name in OURS if (time := _time(results, workload, name))]
    return min(found, key=key or (lambda time: time["seconds"])) if found else None


def _on_device(time: dict[str, Any]) -> float:
    """Seconds of the kernels alone where they were measured, else of the call."""
    return time.get("device_seconds", time["seconds"])


def _ruled(met: list[bool], measured: str, note: str = "") -> Verdict:
    return Verdict(MET if all(met) else MISSED, measured, note) if met else Verdict(NOT_MEASURED)


def utilisation(results: Results) -> Verdict:
    """Forward >= 80 % and both passes >= 70 % of the vendor's product at every measured size of D >= 512, N >= 32k."""
    each = ([t for name in OURS if (t := _time(results, w, name)) and _FRACTION in t] for w in _WIDE_CLIP)
    found = [times for times in each if times]
    if not found:
        return Verdict(NOT_MEASURED)
    forward = min(max(time[_FRACTION] for time in times) for times in found)
    both = min(max(time["fraction_of_ceiling"] for time in times) for times in found)
    return _ruled([forward >= 0.8, both >= 0.7], f"{forward:.0%}, {both:.0%}", f"the least of {len(found)} sizes")


def within(workload: str, seconds: float, limit_bytes: float | None = None) -> Callable[[Results], Verdict]:
    """Time, and peak memory beyond inputs and gradients where it is limited."""

    def check(results: Results) -> Verdict:
        time = _ours(results, workload)
        if time is None:
            return Verdict(NOT_MEASURED)
        met = [time["seconds"] <= seconds]
        shown = f"{1e3 * time['seconds']:.1f} ms"
        if limit_bytes is not None:
            peak = time.get("peak_bytes")
            if peak is None:
                return Verdict(NOT_MEASURED, shown, "no peak memory")
            met.append(peak < limit_bytes)
            shown += f", {peak / 1e9:.1f} GB"
        return _ruled(met, shown)

    return check


def _ratios(results: Results, pairs: list[tuple[str, tuple[str, ...], float]]) -> Verdict:
    """(workload, rival by each of its names, required): the rival's time over ours, the fastest under several names; a
    rival that did not run is left out, with a word."""
    met, shown, missing = [], [], []
    for workload, names, required in pairs:
        ours, rival = _ours(results, workload), names[0]
        theirs = {name: time["seconds"] for name in names if (time := _time(results, workload, name))}
        if ours is None or not theirs:
            missing.append(f"{rival} at {workload}")
            continue
        fastest = min(theirs, key=lambda name: theirs[name])
        ratio = theirs[fastest] / ours["seconds"]
        met.append(ratio >= required)
        shown.append(f"{ratio:.2f} x {fastest} at {workload}")
    if not met:
        return Verdict(NOT_MEASURED)
    return _ruled(met, "; ".join(shown), f"not run: {', '.join(missing)}" if missing else "")


def clip_rivals(results: Results) -> Verdict:
    compiled = ("open_clip, compiled", "compiled")  # the second: of tools.gpu_measure, the same loss without a library
    small = [(f"clip-{n}x512", compiled, 1.0) for n in (4096, 8192)]
    return _ratios(results, [("clip-65536x512", ("memeff",), 1.5), ("clip-32768x512", ("open_clip",), 2.0), *small])


def triangle(results: Results) -> Verdict:
    """Against the kernels of our own symmetric path on the same rows, and against the fastest peer's call."""
    symmetric = _ours(results, "clip-32768x128", _on_device)
    met, shown = [], []
    for workload in ("nt_xent-32768x128", "sup_con-32768x128"):
        ours, alone = _ours(results, workload), _ours(results, workload, _on_device)
        peers = [
            r["time"]["seconds"]
            for r in results["records"]
            if r["workload"] == workload and r.get("kind") == "rival" and "seconds" in r.get("time", {})
        ]
        if ours is None or alone is None or symmetric is None or not peers:
            continue
        own = _on_device(symmetric) / _on_device(alone)
        peer = min(peers) / ours["seconds"]
        met += [own >= 1.7, peer >= 2.5]
        shown.append(f"{workload}: {own:.2f} x own, {peer:.2f} x peer")
    return _ruled(met, "; ".join(shown))


def bandwidth(results: Results) -> Verdict:
    """Every timed memory-bound workload's bytes over a copy's."""
    names = {r["workload"] for r in results["records"] if r["family"] in _RESNET_AND_ROWS}
    found = {w: time["fraction_of_ceiling"] for w in names
             if (time := _ours(results, w, _on_device)) and time.get("fraction_of_ceiling") is not None}  # fmt: skip
    if not found:
        return Verdict(NOT_MEASURED)
    worst = min(found, key=lambda w: found[w])
    return _ruled([x >= 0.88 for x in found.values()], f"{found[worst]:.0%}", f"least, at {worst}, of {len(found)}")


def same_bits(results: Results) -> Verdict:
    ours = [
        r for r in results["records"] if r.get("kind") == "ours" and r.get("time", {}).get("deterministic") is not None
    ]
    different = [f"{r['workload']}, {r['provider']}" for r in ours if not r["time"]["deterministic"]]
    shown = f"{len(ours) - len(different)} of {len(ours)}"
    return _ruled([not different] if ours else [], shown, ", ".join(different[:3]))


GPU = [
    Bar(
        "CLIP symmetric, D >= 512, N >= 32k, bf16: forward >= 80 % and forward + backward >= 70 % of the vendor's"
        " product",
        ">= 80 %, >= 70 %",
        utilisation,
    ),
    Bar(
        "CLIP symmetric, N = 65536, D = 512, bf16, forward + backward: <= 32 ms",
        "<= 32 ms",
        within("clip-65536x512", 32e-3),
    ),
    Bar(
        "CLIP symmetric: >= 1.5 x memeff, >= 2 x eager open_clip, never slower than compiled eager at N <= 8k",
        ">= 1.5 x, 2 x, 1 x",
        clip_rivals,
    ),
    Bar("NT-Xent and SupCon: >= 1.7 x our own symmetric path, >= 2.5 x the fastest peer", ">= 1.7 x, 2.5 x", triangle),
    Bar(
        "1M x 1M, D = 512 on one GPU, loss and gradients: < 8.5 s and < 8 GB",
        "< 8.5 s, 8 GB",
        within("clip-1048576x512", 8.5, 8e9),
    ),
    Bar(
        "Goodness, normalise and pair cosine, forward and backward: >= 88 % of a device copy's bytes per second",
        ">= 88 %",
        bandwidth,
    ),
    Bar("The same bits on every run, by default and at full speed", "all", same_bits),
]

"""What is asked of this library against its rivals, and whether stored measurements meet them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import machine, trainer_tables
from .bars_gpu import GPU
from .verdict import MET, MISSED, NOT_MEASURED, NOT_REACHABLE, Bar, Results, Verdict

__all__ = ["CPU", "GPU", "MET", "MISSED", "NOT_MEASURED", "NOT_REACHABLE", "Bar", "Results", "Verdict"]
_MEMORY_LIMIT = 64e6  # bytes beyond inputs and gradients


def find(results: Results, workload: str, provider: str) -> dict[str, Any] | None:
    """The record of a workload and provider, or None."""
    return next((r for r in results["records"] if (r["workload"], r["provider"]) == (workload, provider)), None)


def faster(workload: str, rival: str, required: float) -> Callable[[Results], Verdict]:
    """Our CPU kernels take at most 1/``required`` of the rival's time, forward and backward, in one run."""

    def check(results: Results) -> Verdict:
        record = find(results, workload, rival)
        time = (record or {}).get("time")
        if time is None:
            return Verdict(NOT_MEASURED)
        if "over_ours" not in time:
            return Verdict(NOT_MEASURED, note=time.get("problem", "ours was not in that run"))
        ratio, (low, high) = time["over_ours"], time["over_ours_quartiles"]
        state = MET if ratio >= required else MISSED
        return Verdict(state, f"{ratio:.2f} x", f"quartiles {low:.2f} to {high:.2f}, {time['rounds']} rounds")

    return check


def sixteen_bit(workload: str, required: float) -> Callable[[Results], Verdict]:
    """Our kernels on bfloat16 inputs against themselves on float32 ones."""

    def check(results: Results) -> Verdict:
        time = (find(results, workload, "cpu-bf16") or {}).get("time", {})
        if "over_ours" not in time:
            return Verdict(NOT_MEASURED, note=time.get("problem", ""))
        ratio = 1 / time["over_ours"]
        if ratio >= required:
            return Verdict(MET, f"{ratio:.2f} x")
        if not machine.has_bf16_products(results["device"]):
            return Verdict(NOT_REACHABLE, f"{ratio:.2f} x", "this CPU has no bf16 dot product (avx512_bf16, amx_bf16)")
        return Verdict(MISSED, f"{ratio:.2f} x")

    return check


def memory(family: str) -> Callable[[Results], Verdict]:
    """Peak memory beyond inputs and gradients at every measured size, each in a process of its own."""

    def check(results: Results) -> Verdict:
        sizes = [r for r in results["records"] if (r["family"], r["provider"]) == (family, "cpu") and "memory" in r]
        failed = [r for r in sizes if "problem" in r["memory"]]
        if failed:
            return Verdict(MISSED, "", f"{size(failed[0])}: {failed[0]['memory']['problem']}")
        if not sizes:
            return Verdict(NOT_MEASURED)
        worst = max(sizes, key=lambda r: r["memory"]["peak_bytes"])
        over = [r for r in sizes if r["memory"]["peak_bytes"] >= _MEMORY_LIMIT]
        largest = max(sizes, key=lambda r: r["shape"][0])
        note = f"most at {size(worst)}; up to {size(largest)} measured"
        if over and len(over) < len(sizes):
            note += f"; over it: {', '.join(size(r) for r in sorted(over, key=lambda r: r['shape']))}"
        return Verdict(MISSED if over else MET, f"{worst['memory']['peak_bytes'] / 1e6:.1f} MB", note)

    return check


def size(record: dict[str, Any]) -> str:
    """A shape as people write it."""
    return " x ".join(map(str, record["shape"]))


CPU = [
    Bar("NT-Xent, 2N = 8192, D = 128, against lightly", ">= 8 x", faster("nt_xent-8192x128", "lightly", 8)),
    Bar("NT-Xent, 2N = 8192, D = 512, against lightly", ">= 4 x", faster("nt_xent-8192x512", "lightly", 4)),
    Bar("CLIP, N = 8192, D = 128, against open_clip", ">= 3.2 x", faster("clip-8192x128", "open_clip", 3.2)),
    Bar("CLIP, N = 8192, D = 512, against open_clip", ">= 2.2 x", faster("clip-8192x512", "open_clip", 2.2)),
    Bar(
        "SupCon, 2N = 8192, D = 128, against SupContrast's formula",
        ">= 8 x",
        faster("sup_con-8192x128", "SupContrast", 8),
    ),
    *(
        Bar(f"{title}, 512 rows, D = {d}, against {rival}{own}", ">= 1 x", faster(f"{family}-512x{d}", rival, 1))
        for family, title, rival, own in (
            ("nt_xent", "NT-Xent", "lightly", ""),
            ("clip", "CLIP", "open_clip", ""),
            ("sup_con", "SupCon", "SupContrast", "'s formula"),
        )
        for d in (128, 512)
    ),
    Bar(
        "bf16 inputs, NT-Xent, 2N = 8192, D = 256, against our float32",
        ">= 1.8 x",
        sixteen_bit("nt_xent-8192x256", 1.8),
    ),
    Bar("bf16 inputs, CLIP, N = 8192, D = 256, against our float32", ">= 1.8 x", sixteen_bit("clip-8192x256", 1.8)),
    Bar(
        "Pair cosine, 64 x 64 x 56 x 56, against CosineEmbeddingLoss",
        ">= 2.5 x",
        faster("pair_cosine-64x64x56x56", "CosineEmbeddingLoss", 2.5),
    ),
    Bar(
        "ReLU + goodness + normalise, 4096 x 2048, against the better eager",
        ">= 4 x",
        faster("goodness_normalize-4096x2048", "eager, shared", 4),
    ),
    *(
        Bar(f"Peak memory of {title} beyond inputs and gradients, any N", "< 64 MB", memory(family))
        for family, title in (
            ("nt_xent", "NT-Xent"),
            ("clip", "CLIP"),
            ("sup_con", "SupCon"),
            ("info_nce", "InfoNCE"),
            ("siglip", "SigLIP"),
        )
    ),
    *trainer_tables.BARS,
]

"""Measurements that were made on another machine, as records of that machine: results files, and gpu.json of
``tools.gpu_measure``."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

from . import kernel_sources, store
from .kernel_sources import Digests
from .variants import FAMILIES

# Names of tools.gpu_workloads whose work is that of a family here. Its info_nce gives the keys a gradient, ours not.
_FAMILIES = {
    "clip": "clip",
    "clip, a million": "clip",
    "ragged clip": "clip",
    "nt_xent": "nt_xent",
    "sup_con": "sup_con",
    "siglip": "siglip",
    "goodness + normalise": "goodness_normalize",
    "pair cosine": "pair_cosine",
    "pool goodness": "pool_goodness",
    "layerwise": "layerwise",
    "unit rows": "unit_rows",
    "linear goodness": "linear_goodness",
}
_DESCRIPTION = ("key", "name", "rows", "width")
_OURS = {
    "triton": "ffcl_fast, Triton kernels",
    "cuda": "ffcl_fast, CUDA kernels",
    "auto": "ffcl_fast, what auto takes",
    "panels": "ffcl_fast, plain PyTorch over row panels",
}
# Rivals as families call them, and as tools.gpu_measure does.
RIVALS = {
    "cut-cross-entropy": "cut-cross-entropy, exact",
    "open_clip, compiled": "compiled",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "SupContrast": "plain",
    "CosineEmbeddingLoss": "plain",
    "eager": "plain",
}
_TIMES = {
    "seconds": "both ms",
    "forward_seconds": "forward ms",
    "device_seconds": "both device ms",
    "forward_device_seconds": "forward device ms",
}


def adopt(folder: Path, path: Path) -> Path:
    """Merge the file ``path`` into the results file of the device that it names; that file's path.

    Raises ValueError naming ``path`` where it is neither a results file nor a gpu.json.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if isinstance(found, dict) and "records" in found:
        found = store.load(path)
        return store.merge(folder, found["records"], found["device"], found["versions"])
    if not isinstance(found, dict) or not {"device", "torch", "rows"} <= found.keys():
        raise ValueError(f"{path} is neither a results file nor a gpu.json of tools.gpu_measure")
    when = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
    stamp = {
        "when": found.get("when", when.strftime("%Y-%m-%dT%H:%MZ")),
        "commit": found.get("commit", "a commit that gpu.json does not tell"),
        "torch": found["torch"],
    }
    records = gpu_records(found["rows"], stamp, found.get("sources", {}))
    versions = {name: found[name] for name in ("torch", "triton") if found.get(name)}
    return store.merge(folder, records, _device(found), versions)


def _device(found: dict[str, Any]) -> dict[str, Any]:
    name = found["device"]
    return {
        "slug": "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "kind": "gpu",
        "name": name,
        "isa": "this GPU",
        "threads": 0,
        "flags": [],
    }


def gpu_records(rows: list[dict[str, Any]], stamp: dict[str, str], sources: Digests) -> list[dict[str, Any]]:
    """A record for each column of each row whose work is that of a family here; ``sources``: what
    kernel_sources.digests told of the checkout that was measured."""
    return [
        _record(row, provider, values, stamp, sources)
        for row in rows
        if row["name"] in _FAMILIES
        for provider, values in row.items()
        if provider not in _DESCRIPTION
    ]


def _record(
    row: dict[str, Any], provider: str, values: dict[str, Any], stamp: dict[str, str], sources: Digests
) -> dict[str, Any]:
    family = FAMILIES[_FAMILIES[row["name"]]]
    sizes = [int(n) for n in row["key"].rpartition(" ")[2].split("x")]
    shape = sizes if len(sizes) == len(family.quick) else [row["rows"], row["width"]]
    provider = "triton" if provider == "ours" else provider  # its name in the first of these files
    time: dict[str, Any] = {**stamp, "run": "gpu_measure", **kernel_sources.told(provider, family.name, sources)}
    if "problem" in values:
        time["problem"] = values["problem"]
    else:
        time |= {name: values[column] / 1e3 for name, column in _TIMES.items() if column in values}
        seconds = time.get("device_seconds", time["seconds"])
        useful = family.useful_bytes(tuple(shape)) / 2 if family.useful_bytes else None  # bfloat16
        time |= {
            "tflops": family.units * family.unit_flops(tuple(shape)) / seconds / 1e12 or None,
            "peak_bytes": int(values["MiB"] * 2**20),
            "rel_error": None,
            "deterministic": values.get("same bits"),
            "fraction_of_ceiling": values["both fraction"],
            "forward_fraction_of_ceiling": values["forward fraction"],
        }
        if useful:
            time["gigabytes_per_second"] = useful / seconds / 1e9
    return {
        "workload": f"{family.name}-{'x'.join(map(str, shape))}",
        "family": family.name,
        "shape": shape,
        "provider": provider,
        "kind": "ours" if provider in _OURS else "rival",
        "what": _OURS.get(provider, f"{provider}, as tools.gpu_measure calls it"),
        "dtype": "bfloat16",
        "units": family.units,
        "time": time,
    }

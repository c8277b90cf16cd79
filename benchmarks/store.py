"""Stored measurements: benchmarks/results/<device>.json, one record a workload and provider."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from . import machine

RESULTS = Path(__file__).resolve().parent / "results"
_SCHEMA = 1

Record = dict[str, Any]


def stamp() -> dict[str, str]:
    """When, on what and from which sources something was measured."""
    versions = machine.versions()
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        **machine.source(),
        "torch": versions["torch"],
        "triton": versions.get("triton"),
        "device": machine.summary(machine.device()),
    }


def merge(
    folder: Path, records: list[Record], device: dict[str, Any] | None = None, versions: dict[str, str] | None = None
) -> Path:
    """Put records into the file of ``device``, by default this machine's: of a workload and provider that is there
    already, only the parts that were measured anew ("time", "memory") are replaced. The file is complete at every
    moment. What was measured elsewhere must come with its own device and versions."""
    if device is None:
        device, versions = machine.device(), machine.versions()
    path = folder / f"{device['slug']}.json"
    stored = load(path)["records"] if path.exists() else []
    by_key = {(r["workload"], r["provider"]): r for r in stored}
    for record in records:
        key = record["workload"], record["provider"]
        by_key[key] = by_key.get(key, {}) | record
    ordered = [by_key[key] for key in sorted(by_key)]
    lines = ",\n".join("  " + json.dumps(record) for record in ordered)
    head = json.dumps({"schema": _SCHEMA, "device": device, "versions": versions}, indent=1)
    write_text(path, f'{head[:-2]},\n "records": [\n{lines}\n ]\n}}\n')
    return path


def load(path: Path) -> dict[str, Any]:
    """One device's measurements. Raises ValueError naming the file where it is no such thing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        raise ValueError(f"{path} is no results file of schema {_SCHEMA}")
    return found


def _trainer(path: Path) -> dict[str, Any]:
    """The trainer's measurements on the device of the results file ``path``, as ``{"trainer": ...}``, or nothing."""
    beside = path.parent / "trainer" / path.name
    if not beside.exists():
        return {}
    try:
        return {"trainer": json.loads(beside.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise ValueError(f"{beside} is not valid JSON: {error}") from None


def load_all(folder: Path) -> list[dict[str, Any]]:
    """The measurements of every device, those of the trainer under "trainer", in the order of their names."""
    return [load(path) | _trainer(path) for path in sorted(folder.glob("*.json"))]


def write_text(path: Path, text: str) -> None:
    """``text`` to ``path`` through a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise

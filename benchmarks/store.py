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

# What the reports read without asking: names, and the types that each may have.
_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
_DEVICE = {"slug": (str,), "kind": (str,), "name": (str,), "isa": (str,), "threads": (int,), "flags": (list,)}
_RECORD = {"workload": (str,), "family": (str,), "shape": (list,), "provider": (str,), "kind": (str,)}
_STAMP = {"when": (str,), "commit": (str,)}
_MEASURED = {
    "time": {
        "seconds": _NUMBER,
        "forward_seconds": _NUMBER,
        "tflops": _OPTIONAL,
        "peak_bytes": _OPTIONAL,
        "rel_error": _OPTIONAL,
        "deterministic": (bool, type(None)),
        "fraction_of_ceiling": _OPTIONAL,
    },
    "memory": {"peak_bytes": _NUMBER, "input_bytes": _NUMBER, "gradient_bytes": _NUMBER},
}
_RATIO = {"over_ours": _NUMBER, "over_ours_quartiles": (list,), "rounds": (int,)}
_TRAINER = {"batch": (int,), "pixels": (int,), "backbone": (str,), "steps": (dict,)}
_STEP = {"time": {"images_per_second": _NUMBER}, "memory": {"peak_bytes": _NUMBER}}
_SPEEDUP = {"over": (str,), "speedup": _NUMBER, "speedup_quartiles": (list,), "loss_difference": _NUMBER,
            "rounds": (int,)}  # fmt: skip


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
    """One device's measurements. Raises ValueError naming the file, and the record, where it is no such thing."""
    found = _json(path)
    if not isinstance(found, dict) or found.get("schema") != _SCHEMA:
        raise ValueError(f"{path} is no results file of schema {_SCHEMA}")
    _require(f"{path}", found, {"device": (dict,), "versions": (dict,), "records": (list,)})
    _require(f"{path}: device", found["device"], _DEVICE)
    if found["device"]["kind"] not in ("cpu", "gpu"):
        raise ValueError(f"{path}: device: kind must be cpu or gpu; got {found['device']['kind']!r}")
    for number, record in enumerate(found["records"]):
        _check_record(f"{path}: record {number}", record)
    return found


def _check_record(where: str, record: Any) -> None:
    _require(where, record, _RECORD)
    where += f" ({record['workload']}, {record['provider']})"
    if not record["shape"] or not all(isinstance(n, int) for n in record["shape"]):
        raise ValueError(f"{where}: shape must be a list of integers; got {record['shape']!r}")
    for part, fields in _MEASURED.items():
        if part in record:
            _require(f"{where}: {part}", record[part], _STAMP)
            _require(f"{where}: {part}", record[part], {"problem": (str,)} if "problem" in record[part] else fields)
    if "over_ours" in record.get("time", {}):
        _require(f"{where}: time", record["time"], _RATIO)


def _require(where: str, found: Any, fields: dict[str, tuple[type, ...]]) -> None:
    """Raise ValueError where ``found`` is not an object that has ``fields``, each of one of its types."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object; got {found!r:.60}")
    for name, types in fields.items():
        if name not in found:
            raise ValueError(f"{where} has no {name!r}")
        if not isinstance(found[name], types):
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{where}: {name} must be {expected}; got {found[name]!r:.60}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _trainer(path: Path) -> dict[str, Any]:
    """The trainer's measurements on the device of the results file ``path``, as ``{"trainer": ...}``, or nothing."""
    beside = path.parent / "trainer" / path.name
    if not beside.exists():
        return {}
    found = _json(beside)
    _require(f"{beside}", found, _TRAINER)
    for name, step in found["steps"].items():
        _require(f"{beside}: {name}", step, {})
        for part, fields in _STEP.items():
            if part in step:
                _require(f"{beside}: {name}: {part}", step[part], fields)
        if {"over", "speedup"} & step.get("time", {}).keys():
            _require(f"{beside}: {name}: time", step["time"], _SPEEDUP)
    return {"trainer": found}


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

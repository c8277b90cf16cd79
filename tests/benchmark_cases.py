"""Results files and records for the tests of benchmarks/."""

from __future__ import annotations


def results_of(**times) -> dict:
    records = [
        {
            "workload": name,
            "provider": "open_clip",
            "family": "clip",
            "kind": "rival",
            "shape": [8192, 128],
            "time": time,
        }
        for name, time in times.items()
    ]
    return {"schema": 1, "device": {"kind": "cpu", "flags": [], "name": "a CPU"}, "records": records}


def record_of(workload: str, provider: str, **parts) -> dict:
    """A record with all that a stored one has to have; ``parts`` are its measurements, or change the rest of it."""
    needed = {
        "time": {"seconds": 1.0, "forward_seconds": 0.5, "tflops": 1.0, "peak_bytes": 1, "rel_error": 1e-7,
                 "deterministic": True, "fraction_of_ceiling": 0.5},
        "memory": {"peak_bytes": 1, "input_bytes": 1, "gradient_bytes": 1},
    }  # fmt: skip
    stamp = {"commit": "abc", "when": "2026-01-01T00:00Z"}
    family, _, shape = workload.partition("-")
    record = {
        "workload": workload,
        "provider": provider,
        "family": family,
        "units": 4,
        "shape": [int(n) for n in shape.split("x")],
        "kind": "ours" if provider == "cpu" else "rival",
    }
    return record | {name: stamp | needed[name] | value if name in needed else value for name, value in parts.items()}


def time_of(ratio: float) -> dict:
    return {"over_ours": ratio, "over_ours_quartiles": [ratio, ratio], "rounds": 5}

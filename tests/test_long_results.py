"""tools/long_results.py: what `make test-long` leaves behind; and that its last results are good ones."""

from __future__ import annotations

import json

from tools import long_results

JUNIT = '<testsuites><testsuite tests="7" failures="{failures}" errors="0" skipped="1" time="12.4"/></testsuites>'


def test_a_run_replaces_its_own_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(long_results, "RESULTS", tmp_path / "results" / "long.json")
    for name, failures in (("long-a", 0), ("long-b", 0), ("long-a", 2)):
        path = tmp_path / f"{name}.xml"
        path.write_text(JUNIT.format(failures=failures))
        assert long_results.main([str(path)]) == (failures > 0)
    runs = {r["run"]: r for r in json.loads(long_results.RESULTS.read_text())["runs"]}
    assert [(name, r["tests"], r["failures"], r["seconds"]) for name, r in runs.items()] == [
        ("long-a", 7, 2, 12),
        ("long-b", 7, 0, 12),
    ]
    assert all(r["commit"] and r["date"] for r in runs.values())


def test_the_last_long_runs_had_no_failure():
    runs = {r["run"]: r for r in json.loads(long_results.RESULTS.read_text())["runs"]}
    assert {"long-draws", "long-calls", "long-kills"} <= set(runs)
    assert all(r["tests"] > 0 and not r["failures"] and not r["errors"] and r["commit"] for r in runs.values())
    assert runs["long-kills"]["tests"] >= 20

"""The tools that measure on real processes: what they print and store, not how near predictions come."""

from __future__ import annotations

import json
import sys

import pytest

from tools import rank_memory, simulate_ranks


def test_prediction_and_real_processes(tmp_path, capsys):
    file = tmp_path / "made" / "schedule.json"
    assert simulate_ranks.main(["--real", "2", "--rows", "64", "--dim", "16", "--json", str(file)]) == 0
    records = json.loads(file.read_text())["records"]
    assert [(r["world"], r["strategy"]) for r in records] == [(2, "gather"), (2, "ring")]
    assert all(r["real_range"][0] <= r["real_seconds"] <= r["real_range"][1] for r in records)
    assert all(r["predicted_seconds"] > 0 and r["machine"]["hop"] > 0 for r in records)
    assert capsys.readouterr().out.count("predicted") == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_command(tmp_path, capsys):
    file = tmp_path / "made" / "memory.json"
    assert rank_memory.main(["--worlds", "2", "--wide", "4", "32", "--rows", "8", "--json", str(file)]) == 0
    records = json.loads(file.read_text())["records"]
    assert {r["loss"] for r in records} == set(rank_memory.LOSSES) and len(records) == 20
    assert capsys.readouterr().out.count("on paper") == 20

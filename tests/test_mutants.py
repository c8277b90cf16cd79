"""The mutants of tools/mutants/ fit the sources, and all that have been run were seen; running them: make mutate."""

from __future__ import annotations

import json
from pathlib import Path

from tools.mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent


def test_every_mutant_changes_one_place():
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
        assert mutant.old != mutant.new


def test_every_mutant_has_been_killed():
    records = json.loads((ROOT / "docs" / "results" / "mutants.json").read_text(encoding="utf-8"))["mutants"]
    verdicts = {record["name"]: record["verdict"] for record in records}
    assert verdicts == {mutant.name: "killed" for mutant in MUTANTS}

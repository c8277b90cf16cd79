"""The tables of docs/large_batches.md are what the stored measurements and the model say."""

from __future__ import annotations

import pytest

from tools import scale_tables
from tools.scale_tables import GPU, PAGE, main, renewed, ring_from
from tools.schedule_model import Problem, seconds


def test_page_is_as_stored():
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m tools.scale_tables --write"


def test_a_page_without_a_block_is_refused():
    with pytest.raises(ValueError, match="schedule"):
        renewed(PAGE.read_text(encoding="utf-8").replace("<!-- end of schedule -->", ""))


def test_crossover_is_where_the_times_cross():
    rows = ring_from(64, 512, 2, GPU)
    assert rows is not None
    for each, ring in ((rows, True), (rows - 64, False)):
        p = Problem(64, each, 512, 2)
        assert (seconds(p, "ring", GPU) < seconds(p, "gather", GPU)) == ring


def test_command(tmp_path, monkeypatch, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.count("Measured on") == 2
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("Measured on", "Dreamt of on"))
    monkeypatch.setattr(scale_tables, "PAGE", page)
    assert main(["--write"]) == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")

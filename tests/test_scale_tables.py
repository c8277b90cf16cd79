"""The tables of docs/large_batches.md are what the stored measurements and the model say."""

from __future__ import annotations

import json

import pytest

from benchmarks import store
from tools import pretrain_runs, scale_tables
from tools.scale_tables import GPU_RECORD, PAGE, gpu, kernels, main, renewed, ring_from
from tools.schedule_model import BACKWARD, FORWARD, Kernels, Problem, seconds


def test_page_is_as_stored():
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m tools.scale_tables --write"


def test_a_page_without_a_block_is_refused():
    with pytest.raises(ValueError, match="schedule"):
        renewed(PAGE.read_text(encoding="utf-8").replace("<!-- end of schedule -->", ""))


def test_crossover_is_where_the_times_cross():
    machine = gpu(512)
    rows = ring_from(64, 512, 2, machine)
    assert rows is not None
    for each, ring in ((rows, True), (rows - 64, False)):
        p = Problem(64, each, 512, 2)
        assert (seconds(p, "ring", machine) < seconds(p, "gather", machine)) == ring


def test_kernels_are_those_of_the_record():
    records = {r["workload"]: r["time"] for r in store.load(GPU_RECORD)["records"] if r["provider"] == "triton"}
    large, small = records["clip-65536x512"], records["clip-4096x512"]
    machine = gpu(512)
    block = Problem(1, 65536, 512, 2).block
    both = machine.product(FORWARD, block) + machine.product(BACKWARD, block)
    assert both == pytest.approx(large["device_seconds"])
    # a small block takes the host's time, which is none of the GPU's
    both = machine.product(FORWARD, 1.0) + machine.product(BACKWARD, 1.0)
    assert small["device_seconds"] < both <= small["seconds"]
    with pytest.raises(ValueError, match="width 7"):
        kernels(7)


def test_times_between_and_beyond_what_was_measured():
    device = ((1.0, 3.0, 6.0), (3.0, 5.0, 16.0), (4.0, 7.0, 20.0))
    found = Kernels(device, (4.5, 0.0))
    works = (0.0, 1.0, 2.0, 3.0, 3.5, 4.0, 6.0)
    assert [found.seconds(False, work) for work in works] == [4.5, 4.5, 4.5, 5.0, 6.0, 7.0, 11.0]
    assert [found.seconds(True, work) for work in works] == [1.0, 6.0, 11.0, 16.0, 18.0, 20.0, 28.0]


def test_picture_is_of_the_stored_runs():
    assert pretrain_runs.is_current(), "run python -m tools.scale_tables --write"


def test_keeping_a_run(tmp_path, monkeypatch):
    """Finished ones only; what is kept is what the table shows."""
    monkeypatch.setattr(pretrain_runs, "STORED", tmp_path)
    monkeypatch.setattr(pretrain_runs, "PICTURE", tmp_path / "picture.png")
    run = tmp_path / "pretrain-x"
    run.mkdir()
    trace = {"step": [1, 2], "loss": [4.0, 3.0]}
    epoch = {"seconds": 2.0, "samples_per_second": 50.0, "peak_mib": 9.0, "steps": 2, "loss": 3.5, "trace": trace}
    found = {"status": "running", "processes": 2, "config": {"method": "clip", "batch_size": 8}, "epochs": [epoch]}
    for status in ("running", "finished"):
        (run / "metrics.json").write_text(json.dumps({**found, "status": status}))
        if status == "running":
            with pytest.raises(ValueError, match="finished"):
                pretrain_runs.keep(run, {})
    pretrain_runs.keep(run, {"device": "a chip", "when": "now", "commit": "abc"})
    assert pretrain_runs.rows() == [["x", "2 x 8", "1, 2", "2.77", "4.00, 3.50", "50", "9"]]
    assert pretrain_runs.sources() == "a chip, now, commit abc" and not pretrain_runs.is_current()
    pretrain_runs.draw()
    assert pretrain_runs.is_current()


def test_command(tmp_path, monkeypatch, capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.count("Measured on") == 4
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("Measured on", "Dreamt of on"))
    monkeypatch.setattr(scale_tables, "PAGE", page)
    assert main(["--write"]) == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")

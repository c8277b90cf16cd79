"""``python -m tools.gpu_check`` without a GPU: steps, budget, resuming, and the table of made-up measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_check import ROOT, STEPS, Step, run_steps
from tools.gpu_table import markdown

pytest.importorskip("triton", reason="Triton is not installed")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def step(name: str, code: str, seconds: int = 60, **more) -> Step:
    return Step(name, python(code), seconds, [], **more)


def states(out: Path) -> dict:
    return {name: found["status"] for name, found in json.loads((out / "state.json").read_text())["steps"].items()}


def test_the_limits_fit_in_nine_minutes():
    assert sum(s.seconds for s in STEPS) <= 540


def test_finished_steps_are_kept_and_failed_ones_run_again(tmp_path, capfd):
    steps = [step("good", "print('once')"), step("bad", "import sys; print('no'); sys.exit(3)")]
    assert run_steps(steps, tmp_path, 600) == 1
    assert states(tmp_path) == {"good": 0, "bad": 3}
    assert (tmp_path / "bad.log").read_text() == "no\n"
    assert run_steps([steps[0], step("bad", "print('now')")], tmp_path, 600) == 0
    assert "good       done before" in capfd.readouterr().out
    assert states(tmp_path) == {"good": 0, "bad": 0}


def test_a_cut_step_is_missing_and_goes_on(tmp_path):
    slow = step("slow", "import time; print('begun', flush=True); time.sleep(600)", seconds=1)
    assert run_steps([slow], tmp_path, 600) == 2
    assert states(tmp_path) == {"slow": "cut"}
    assert run_steps([step("slow", "")], tmp_path, 600) == 0


def test_no_step_starts_without_time_for_it(tmp_path, capfd):
    assert run_steps([step("late", "")], tmp_path, gpu_check.LEAST - 1) == 2
    assert "no time left" in capfd.readouterr().out


def test_a_step_whose_tool_does_not_work_is_left_out_with_a_word(tmp_path, capfd):
    refused = step("refused", "", probe=python("print('Device not supported'); exit(1)"))
    missing = step("missing", "", probe=["no-such-program"])
    assert run_steps([refused, missing, step("works", "", probe=python(""))], tmp_path, 600) == 0
    out = capfd.readouterr().out
    assert "does not work here (1): Device not supported" in out and "no-such-program is not installed" in out
    assert states(tmp_path) == {"works": 0}


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": "of other sources", "steps": {"a": {"status": 0}}}'])
def test_results_of_other_sources_and_damaged_states_are_forgotten(tmp_path, damage):
    (tmp_path / "state.json").write_text(damage)
    (tmp_path / "passed.txt").write_text("tests/test_gpu.py::test_x\n")
    assert run_steps([step("a", "exit(4)")], tmp_path, 600) == 1
    assert states(tmp_path) == {"a": 4} and not (tmp_path / "passed.txt").exists()


def test_tests_that_passed_are_not_run_again(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pass\n")
    (tmp_path / "passed.txt").write_text("test_some.py::test_c\ntest_some.py::te")  # stopped while it wrote
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"FFCL_OUT": str(tmp_path), "PYTHONPATH": path}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.gpu_resume", "test_some.py"]

    def run() -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    status, out = run()
    assert status == 1 and "1 failed, 1 passed, 1 deselected" in out
    (tmp_path / "test_some.py").write_text("def test_a(): assert 0\ndef test_b(): pass\ndef test_c(): assert 0\n")
    (tmp_path / "passed.txt").write_text("test_some.py::test_a\ntest_some.py::test_c\n")
    status, out = run()
    assert status == 0 and "1 passed, 2 deselected" in out
    status, out = run()
    assert status == 0 and "3 deselected" in out


def test_the_table_says_met_missed_and_not_measured():
    def ours(forward=0.9, both=0.8, ms=10.0, **more):
        return {"forward ms": 1.0, "forward fraction": forward, "both ms": ms, "both fraction": both, "MiB": 5.0} | more

    def row(name, rows, width, found, **others):
        key = f"{name} {rows}x{rows}x{width}"
        return {"key": key, "name": name, "rows": rows, "width": width, "ours": found, **others}

    rows = [
        row("clip", 65536, 512, ours(ms=31.0, **{"same bits": True}), memeff={"both ms": 40.0}),
        row("clip", 32768, 128, ours(ms=20.0)),
        row("nt_xent", 32768, 128, ours(), lightly={"problem": "not installed: no | such"}),
        row("clip", 8192, 512, {"problem": "RuntimeError: x"}),
    ]
    text = markdown({"device": "made up", "torch": "0", "product_tflops": 1, "copy_gbytes": 2, "rows": rows})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "failed: RuntimeError: x" in lines["clip 8192x8192x512"]
    assert "not installed" in lines["nt_xent 32768x32768x128"]
    assert lines["CLIP, D >= 512, N >= 32k, forward: >= 80 % of the product"].endswith("| met |")
    assert lines["CLIP, N = 65536, D = 512, both: <= 32 ms"].endswith("512: 31 | met |")
    assert lines["CLIP: >= 1.5 x memeff"].endswith("| missed |")  # 40 / 31
    assert lines["NT-Xent, SupCon: >= 1.7 x our own symmetric path"].endswith("| met |")  # 20 / 10
    assert lines["NT-Xent, SupCon: >= 2.5 x the fastest peer"].endswith("| not measured |")
    assert lines["1M x 1M, D = 512: < 8 GB"].endswith("| not measured |")

"""``python -m tools.gpu_check`` without a GPU: steps, budget, resuming, and the table of made-up measurements."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check, gpu_pack
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
    assert sum(s.seconds for s in STEPS) <= 540 and STEPS[-1].name == "measure"


def test_finished_steps_are_kept_and_failed_ones_run_again(tmp_path, capfd):
    steps = [step("good", "print('once')"), step("bad", "import sys; print('no'); sys.exit(3)")]
    assert run_steps(steps, tmp_path, 600) == 1
    assert states(tmp_path) == {"good": 0, "bad": 3}
    assert (tmp_path / "bad.log").read_text() == "no\n"
    assert run_steps([steps[0], step("bad", "print('now')")], tmp_path, 600) == 0
    assert "good           done before" in capfd.readouterr().out
    assert states(tmp_path) == {"good": 0, "bad": 0}


def test_a_cut_step_is_missing_and_goes_on(tmp_path):
    slow = step("slow", "import time; print('begun', flush=True); time.sleep(600)", seconds=1)
    assert run_steps([slow], tmp_path, 600) == 2
    assert states(tmp_path) == {"slow": "cut"}
    assert run_steps([step("slow", "")], tmp_path, 600) == 0


def test_the_last_step_takes_what_the_others_leave(tmp_path, monkeypatch):
    last = step("last", "import time; time.sleep(2)", seconds=1)
    monkeypatch.setattr(gpu_check, "STEPS", (step("first", ""), last))
    assert run_steps(list(gpu_check.STEPS), tmp_path, 600) == 0


def test_a_cut_step_takes_its_children_along(tmp_path):
    # The grandchild holds the write end of a pipe for as long as it lives.
    pipe = tmp_path / "alive"
    os.mkfifo(pipe)
    held = f"import time; file = open({str(pipe)!r}, 'w'); file.write('x'); file.flush(); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        result = gpu_check.run(python(child), tmp_path / "log", {}, 10)
        assert result["status"] == "cut" and os.read(reader, 1) == b"x"
        assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b""  # nobody is left to write
    finally:
        os.close(reader)


def test_no_step_starts_without_time_for_it(tmp_path, capfd):
    assert run_steps([step("late", "")], tmp_path, gpu_check.LEAST - 1) == 2
    assert "no time left" in capfd.readouterr().out


def test_a_step_whose_tool_does_not_work_is_left_out_with_a_word_and_missing(tmp_path, capfd):
    refused = step("refused", "", probes=(python(""), python("print('Device not supported'); exit(1)")))
    missing = step("missing", "", probes=(["no-such-program"],))
    assert run_steps([refused, missing, step("works", "", probes=(python(""),))], tmp_path, 600) == 2
    out = capfd.readouterr().out
    assert "does not work here (1): Device not supported" in out and "no-such-program is not installed" in out
    assert states(tmp_path) == {"works": 0}


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": "of other sources", "steps": {"a": {"status": 0}}}'])
def test_results_of_other_sources_and_damaged_states_are_forgotten(tmp_path, damage):
    (tmp_path / "state.json").write_text(damage)
    (tmp_path / "passed.txt").write_text("tests/test_gpu.py::test_x\n")
    assert run_steps([step("a", "exit(4)")], tmp_path, 600) == 1
    assert states(tmp_path) == {"a": 4} and not (tmp_path / "passed.txt").exists()


def test_results_of_another_machine_are_forgotten(tmp_path, capfd):
    assert run_steps([step("a", "print(1)")], tmp_path, 600, "an H100, torch 2.11") == 0
    assert run_steps([step("a", "exit(4)")], tmp_path, 600, "an H100, torch 2.11") == 0
    assert run_steps([step("a", "exit(4)")], tmp_path, 600, "an H200, torch 2.11") == 1
    assert "starting anew" in capfd.readouterr().out


def test_whatever_a_gpu_test_uses_is_among_the_sources():
    files = {path for pattern in gpu_check.SOURCES for path in ROOT.glob(pattern)}
    for name in ("tests/helpers.py", "tests/similarity_cases.py", "tools/files.py", "CMakeLists.txt"):
        assert ROOT / name in files


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
        return {"key": key, "name": name, "rows": rows, "width": width, "triton": found, **others}

    rows = [
        row(
            "clip",
            65536,
            512,
            ours(ms=31.0, **{"same bits": True, "both device ms": 30.5}),
            cuda=ours(ms=33.0),
            memeff={"both ms": 60.0, "both device ms": 40.0},
            panels={"both ms": 70.0},
        ),
        row("clip", 32768, 128, ours(ms=20.0)),
        row("nt_xent", 32768, 128, ours(), panels={"both ms": 11.0}, lightly={"problem": "not installed: no | such"}),
        row("clip", 8192, 512, {"problem": "RuntimeError: x"}),
    ]
    text = markdown({"device": "made up", "torch": "0", "product_tflops": 1, "copy_gbytes": 2, "rows": rows})
    measured, triton, cuda = text.split("| bar, ")
    lines = {tuple(x.strip() for x in line.split("|")[1:3]): line for line in measured.splitlines() if line[:2] == "| "}
    assert "failed: RuntimeError: x" in lines["clip 8192x8192x512", "triton"]
    assert "not installed" in lines["nt_xent 32768x32768x128", "triton"]
    assert "| 31.0 | 30.5 | 0.8 |" in lines["clip 65536x65536x512", "triton"]
    assert "memeff 60.0 (40.0); panels 70.0 |" in lines["clip 65536x65536x512", "triton"]
    assert "| 33.0 |  |" in lines["clip 65536x65536x512", "cuda"] and ("clip 8192x8192x512", "cuda") not in lines

    def verdicts(table: str) -> dict[str, str]:
        return {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}

    assert triton.startswith("triton |") and cuda.startswith("cuda |")
    lines = verdicts(triton)
    assert lines["CLIP, D >= 512, N >= 32k, forward: >= 80 % of the product"].endswith("| met |")
    assert lines["CLIP, N = 65536, D = 512, both: <= 32 ms"].endswith("512: 31 | met |")
    assert lines["CLIP: >= 1.5 x memeff"].endswith("| met |")  # 60 / 31
    assert lines["NT-Xent, SupCon: >= 1.7 x our own symmetric path"].endswith("| met |")  # 20 / 10
    assert lines["NT-Xent, SupCon: >= 2.5 x the fastest peer"].endswith("| not measured |")
    assert lines["1M x 1M, D = 512: < 8 GB"].endswith("| not measured |")
    lines = verdicts(cuda)
    assert lines["CLIP, N = 65536, D = 512, both: <= 32 ms"].endswith("512: 33 | missed |")
    assert lines["NT-Xent, SupCon: >= 1.7 x our own symmetric path"].endswith("| not measured |")


def test_every_step_has_what_a_machine_without_a_gpu_can_check():
    assert len({s.name for s in STEPS}) == len(STEPS)
    for s in STEPS:
        assert "--collect-only" in s.dry or "--dry-run" in s.dry


def test_the_cuda_kernels_have_steps_of_their_own():
    steps = [s for s in STEPS if "tests/test_gpu_cuda.py" in s.command]
    assert {s.name for s in steps} == {"cuda-rule", "cuda-goodness", "cuda-large", "cuda-memcheck", "cuda-racecheck"}
    for s in steps:
        assert gpu_check.CUDA_BUILT in s.probes and not any("test_gpu.py" in part for part in s.command)
    tools = {s.name: s.command for s in steps if s.command[0] == "compute-sanitizer"}
    assert "memcheck" in tools["cuda-memcheck"] and "racecheck" in tools["cuda-racecheck"]
    passed = [dict(s.environment)["FFCL_PASSED"] for s in STEPS if s.command[0] == "compute-sanitizer"]
    assert len(set(passed)) == 3  # what one tool has seen pass, another has not


@pytest.mark.parametrize("built", (True, False))
def test_the_probe_says_whether_the_cuda_kernels_were_built(built, tmp_path):
    code = f"class native:\n    problem = None\n    class module:\n        cuda_built = staticmethod(lambda: {built})\n"
    folder = tmp_path / "ffcl_fast" / "backends"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(code)
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    problem = gpu_check.unfit((gpu_check.CUDA_BUILT,), tmp_path, environment, 60)
    assert problem is None if built else problem.endswith("built without the CUDA kernels")


def test_the_measurements_cover_both_kinds_of_kernels(monkeypatch):
    from tools import gpu_measure
    from tools.gpu_workloads import WORKLOADS

    class Native:
        built = True

        @classmethod
        def cuda_built(cls) -> bool:
            return cls.built

    monkeypatch.setattr(gpu_measure.native, "module", Native)
    for workload in WORKLOADS:
        names = gpu_measure.losses(workload).keys()
        assert "triton" in names and ("cuda" in names) == (
            workload.name not in ("siglip", "unit rows", "linear goodness")
        )
        assert ("panels" in names) == (getattr(workload, "rows", 0) * getattr(workload, "cols", 0) <= 8192**2)
        assert "compiled" not in names or getattr(workload, "rows", 0) <= 8192
        assert getattr(workload, "rivals", True) or not names - {"triton", "cuda", "auto", "panels"}
    Native.built = False
    assert "cuda" not in gpu_measure.losses(WORKLOADS[0])


def made_up(monkeypatch, device_milliseconds, healthy=lambda: True):
    """(workload, measure) of one tiny workload on the CPU, whose times are 2 ms as called and given on the device."""
    from tools import gpu_measure
    from tools.gpu_workloads import Products

    def loss(q, k, scale):
        return (scale * (q.float() @ k.float().T)).logsumexp(1).mean()

    def failing(q, k, scale):
        raise RuntimeError("no such kernel")

    class OnCpu(Products):
        def inputs(self, device):
            return super().inputs("cpu")

    workload = OnCpu("clip", 8, 8, 4, (1, 4), loss)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(gpu_measure, "milliseconds", lambda function, *_: function() and None or 2.0)
    monkeypatch.setattr(gpu_measure, "device_milliseconds", device_milliseconds)
    monkeypatch.setattr(gpu_measure, "healthy", healthy)
    providers = {"triton": lambda: loss, "peer": lambda: failing, "plain": lambda: loss}
    monkeypatch.setattr(gpu_measure, "losses", lambda workload: providers)

    def measure(spoilers: dict[str, str | None]) -> dict:
        row: dict = {}
        ceiling = gpu_measure.Ceiling(lambda: None, 2e3, 1e6)
        gpu_measure.measure(workload, row, list(providers), ceiling, 0.1, spoilers, lambda: None)
        return row

    return workload, measure


def test_times_as_called_and_on_the_device_are_kept_apart(monkeypatch):
    # Ours: both captured, beside a ceiling that takes 1 ms and 2 ms; plain: the forward pass alone.
    times = iter(((0.5, 1.0), (1.0, 2.0), (0.25, 2.0), None))
    workload, measure = made_up(monkeypatch, lambda function, seconds, ceiling: next(times))
    row = measure({})
    ours, plain = row["triton"], row["plain"]
    assert ours["forward ms"] == ours["both ms"] == 2.0 and ours["same bits"] is True
    assert (ours["forward device ms"], ours["both device ms"]) == (0.5, 1.0)
    forward, both = workload.useful()
    assert ours["forward fraction"] == round(forward / 0.5e-3 / 2e6, 3)
    assert ours["both fraction"] == round(both / 1e-3 / 1e6, 3)
    assert plain["forward device ms"] == 0.25 and "both device ms" not in plain
    assert plain["both fraction"] == round(both / 2e-3 / 1e6, 3)
    assert row["peer"] == {"problem": "RuntimeError: no such kernel"}


def test_what_spoils_a_process_is_not_tried_again(monkeypatch):
    from tools.gpu_timing import Spoiled

    calls = []

    def device_milliseconds(function, seconds, ceiling):
        calls.append(function)
        raise Spoiled

    workload, measure = made_up(monkeypatch, device_milliseconds)
    spoilers: dict[str, str | None] = {}
    with pytest.raises(Spoiled):
        measure(spoilers)
    assert spoilers == {f"{workload.key}: triton": None}
    with pytest.raises(Spoiled):  # the next: plain, while triton is measured without a capture
        measure(spoilers)
    assert spoilers == {f"{workload.key}: {name}": None for name in ("triton", "plain")}
    row = measure(spoilers)
    assert len(calls) == 2 and "both device ms" not in row["triton"] and row["triton"]["both ms"] == 2.0

    workload, measure = made_up(monkeypatch, lambda *_: None, healthy=lambda: False)
    spoilers = {}
    with pytest.raises(Spoiled):  # the peer's error is one after which CUDA does nothing
        measure(spoilers)
    assert spoilers == {f"{workload.key}: peer": "RuntimeError: no such kernel"}
    assert measure(spoilers)["peer"] == {"problem": "RuntimeError: no such kernel"}


def test_what_auto_takes_is_stored():
    from tools import gpu_measure
    from tools.gpu_workloads import WORKLOADS, by_auto

    small = WORKLOADS[0].small()
    arguments = tuple(x.detach().float().requires_grad_() for x in small.inputs("cpu"))
    found = gpu_measure.taken(gpu_measure.passes(by_auto(small), arguments)[1])
    assert {"contrast_forward", "contrast_backward"} <= set(found) and set(found.values()) == {"cpu"}
    assert gpu_measure.taken(lambda: None) == {}


def test_workloads_are_chosen_by_parts_of_their_keys_and_begun_within_the_budget(monkeypatch, tmp_path, capsys):
    from tools import gpu_measure

    monkeypatch.setenv("FFCL_OUT", str(tmp_path))
    monkeypatch.setenv("FFCL_COMMIT", "abc1234")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    for name in ("product_ceiling", "copy_ceiling"):
        monkeypatch.setattr(gpu_measure, name, lambda: gpu_measure.Ceiling(lambda: None, 1.0, 1e12))
    found = {"both ms": 1.0, "forward ms": 1.0, "both fraction": 0.5, "forward fraction": 0.5, "MiB": 1.0}

    def measure(workload, row, names, ceiling, seconds, spoilers, save):
        for name in names:
            row[name] = found
            save()

    monkeypatch.setattr(gpu_measure, "measure", measure)

    def rows() -> dict[str, dict]:
        return {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}

    assert gpu_measure.main(["--only", "million, unit rows", "--providers", "triton,panels"]) == 0
    assert list(rows()) == ["unit rows", "clip, a million"]
    assert "panels" in rows()["unit rows"] and "plain" not in rows()["unit rows"]
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["commit"] == "abc1234" and stored["when"].endswith("Z")
    assert gpu_measure.main(["--only", "million, siglip", "--budget", "-1"]) == 2
    assert "no time left for siglip 65536x65536x768" in capsys.readouterr().out
    assert gpu_measure.main(["--only", "siglip, unit rows"]) == 0  # with what the first call left out
    assert list(rows()) == ["unit rows", "siglip", "clip, a million"] and "plain" in rows()["unit rows"]
    monkeypatch.setenv("FFCL_COMMIT", "def5678")  # other sources: their results do not mix
    assert gpu_measure.main(["--only", "siglip"]) == 0
    assert list(rows()) == ["siglip"]
    monkeypatch.setattr(gpu_measure.kernel_sources, "digests", lambda: {"triton": {"SigLIP": "edited"}})
    assert gpu_measure.main(["--only", "unit rows"]) == 0
    assert list(rows()) == ["unit rows"]
    for option in ("--only", "--providers"):
        with pytest.raises(SystemExit):
            gpu_measure.main([option, "no such"])
        assert "'no such' is in none of" in capsys.readouterr().err


def test_a_pack_has_the_wheels_there_are_and_a_script(tmp_path, monkeypatch, capsys):
    def download(library, folder, python):
        if library == "memeff":
            return "ERROR: no wheel"
        assert python == "3.12"
        return (folder / f"{library}.whl").touch()

    monkeypatch.setattr(gpu_pack, "download", download)
    monkeypatch.setenv("FFCL_COMMIT", "a b")
    (tmp_path / "old.whl").touch()
    (tmp_path / "_native.old.so").touch()
    assert gpu_pack.main(["--to", str(tmp_path)]) == 0
    assert "memeff: left out: ERROR: no wheel" in capsys.readouterr().out
    names = {f"{library}.whl" for library in gpu_pack.LIBRARIES} - {"memeff.whl"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"check.sh"}
    subprocess.run(["sh", "-n", str(tmp_path / "check.sh")], check=True)
    assert "FFCL_COMMIT='a b'" in (tmp_path / "check.sh").read_text()


@pytest.mark.parametrize("carried, loads", ((True, True), (True, False), (False, False)))
def test_a_pack_s_script_compiles_what_was_not_carried_or_does_not_load(carried, loads, tmp_path, monkeypatch):
    def download(library, folder, python):
        return (folder / f"{library}.whl").touch()

    monkeypatch.setattr(gpu_pack, "download", download)
    monkeypatch.setattr(gpu_pack, "build", lambda python, folder: (folder / f"_native.{python}.so").touch())
    pack, tree, programs = (tmp_path / name for name in ("pack", "tree", "programs"))
    assert gpu_pack.main(["--to", str(pack), *(["--build", "cp312"] if carried else [])]) == 0
    (tree / "ffcl_fast").mkdir(parents=True)
    programs.mkdir()
    status = f'case "$1" in -c) exit {int(not loads)};; esac'
    (programs / "python3").write_text(f'#!/bin/sh\necho "$@" >> calls\n{status}\n')
    (programs / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["sh", str(pack / "check.sh"), "--again"], cwd=tree, env=environment, check=True)
    calls = (tree / "calls").read_text().splitlines()
    assert calls[0].startswith("-m pip install") and calls[-1] == "-m tools.gpu_check --again"
    assert [call for call in calls[1:-1] if call[:3] != "-c "] == ([] if loads else ["setup.py -q build_ext --inplace"])
    assert (tree / "ffcl_fast" / "_native.cp312.so").exists() == loads


def test_a_pack_without_any_wheel_keeps_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "download", lambda *_: "ERROR")
    (tmp_path / "old.whl").touch()
    assert gpu_pack.main(["--to", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.whl"]

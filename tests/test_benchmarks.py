"""benchmarks/: a quick run of everything, the merging of results, the verdict on each bar, and the report's checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from benchmarks import bars, measure, report, store
from benchmarks.families import CLIP
from benchmarks.provider import Family, Provider
from benchmarks.variants import FAMILIES
from benchmarks.workloads import ACCURACY, BF16, GOODNESS, MEMORY, RAGGED, SCALING, SIMILARITY, SMALL, WIDE, Workload

ROOT = Path(__file__).resolve().parent.parent


def _quick(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    # one thread: tiny sizes on several only wait for each other; not a worker of this run's own xdist, for which
    # pytest-benchmark writes nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "benchmarks", "--quick", "--results", str(folder), *arguments],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.long
def test_a_quick_run_measures_every_family(tmp_path):
    raw = tmp_path / "raw.json"
    done = _quick(tmp_path / "results", f"--benchmark-json={raw}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

    (results,) = store.load_all(tmp_path / "results")
    assert {r["family"] for r in results["records"]} == set(FAMILIES)
    for record in results["records"]:
        for part in ("time", "memory"):
            assert "problem" not in record.get(part, {}), record
    timed = [r for r in results["records"] if "time" in r and r["kind"] != "ceiling"]
    for record in timed:
        time = record["time"]
        assert time["seconds"] > 0 and time["rounds"] >= 2 and time["peak_bytes"] >= 0, record
        assert time["rel_error"] < (0.05 if record["dtype"] == "bfloat16" else 1e-5), record
        assert isinstance(time["deterministic"], bool) and {"commit", "when", "torch"} <= time.keys(), record
    assert all("over_ours" in r["time"] for r in timed)

    wanted = {"provider", "workload", "units", "tflops", "peak_bytes", "rel_error", "deterministic", "device", "torch",
              "triton", "commit", "fraction_of_ceiling"}  # fmt: skip
    benchmarks = json.loads(raw.read_text())["benchmarks"]
    assert benchmarks and all(set(b["extra_info"]) == wanted for b in benchmarks)
    shown = {b["extra_info"]["provider"]: b["stats"]["median"] for b in benchmarks if "clip" in b["fullname"]}
    assert shown.keys() >= {"cpu", "panels", "open_clip", "product"} and min(shown.values()) > 0

    text = report.full_report([results])
    assert "open_clip" in text and "not yet run on a GPU" in text


def test_every_size_has_its_own_record():
    timed = (SIMILARITY, WIDE, RAGGED, ACCURACY, SMALL, SCALING, GOODNESS, BF16)
    for question in (*timed, MEMORY):
        names = [w.name for w in question]
        assert len(set(names)) == len(names)
    # one record holds one run's times, so no two questions may time the same size
    names = [w.name for question in timed for w in question]
    assert len(set(names)) == len(names)


def _family(**functions) -> Family:
    providers = {name: Provider("ours" if name == "cpu" else "rival", name, f) for name, f in functions.items()}
    reference = {"reference": Provider("truth", "reference", lambda: _product)}
    return Family("toy", "toy", lambda shape, random: {"x": torch.randn(shape, generator=random)}, ("x",),
                  providers | reference, 1, lambda shape: 1.0, (4,), lambda shape: shape)  # fmt: skip


def _product(x):
    return x["x"].square().sum()


def test_a_rival_that_fails_costs_its_own_row_only():
    def missing():
        raise ImportError("No module named 'nobody'")

    def failing():
        return lambda x: torch.empty(1 << 60)

    workload = Workload(_family(cpu=lambda: _product, missing=missing, failing=failing), (4,))
    found = measure.measure(workload, ["missing", "cpu", "failing"], 0.0, 3)
    records = {r["provider"]: r["time"] for r in measure.records(workload, found, {})}
    assert records["cpu"]["rounds"] == 3 and records["cpu"]["rel_error"] < 1e-6 and records["cpu"]["deterministic"]
    assert records["missing"] == {"run": records["cpu"]["run"], "problem": "not installed: No module named 'nobody'"}
    assert records["failing"]["problem"].startswith("out of memory")


def test_errors_and_different_bits_are_seen():
    calls = iter(range(1, 100))
    wrong = {
        "cpu": lambda: lambda x: x["x"].square().sum() * 1.01,
        "drifting": lambda: lambda x: (x["x"] * next(calls)).sum(),
    }
    workload = Workload(_family(**wrong), (50,))
    found = measure.measure(workload, ["cpu", "drifting"], 0.0, 3)
    assert found["cpu"].rel_error == pytest.approx(0.01, rel=1e-3) and found["cpu"].deterministic
    assert found["drifting"].deterministic is False


def test_peak_memory_is_that_of_the_run():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    kept, result = measure.peak_beyond(lambda: torch.ones(8 << 20).sum().item())
    assert result == float(8 << 20)
    assert 30e6 < kept < 60e6


def _results(**times) -> dict:
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


def _time(ratio: float) -> dict:
    return {"over_ours": ratio, "over_ours_quartiles": [ratio, ratio], "rounds": 5}


@pytest.mark.parametrize("ratio,state", ((3.2, bars.MET), (3.19, bars.MISSED), (None, bars.NOT_MEASURED)))
def test_verdict_on_a_speed(ratio, state):
    results = _results(**({} if ratio is None else {"clip": _time(ratio)}))
    assert bars.faster("clip", "open_clip", 3.2)(results).state == state


def test_a_rival_out_of_memory_gives_no_verdict_but_its_reason():
    verdict = bars.faster("clip", "open_clip", 2)(_results(clip={"problem": "out of memory"}))
    assert verdict == bars.Verdict(bars.NOT_MEASURED, note="out of memory")


@pytest.mark.parametrize(
    "seconds,flags,state",
    (
        (0.5, [], bars.MET),
        (0.9, [], bars.NOT_REACHABLE),
        (0.9, ["avx512_bf16"], bars.MISSED),
        (0.9, ["amx_bf16"], bars.MISSED),
    ),
)
def test_verdict_on_sixteen_bits(seconds, flags, state):
    """Not reaching it is excused only by a processor without such products, and reaching it never needs an excuse."""
    results = _results()
    results["device"]["flags"] = flags
    results["records"] = [{"workload": "w", "provider": "cpu-bf16", "time": {"over_ours": seconds}}]
    assert bars.sixteen_bit("w", 1.8)(results).state == state


@pytest.mark.parametrize("peaks,state", (((1e6, 63e6), bars.MET), ((1e6, 64e6), bars.MISSED), ((), bars.NOT_MEASURED)))
def test_verdict_on_memory_counts_every_size(peaks, state):
    results = _results()
    results["records"] = [
        {"workload": f"w{i}", "provider": "cpu", "family": "clip", "shape": [2**i, 8], "memory": {"peak_bytes": peak}}
        for i, peak in enumerate(peaks)
    ]
    assert bars.memory("clip")(results).state == state


def test_kernels_count_as_unmeasured_until_a_gpu_has_run_them():
    results = _results(clip=_time(2.0))
    assert report.gpu_table([results]).count("not yet run on a GPU") == 2 * len(bars.GPU_KERNELS)
    gpu = {
        "device": {"kind": "gpu", "name": "a GPU"},
        "records": [{"workload": "clip", "provider": "triton", "family": "clip", "time": {"seconds": 1.0}}],
    }
    text = report.gpu_table([results, gpu])
    assert "| similarity, both sums or rows only | a GPU | not yet run on a GPU |" in text


def test_merging_keeps_what_was_not_measured_anew(tmp_path):
    record = {"workload": "w", "provider": "p", "time": {"seconds": 1.0}}
    path = store.merge(tmp_path, [record, {"workload": "v", "provider": "p", "time": {"seconds": 2.0}}])
    store.merge(tmp_path, [{"workload": "w", "provider": "p", "memory": {"peak_bytes": 3}}])
    found = {r["workload"]: r for r in store.load(path)["records"]}
    assert found["w"] == record | {"memory": {"peak_bytes": 3}} and found["v"]["time"] == {"seconds": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ("", "{", "[]", '{"schema": 99}'))
def test_a_file_that_is_no_results_file_is_named(tmp_path, text, capsys):
    (tmp_path / "cpu-x.json").write_text(text)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "cpu-x.json" in capsys.readouterr().err


def test_readme_block_is_written_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    records = [
        {"workload": CLIP.name + "-8192x128", "provider": "open_clip", "family": "clip", "shape": [8192, 128],
         "kind": "rival", "time": {**_time(4.0), "commit": "abc", "when": "2026-01-01T00:00Z"}}
    ]  # fmt: skip
    records += [
        {"workload": f"nt_xent-{n}x128", "provider": "cpu", "family": "nt_xent", "shape": [n, 128], "kind": "ours",
         "time": {"seconds": n / 1e5, "commit": "abc", "when": "2026-01-01T00:00Z"}}
        for n in (256, 512, 1024)
    ]  # fmt: skip
    path = store.merge(tmp_path / "results", records)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    options = ["--results", str(path.parent)]
    assert report.main([*options, "--check", str(readme)]) == 1
    assert report.main([*options, "--write", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "4.00 x" in text and "images/" in text
    images = list((tmp_path / "images").iterdir())
    assert len(images) == 2 and all(image.stat().st_size < 100_000 for image in images)
    assert report.main([*options, "--check", str(readme)]) == 0

    records[0]["time"]["over_ours"] = 5.0
    store.merge(path.parent, records)
    capsys.readouterr()
    assert report.main([*options, "--check", str(readme)]) == 1
    assert capsys.readouterr().err.count("stale") == 3  # the block and both plots
    readme.write_text("no markers")
    assert report.main([*options, "--write", str(readme)]) == 2

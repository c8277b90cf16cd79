"""benchmarks/: a quick run of everything, what is measured, and how results are merged."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from benchmark_cases import record_of

from benchmarks import bars, machine, measure, report, store
from benchmarks.provider import Family, Provider
from benchmarks.variants import FAMILIES, NUMERICS
from benchmarks.workloads import BF16, GOODNESS, MEMORY, SIMILARITY, SMALL, TIMED, Workload

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
        timeout=1200,
    )


@pytest.mark.long
def test_a_quick_run_measures_every_family(tmp_path):
    raw = tmp_path / "raw.json"
    done = _quick(tmp_path / "results", f"--benchmark-json={raw}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]

    wanted = {"provider", "workload", "units", "tflops", "peak_bytes", "rel_error", "deterministic", "device", "torch",
              "triton", "commit", "fraction_of_ceiling"}  # fmt: skip
    (results,) = store.load_all(tmp_path / "results")
    assert {r["family"] for r in results["records"]} == set(FAMILIES) - set(NUMERICS) | {next(iter(NUMERICS))}
    for record in results["records"]:
        for part in ("time", "memory"):
            assert "problem" not in record.get(part, {}), record
    timed = [r for r in results["records"] if "time" in r and r["kind"] != "ceiling"]
    for record in timed:
        time = record["time"]
        assert time["seconds"] > 0 and time["rounds"] >= 2 and time["peak_bytes"] >= 0, record
        assert time["rel_error"] < (0.05 if record["dtype"] == "bfloat16" else 1e-5), record
        assert isinstance(time["deterministic"], bool) and {"commit", "when", "torch"} <= time.keys(), record
        assert wanted <= record.keys() | time.keys(), record
    assert all("over_ours" in r["time"] for r in timed)

    benchmarks = json.loads(raw.read_text())["benchmarks"]
    assert benchmarks and all(set(b["extra_info"]) == wanted for b in benchmarks)
    shown = {b["extra_info"]["provider"]: b["stats"]["median"] for b in benchmarks if "clip" in b["fullname"]}
    assert shown.keys() >= {"cpu", "panels", "open_clip", "product"} and min(shown.values()) > 0

    text = report.full_report([results])
    assert "open_clip" in text and "not yet measured on a GPU" in text
    assert "| memeff | needs a CUDA GPU |" in text


def test_every_size_has_its_own_record():
    for question in (*TIMED, MEMORY):
        names = [(w.name, provider) for w in question for provider in w.providers()]
        assert len(set(names)) == len(names)
    # one record holds one run's times, so no two questions may time the same size
    names = [w.name for question in TIMED for w in question]
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


def test_a_rival_in_bfloat16_is_compared_with_our_kernels_in_bfloat16():
    workload = next(w for w in BF16 if w.family.name == "clip")
    seconds = {"cpu": 4.0, "cpu-bf16": 1.0, "open_clip-bf16": 3.0}
    found = {n: measure.Samples(total={0: s}, forward={0: s}) for n, s in seconds.items()}
    records = {r["provider"]: r for r in measure.records(workload, found, {})}
    assert {n: r["time"]["over_ours"] for n, r in records.items()} == {
        "cpu": 1.0, "cpu-bf16": 0.25, "open_clip-bf16": 3.0
    }  # fmt: skip
    assert records["open_clip-bf16"]["dtype"] == "bfloat16"


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


def test_merging_keeps_what_was_not_measured_anew(tmp_path):
    one, other = record_of("w-1", "p", time={"seconds": 1.0}), record_of("v-1", "p", time={"seconds": 2.0})
    path = store.merge(tmp_path, [one, other])
    anew = record_of("w-1", "p", memory={"peak_bytes": 3})
    store.merge(tmp_path, [anew])
    found = {r["workload"]: r for r in store.load(path)["records"]}
    assert found == {"w-1": one | {"memory": anew["memory"]}, "v-1": other}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_another_machine_measured_is_filed_under_its_own_name(tmp_path, capsys):
    """A GPU's results file, and gpu.json of tools.gpu_measure, merged on a machine that has no GPU."""
    own = store.merge(tmp_path / "here", [record_of("w-1", "cpu", time={"seconds": 1.0})])
    gpu = {"slug": "gpu-made-up", "kind": "gpu", "name": "Made up", "isa": "sm_90", "threads": 1, "flags": []}
    record = record_of("clip-64x8", "triton", time={"seconds": 2.0})
    theirs = store.merge(tmp_path / "there", [record], gpu, {"torch": "2.14"})
    assert theirs.name == "gpu-made-up.json"

    both = {"forward ms": 4.0, "forward fraction": 0.81, "both ms": 16.0, "both fraction": 0.72, "MiB": 3.0}
    clip = {
        "key": "clip 65536x65536x512",
        "name": "clip",
        "rows": 65536,
        "width": 512,
        "triton": {**both, "same bits": True, "forward device ms": 2.0, "both device ms": 8.0},
        "cuda": {**both, "both ms": 17.0, "same bits": True},
        "panels": {**both, "both ms": 99.0},
    }
    clip |= {"memeff": {**both, "both ms": 32.0}, "inf-cl": {"problem": "not installed"}}
    cosine = {"key": "pair cosine 64x64x56x56", "name": "pair cosine", "ours": {**both, "both fraction": 0.9}}
    queue = {"key": "info_nce 4096x65536x128", "name": "info_nce", "rows": 4096, "width": 128, "ours": both}
    measured = {"device": "Made up", "torch": "2.14", "product_tflops": 1.0, "copy_gbytes": 1.0,
                "commit": "abc1234", "when": "2026-11-26T05:00Z",
                "sources": {"triton": {"similarity, normalisers": "1a", "SigLIP": "2b"}, "cuda": {}}}  # fmt: skip
    layer = {"key": "linear goodness 64x32x16", "name": "linear goodness", "rows": 64, "width": 16, "triton": both}
    (tmp_path / "gpu.json").write_text(json.dumps(measured | {"rows": [clip, cosine, queue, layer]}))

    for path in (theirs, tmp_path / "gpu.json"):
        assert report.main(["--results", str(tmp_path / "here"), "--merge", str(path)]) == 0
    assert sorted(p.name for p in own.parent.iterdir()) == sorted([own.name, "gpu-made-up.json"])
    assert [r["workload"] for r in store.load(own)["records"]] == ["w-1"]
    found = store.load(own.parent / "gpu-made-up.json")
    assert found["device"]["name"] == "Made up" and found["versions"]["torch"] == "2.14"
    times = {(r["workload"], r["provider"]): r["time"] for r in found["records"]}
    assert len(times) == 8 and times["clip-64x8", "triton"] == record["time"]
    assert times["linear_goodness-64x32x16", "triton"]["tflops"] == pytest.approx(4 * 2 * 64 * 32 * 16 / 0.016 / 1e12)
    time = times["clip-65536x512", "triton"]
    assert (time["seconds"], time["forward_seconds"]) == (0.016, 0.004)
    assert (time["device_seconds"], time["forward_device_seconds"]) == (0.008, 0.002)
    assert time["tflops"] == pytest.approx(4 * 2 * 65536**2 * 512 / 0.008 / 1e12)
    assert (time["commit"], time["when"]) == ("abc1234", "2026-11-26T05:00Z")
    assert time["sources"] == {"similarity, normalisers": "1a"}
    assert not {"device_seconds", "sources"} & times["clip-65536x512", "cuda"].keys()
    adopted = [r for r in found["records"] if r["workload"] == "clip-65536x512"]
    kinds = {r["provider"]: r["kind"] for r in adopted}
    assert kinds == dict.fromkeys(("triton", "cuda", "panels"), "ours") | dict.fromkeys(("memeff", "inf-cl"), "rival")
    assert "16.0 ms (8.00 ms on the device)" in report.family_table({"records": adopted}, "clip")
    assert times["clip-65536x512", "inf-cl"]["problem"] == "not installed"
    verdict = {bar.required: bar.check(found) for bar in bars.GPU}
    assert verdict["<= 32 ms"].state == bars.MET and verdict[">= 80 %, >= 70 %"].state == bars.MET
    assert verdict[">= 88 %"] == bars.Verdict(bars.MET, "90%", "least, at pair_cosine-64x64x56x56, of 1")
    assert "2.00 x memeff" in verdict[">= 1.5 x, 2 x, 1 x"].measured
    for number, text in enumerate(("{", "[]", '{"schema": 1}')):
        (tmp_path / f"{number}.json").write_text(text)
        assert report.main(["--results", str(tmp_path), "--merge", str(tmp_path / f"{number}.json")]) == 2
        assert f"{number}.json" in capsys.readouterr().err


def test_a_gpu_measures_the_design_s_sizes_with_the_same_files():
    code = (
        "from benchmarks import workloads as w\n"
        "for question in (w.SIMILARITY, w.WIDE, w.RAGGED, w.SMALL, w.SCALING, w.GOODNESS, w.ACCURACY):\n"
        "    for size in question: print(size.name, *size.providers(), sep=';')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"FFCL_BENCH_DEVICE": "cuda"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line.partition(";")[0]: line.split(";")[1:] for line in done.stdout.splitlines()}
    sizes = [f"clip-{n}x512" for n in (4096, 32768, 65536, 131072, 262144, 1 << 20)]
    sizes += ["clip-32768x768", "clip-32768x1024", "info_nce_queue-4096x65536x128", "info_nce_queue-8192x262144x768"]
    sizes += ["nt_xent-131072x256", "sup_con_n-32768x128", "sup_con_lonely-32768x128", "siglip-65536x768"]
    sizes += ["clip-30011x1152", "goodness_normalize-65536x4096", "pool_goodness_nhwc-512x64x56x56", "layerwise-8192"]
    assert set(sizes) <= set(found)
    assert {"triton", "cuda", "memeff", "inf-cl", "open_clip, compiled", "product 8192"} <= set(found["clip-65536x512"])
    assert not any("cpu" in names or "cpu-bf16" in names for names in found.values())


def test_an_unknown_device_is_named(monkeypatch):
    monkeypatch.setenv("FFCL_BENCH_DEVICE", "tpu")
    with pytest.raises(ValueError, match="FFCL_BENCH_DEVICE must be cpu, cuda or unset; got 'tpu'"):
        machine.target.__wrapped__()


def test_a_gradient_that_a_rival_does_not_have_is_left_out_of_its_error():
    workload = Workload(
        _family(
            cpu=lambda: lambda x: (x["x"] * x["y"]).sum(), partial=lambda: lambda x: (x["x"] * x["y"].detach()).sum()
        ),
        (4,),
    )
    family = dataclasses.replace(
        workload.family,
        inputs=lambda shape, random: {k: torch.randn(shape, generator=random) for k in "xy"},
        leaves=("x", "y"),
        providers=workload.family.providers
        | {"reference": Provider("truth", "reference", lambda: lambda x: (x["x"] * x["y"]).sum())},
    )
    found = measure.measure(dataclasses.replace(workload, family=family), ["cpu", "partial"], 0.0, 3)
    assert all(s.problem is None and s.rel_error < 1e-6 and s.deterministic for s in found.values())


def test_a_brief_run_measures_every_cpu_bar():
    brief = {w.name for question in (SIMILARITY, SMALL, BF16, GOODNESS, MEMORY) for w in question if w.brief}
    barred = ["nt_xent-8192x128", "nt_xent-8192x512", "clip-8192x128", "clip-8192x512", "sup_con-8192x128"]
    barred += [f"{family}-512x{d}" for family in ("nt_xent", "clip", "sup_con") for d in (128, 512)]
    barred += ["nt_xent-8192x256", "clip-8192x256", "pair_cosine-64x64x56x56", "goodness_normalize-4096x2048"]
    assert set(barred) <= brief
    assert {w.family.name for w in MEMORY if w.brief} >= {"nt_xent", "clip", "sup_con", "info_nce", "siglip"}

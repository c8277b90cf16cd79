"""benchmarks/: a quick run of everything, the merging of results, the verdict on each bar, and the report's checks."""

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

from benchmarks import ablation_report, bars, machine, measure, plots, report, store, trainer_tables
from benchmarks.families import CLIP
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


def test_rivals_that_did_not_run_are_listed_with_the_reason():
    results = _results(clip={"problem": "not installed: No module named 'open_clip'"}, small=_time(2.0))
    text = report.absent_table(results)
    assert "| open_clip | not installed: No module named 'open_clip' | clip 8192 x 128 |" in text
    assert "| siglip-kernel | needs a CUDA GPU | siglip |" in text and "small" not in text


def test_rivals_of_which_another_machine_tells_nothing_are_listed(monkeypatch):
    monkeypatch.setattr(report, "target", lambda: "cpu")
    measured = [
        {"family": "clip", "provider": name, "kind": "rival"}
        for name in ("memeff", "cut-cross-entropy, exact", "compiled")
    ]
    text = report.absent_table({"device": {"kind": "gpu"}, "records": measured})
    assert "| quack | no record: not installed there, or left out | clip |" in text
    assert not any(name in text for name in ("memeff", "cut-cross-entropy", "compiled", "siglip-kernel"))


def test_what_nobody_has_measured_is_listed():
    records = [
        {"workload": w.name, "provider": name, part: {}}
        for part, question in (*(("time", question) for question in TIMED), ("memory", MEMORY))
        for w in question
        for name in w.providers()
    ]
    results = {"device": {"kind": "cpu"}, "records": records}
    assert report.unmeasured_table(results) == "Nothing: every workload has its records."
    workload = SIMILARITY[0]
    first, *others = workload.providers()
    lacking = [r for r in records if r["workload"] != workload.name or r["provider"] == first or "memory" in r]
    (line,) = report.unmeasured_table(results | {"records": lacking}).splitlines()[2:]
    assert line == f"| {workload.name} | time | {'; '.join(others)} |"


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


def _record(workload: str, provider: str, **parts) -> dict:
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
    table = report.gpu_table([results])
    assert table.count("not yet measured on a GPU") == 2 * len(bars.GPU_KERNELS) - len(bars.NOT_WRITTEN)
    assert "| SigLIP | not yet measured on a GPU | no such kernel |" in table
    gpu = {
        "device": {"kind": "gpu", "name": "a GPU"},
        "records": [{"workload": "clip", "provider": "triton", "family": "clip", "time": {"seconds": 1.0}}],
    }
    text = report.gpu_table([results, gpu])
    assert "| similarity, both sums or rows only | a GPU | not yet measured on a GPU |" in text


def test_merging_keeps_what_was_not_measured_anew(tmp_path):
    one, other = _record("w-1", "p", time={"seconds": 1.0}), _record("v-1", "p", time={"seconds": 2.0})
    path = store.merge(tmp_path, [one, other])
    anew = _record("w-1", "p", memory={"peak_bytes": 3})
    store.merge(tmp_path, [anew])
    found = {r["workload"]: r for r in store.load(path)["records"]}
    assert found == {"w-1": one | {"memory": anew["memory"]}, "v-1": other}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_another_machine_measured_is_filed_under_its_own_name(tmp_path, capsys):
    """A GPU's results file, and gpu.json of tools.gpu_measure, merged on a machine that has no GPU."""
    own = store.merge(tmp_path / "here", [_record("w-1", "cpu", time={"seconds": 1.0})])
    gpu = {"slug": "gpu-made-up", "kind": "gpu", "name": "Made up", "isa": "sm_90", "threads": 1, "flags": []}
    record = _record("clip-64x8", "triton", time={"seconds": 2.0})
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
                "commit": "abc1234", "when": "2026-11-26T05:00Z"}  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(measured | {"rows": [clip, cosine, queue]}))

    for path in (theirs, tmp_path / "gpu.json"):
        assert report.main(["--results", str(tmp_path / "here"), "--merge", str(path)]) == 0
    assert sorted(p.name for p in own.parent.iterdir()) == sorted([own.name, "gpu-made-up.json"])
    assert [r["workload"] for r in store.load(own)["records"]] == ["w-1"]
    found = store.load(own.parent / "gpu-made-up.json")
    assert found["device"]["name"] == "Made up" and found["versions"]["torch"] == "2.14"
    times = {(r["workload"], r["provider"]): r["time"] for r in found["records"]}
    assert len(times) == 7 and times["clip-64x8", "triton"] == record["time"]
    time = times["clip-65536x512", "triton"]
    assert (time["seconds"], time["forward_seconds"]) == (0.016, 0.004)
    assert (time["device_seconds"], time["forward_device_seconds"]) == (0.008, 0.002)
    assert time["tflops"] == pytest.approx(4 * 2 * 65536**2 * 512 / 0.008 / 1e12)
    assert (time["commit"], time["when"]) == ("abc1234", "2026-11-26T05:00Z")
    assert "device_seconds" not in times["clip-65536x512", "cuda"]
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


@pytest.mark.parametrize("text", ("", "{", "[]", '{"schema": 99}'))
def test_a_file_that_is_no_results_file_is_named(tmp_path, text, capsys):
    (tmp_path / "cpu-x.json").write_text(text)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "cpu-x.json" in capsys.readouterr().err


_SOUND = {
    "schema": 1,
    "device": {"slug": "cpu-x", "kind": "cpu", "name": "x", "isa": "avx2", "threads": 2, "flags": []},
    "versions": {"torch": "2.14"},
    "records": [_record("clip-64x8", "open_clip", time=_time(2.0), memory={})],
}


@pytest.mark.parametrize("records", (_SOUND["records"], [], [_record("clip-64x8", "cpu")]))
def test_a_sound_file_has_its_report_also_where_nothing_was_measured(tmp_path, records, capsys):
    (tmp_path / "cpu-x.json").write_text(json.dumps(_SOUND | {"records": records}))
    readme = tmp_path / "README.md"
    readme.write_text(report.BEGIN + report.END)
    assert report.main(["--results", str(tmp_path)]) == 0
    assert ("nothing measured" in capsys.readouterr().out) == ("time" not in str(records))
    assert report.main(["--results", str(tmp_path), "--check", str(readme)]) == 1


@pytest.mark.parametrize(
    "keys,value,told",
    (
        (["device"], None, "has no 'device'"),
        (["device"], [], "device must be dict; got []"),
        (["device", "kind"], None, "device has no 'kind'"),
        (["device", "kind"], "tpu", "device: kind must be cpu or gpu; got 'tpu'"),
        (["versions"], None, "has no 'versions'"),
        (["records"], None, "has no 'records'"),
        (["records"], {}, "records must be list; got {}"),
        (["records", 0], {}, "record 0 has no 'workload'"),
        (["records", 0], 7, "record 0 must be an object; got 7"),
        (["records", 0, "shape"], [], "record 0 (clip-64x8, open_clip): shape must be a list of integers; got []"),
        (["records", 0, "kind"], None, "record 0 has no 'kind'"),
        (["records", 0, "time"], {}, "record 0 (clip-64x8, open_clip): time has no 'when'"),
        (["records", 0, "time", "seconds"], None, "record 0 (clip-64x8, open_clip): time has no 'seconds'"),
        (["records", 0, "time", "seconds"], "1", "time: seconds must be int or float; got '1'"),
        (["records", 0, "time", "over_ours_quartiles"], None, "time has no 'over_ours_quartiles'"),
        (["records", 0, "memory", "peak_bytes"], None, "memory has no 'peak_bytes'"),
    ),
)
def test_what_a_results_file_lacks_is_told_in_one_line(tmp_path, keys, value, told, capsys):
    """``value``: what stands there instead, None for nothing."""
    found = json.loads(json.dumps(_SOUND))
    *way, last = keys
    inside = found
    for key in way:
        inside = inside[key]
    if value is None:
        del inside[last]
    else:
        inside[last] = value
    (tmp_path / "cpu-x.json").write_text(json.dumps(found))
    assert report.main(["--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cpu-x.json" in error and told in error


def test_every_comparison_that_a_rival_wins_is_in_the_readme_block():
    won = [
        _record("siglip-512x512", "open_clip", time=_time(0.87)),
        _record("goodness_normalize-65536x512", "eager, compiled", time=_time(0.27)),
    ]
    others = [
        _record("clip-512x512", "open_clip", time=_time(1.0)),
        _record("clip-512x512", "open_clip, compiled", time={"problem": "not installed"}),
        _record("clip-512x512", "product", kind="ceiling", time=_time(0.5)),
        _record("clip-512x512", "cpu-bf16", kind="ours", time=_time(0.5)),
    ]
    told = (
        "- rivals are faster in 2 of 3 comparisons: ReLU + goodness + normalise, 65536 x 512: eager, compiled (0.27 x);"
        " SigLIP, learnable scale and bias, 512 x 512: open_clip (0.87 x)"
    )
    assert told in report.readme_block([_SOUND | {"records": won + others}, _gpu()]).splitlines()
    block = report.readme_block([_SOUND | {"records": others}]).splitlines()
    assert "- rivals are faster in none of 1 comparisons" in block


def test_readme_block_is_written_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_ROOT", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    records = [_record(CLIP.name + "-8192x128", "open_clip", time=_time(4.0))]
    records += [_record(f"nt_xent-{n}x128", "cpu", time={"seconds": n / 1e5}) for n in (256, 512, 1024)]
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


def _gpu(**changed) -> dict:
    """One GPU's results that meet every bar, but for what is changed by workload."""
    ours = {
        "clip-4096x512": {"seconds": 1e-3},
        "clip-32768x512": {"seconds": 8e-3, "forward_fraction_of_ceiling": 0.8, "fraction_of_ceiling": 0.7},
        "clip-65536x512": {"seconds": 32e-3, "forward_fraction_of_ceiling": 0.9, "fraction_of_ceiling": 0.8},
        "clip-1048576x512": {"seconds": 8.4, "peak_bytes": 7.9e9},
        "clip-32768x128": {"seconds": 3.4e-3},
        "nt_xent-32768x128": {"seconds": 2e-3},
        "pair_cosine-64x64x56x56": {"seconds": 1e-3, "fraction_of_ceiling": 0.88},
    }
    rivals = {
        ("clip-65536x512", "memeff"): 48e-3,
        ("clip-32768x512", "open_clip"): 16e-3,
        ("clip-4096x512", "open_clip, compiled"): 1e-3,
        ("nt_xent-32768x128", "lightly"): 5e-3,
    }
    records = [
        {"workload": w, "family": w.partition("-")[0], "provider": "triton", "kind": "ours",
         "time": {"deterministic": True} | time | changed.get(w, {})}
        for w, time in ours.items()
    ]  # fmt: skip
    records += [
        {"workload": w, "family": w.partition("-")[0], "provider": name, "kind": "rival", "time": {"seconds": seconds}}
        for (w, name), seconds in rivals.items()
    ]
    return {"schema": 1, "device": {"kind": "gpu", "name": "a GPU", "flags": []}, "records": records}


def test_gpu_bars_are_checked_at_their_limits():
    assert [bar.check(_gpu()).state for bar in bars.GPU] == [bars.MET] * len(bars.GPU)
    assert [bar.check(_results()).state for bar in bars.GPU] == [bars.NOT_MEASURED] * len(bars.GPU)
    assert report.gpu_table([_gpu()]).count("✅ met") == len(bars.GPU)


@pytest.mark.parametrize(
    "workload,change,missed",
    (
        ("clip-32768x512", {"forward_fraction_of_ceiling": 0.79}, 0),
        ("clip-65536x512", {"seconds": 32.1e-3, "fraction_of_ceiling": 0.69}, 0),
        ("clip-65536x512", {"seconds": 32.1e-3}, 1),
        ("clip-4096x512", {"seconds": 1.01e-3}, 2),
        ("nt_xent-32768x128", {"seconds": 2.01e-3}, 3),
        ("clip-1048576x512", {"seconds": 8.6}, 4),
        ("clip-1048576x512", {"peak_bytes": 8.1e9}, 4),
        ("pair_cosine-64x64x56x56", {"fraction_of_ceiling": 0.87}, 5),
        ("clip-4096x512", {"deterministic": False}, 6),
    ),
)
def test_a_gpu_bar_that_is_missed(workload, change, missed):
    assert bars.GPU[missed].check(_gpu(**{workload: change})).state == bars.MISSED


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


@pytest.mark.parametrize("name", ("roofline", "fractions"))
def test_plots_against_the_ceilings(name, tmp_path):
    def record(workload, provider, kind, shape, units, **time):
        return {"workload": workload, "family": workload.partition("-")[0], "provider": provider, "kind": kind,
                "shape": shape, "units": units, "time": {"seconds": 0.1} | time}  # fmt: skip

    results = {"device": {"kind": "cpu", "threads": 2}, "records": [
        record("clip-64x8", "cpu", "ours", [64, 8], 4, tflops=0.05, fraction_of_ceiling=0.7),
        record("clip-64x8", "product", "ceiling", [64, 8], 4, tflops=0.1, fraction_of_ceiling=1.0),
        record("goodness_normalize-6x4", "cpu", "ours", [6, 4], 0, gigabytes_per_second=9.0, fraction_of_ceiling=0.9),
        record("goodness_normalize-6x4", "copy", "ceiling", [6, 4], 0, gigabytes_per_second=10.0),
    ]}  # fmt: skip
    assert name in plots.available(results)
    plots.draw(name, results, tmp_path / "plot.svg", "digest-of-records")
    first = (tmp_path / "plot.svg").read_text()
    assert "<svg" in first and "digest-of-records" in first
    plots.draw(name, results, tmp_path / "plot.svg", "digest-of-records")
    assert (tmp_path / "plot.svg").read_text() == first


def test_a_brief_run_measures_every_cpu_bar():
    brief = {w.name for question in (SIMILARITY, SMALL, BF16, GOODNESS, MEMORY) for w in question if w.brief}
    barred = ["nt_xent-8192x128", "nt_xent-8192x512", "clip-8192x128", "clip-8192x512", "sup_con-8192x128"]
    barred += [f"{family}-512x{d}" for family in ("nt_xent", "clip", "sup_con") for d in (128, 512)]
    barred += ["nt_xent-8192x256", "clip-8192x256", "pair_cosine-64x64x56x56", "goodness_normalize-4096x2048"]
    assert set(barred) <= brief
    assert {w.family.name for w in MEMORY if w.brief} >= {"nt_xent", "clip", "sup_con", "info_nce", "siglip"}


def _trainer(speedup: float, local: float) -> dict:
    def time(ratio):
        return {"over": "plain PyTorch, leaf modules", "speedup": ratio, "speedup_quartiles": [ratio, ratio],
                "rounds": 3, "loss_difference": 1e-5, "images_per_second": 9.0}  # fmt: skip

    steps = {"plain PyTorch, leaf modules": {"time": {"images_per_second": 4.0}, "memory": {"peak_bytes": 7e6}},
             "ours, leaf modules": {"time": time(1.1), "memory": {"peak_bytes": local}},
             "ours, leaf modules, channels last": {"time": time(speedup)},
             "end-to-end back-propagation": {"memory": {"peak_bytes": 5e6}}}  # fmt: skip
    return {"batch": 64, "pixels": 64, "backbone": "resnet18", "steps": steps}


@pytest.mark.parametrize(
    "speedup,local,states",
    ((2.5, 4e6, (bars.MET, bars.MET)), (2.49, 5e6, (bars.MISSED, bars.MISSED))),
)
def test_verdicts_on_the_trainer_and_its_tables(tmp_path, speedup, local, states):
    (tmp_path / "trainer").mkdir()
    path = store.merge(tmp_path, [{"workload": "w", "provider": "p", "family": "f", "shape": [1], "kind": "ours"}])
    (tmp_path / "trainer" / path.name).write_text(json.dumps(_trainer(speedup, local)))
    (results,) = store.load_all(tmp_path)
    assert tuple(bar.check(results).state for bar in bars.CPU[-2:]) == states
    assert f"| ours, leaf modules, channels last | 9 | {speedup:.2f} x | 1.0e-05 |" in trainer_tables.tables(
        results["trainer"]
    )
    unequal = json.loads(json.dumps(results))
    unequal["trainer"]["steps"]["ours, leaf modules, channels last"]["time"]["loss_difference"] = 0.1
    assert bars.CPU[-2].check(unequal).state == bars.MISSED
    assert bars.CPU[-2].check(_results()).state == bars.CPU[-1].check(_results()).state == bars.NOT_MEASURED
    lacking = _trainer(speedup, local)
    del lacking["steps"]["ours, leaf modules"]["time"]["loss_difference"]
    for text, told in (("{", "JSON"), ("{}", "has no 'batch'"), (json.dumps(lacking), "has no 'loss_difference'")):
        (tmp_path / "trainer" / path.name).write_text(text)
        with pytest.raises(ValueError, match=f"trainer.*{told}"):
            store.load_all(tmp_path)


def test_ablations_in_the_documentation_are_checked_against_the_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation_report, "ROOT", tmp_path)
    monkeypatch.setattr(ablation_report, "STORED", tmp_path / "runs")
    monkeypatch.setattr(ablation_report, "IMAGES", tmp_path)
    (tmp_path / "runs").mkdir()

    def store_runs(best: float) -> None:
        rows = {"no pretraining": (0.5, 0.6), "FFCL: both": (0.7, best), "other": (0.4, 0.5)}
        found = {"rows": [{"name": name, "runs": [
            {"seed": seed, "test": {"accuracy": a, "macro_f1": 0.5, "auc": 0.5}} for seed, a in enumerate(values)
        ]} for name, values in rows.items()]}  # fmt: skip
        (tmp_path / "runs" / "some_name.json").write_text(json.dumps(found))

    store_runs(0.8)
    page = tmp_path / "page.md"
    blocks = [f"<!-- ablation-{kind}:some_name -->\n<!-- ablation:end -->" for kind in ("table", "summary")]
    page.write_text(f"before\n{blocks[0]}\nbetween\n{blocks[1]}\nafter\n")
    assert ablation_report.main(["--check", str(page)]) == 1
    assert ablation_report.main(["--write", str(page)]) == 0 == ablation_report.main(["--check", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and "\nbetween\n" in text and text.endswith("\nafter\n")
    assert "| FFCL: both | 75.00 ± 7.07 |" in text and (tmp_path / "runs" / "some_name.md").read_text() in text
    assert "FFCL 75.0 ± 7.1 % test accuracy, no pretraining 55.0 ± 7.1 %, the other variants between 45.0" in text
    assert "FFCL's +20.0 points come with a standard deviation of 0.0 over 2 seeds." in text
    store_runs(0.9)
    capsys.readouterr()
    assert ablation_report.main(["--check", str(page)]) == 1
    assert capsys.readouterr().err.count("stale") == 3  # the page, the table beside the runs, the plot
    for wrong in ("nothing shown", "<!-- ablation-table:unknown -->\n<!-- ablation:end -->"):
        page.write_text(wrong)
        assert ablation_report.main(["--check", str(page)]) == 2
    (tmp_path / "runs" / "broken.json").write_text('{"rows": []}')
    assert ablation_report.main(["--check", str(page)]) == 2 and "broken.json" in capsys.readouterr().err


def test_the_documentation_reads_records_without_the_tests_packages():
    """The environment of `make docs` has the extras of training and of the documentation alone."""
    absent = "pytest", "hypothesis", "lightly", "open_clip", "info_nce", "pytorch_metric_learning"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\nfrom benchmarks import plots, report, store"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr

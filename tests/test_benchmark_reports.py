"""benchmarks/: the verdict on each bar, the report's tables and plots, and what damaged results are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from benchmark_cases import record_of, results_of, time_of

from benchmarks import ablation_report, bars, cpp_definitions, kernel_sources, plots, report, store, trainer_tables
from benchmarks.families import CLIP
from benchmarks.kernel_sources import KERNELS, SOURCES
from benchmarks.workloads import MEMORY, SIMILARITY, TIMED

ROOT = Path(__file__).resolve().parent.parent


def test_rivals_that_did_not_run_are_listed_with_the_reason():
    results = results_of(clip={"problem": "not installed: No module named 'open_clip'"}, small=time_of(2.0))
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


@pytest.mark.parametrize("ratio,state", ((3.2, bars.MET), (3.19, bars.MISSED), (None, bars.NOT_MEASURED)))
def test_verdict_on_a_speed(ratio, state):
    results = results_of(**({} if ratio is None else {"clip": time_of(ratio)}))
    assert bars.faster("clip", "open_clip", 3.2)(results).state == state


def test_a_rival_out_of_memory_gives_no_verdict_but_its_reason():
    verdict = bars.faster("clip", "open_clip", 2)(results_of(clip={"problem": "out of memory"}))
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
    results = results_of()
    results["device"]["flags"] = flags
    results["records"] = [{"workload": "w", "provider": "cpu-bf16", "time": {"over_ours": seconds}}]
    assert bars.sixteen_bit("w", 1.8)(results).state == state


@pytest.mark.parametrize("peaks,state", (((1e6, 63e6), bars.MET), ((1e6, 64e6), bars.MISSED), ((), bars.NOT_MEASURED)))
def test_verdict_on_memory_counts_every_size(peaks, state):
    results = results_of()
    results["records"] = [
        {"workload": f"w{i}", "provider": "cpu", "family": "clip", "shape": [2**i, 8], "memory": {"peak_bytes": peak}}
        for i, peak in enumerate(peaks)
    ]
    assert bars.memory("clip")(results).state == state


def on_a_gpu(family, provider, **time):
    record = {"workload": family, "provider": provider, "family": family, "time": {"seconds": 1.0} | time}
    return {"device": {"kind": "gpu", "name": "a GPU"}, "records": [record]}


def test_kernels_count_as_unmeasured_until_a_gpu_has_run_them():
    results = results_of(clip=time_of(2.0))
    table = report.gpu_table([results])
    written = sum(kernels in SOURCES[backend] for kernels, _ in KERNELS.values() for backend in SOURCES)
    assert table.count("not yet measured on a GPU") == written
    assert "| SigLIP | not yet measured on a GPU | no such kernel |" in table


@pytest.mark.parametrize("backend", SOURCES)
def test_a_measurement_is_of_the_kernels_that_it_ran(backend):
    now = kernel_sources.digests()
    told = kernel_sources.told(backend, "nt_xent", now)
    rows = {"L2-normalisation"} if backend == "triton" else set()
    assert set(told["sources"]) == {"similarity, normalisers", "similarity, gradients"} | rows
    kernels, families = KERNELS["similarity, the triangle: gradients"]

    def found(*all_results):
        return kernel_sources.confirmed(list(all_results), backend, kernels, families)

    same, other = on_a_gpu("nt_xent", backend, **told), on_a_gpu("nt_xent", backend, sources={kernels: "another"})
    assert found(same) == found(other, same) == "a GPU"
    assert found(other) == "changed since it ran on a GPU"
    failed = on_a_gpu("nt_xent", backend, **told)
    del failed["records"][0]["time"]["seconds"]
    assert found() == found(on_a_gpu("nt_xent", backend)) == found(failed) == kernel_sources.NOT_YET
    assert found(on_a_gpu("clip", backend, **told)) == kernel_sources.NOT_YET
    assert kernel_sources.told("open_clip", "clip", now) == {}


def test_the_hash_of_kernels_is_of_their_code_and_of_what_it_uses(tmp_path):
    triton, csrc = tmp_path / "ffcl_fast/backends/triton", tmp_path / "csrc"
    triton.mkdir(parents=True)
    csrc.mkdir()
    for module in {name for modules in SOURCES["triton"].values() for name in modules}:
        (triton / f"{module}.py").write_text("")
    kernel = "@triton.jit\ndef kernel(x):\n    tile = 1\n    return helper(x) * LIMIT + tile\n"
    tiles = "LIMIT = 3\n@triton.jit\ndef helper(x):\n    return x\n@triton.jit\ndef tile(x):\n    return x\n"
    (csrc / "goodness.cu").write_text('#include "rows.cuh"\nint f() { return g(); }\n')

    def hashes(kernel=kernel, tiles=tiles, rows="int g();\n"):
        (triton / "siglip.py").write_text(kernel)
        (triton / "tiles.py").write_text(tiles)
        (csrc / "rows.cuh").write_text(rows)
        kernel_sources.digests.cache_clear()
        found = kernel_sources.digests(tmp_path)
        return found["triton"]["SigLIP"], found["cuda"]["ReLU + goodness + normalise"]

    first = hashes()
    # Comments, docstrings, what is no kernel, and a function that only has a local variable's name.
    assert hashes("import torch  # why\n" + kernel.replace("tile = 1", '"""What."""\n    tile = 1  # one')) == first
    assert hashes(tiles=tiles.replace("def tile(x):\n    return x", "def tile(x):\n    return -x")) == first
    assert hashes(rows="// why\nint  g();\nint unused() { return 1; }\n") == first
    for changed in (kernel.replace("* LIMIT", "/ LIMIT"),):
        assert hashes(changed)[0] != first[0]
    for changed in (tiles.replace("LIMIT = 3", "LIMIT = 4"), tiles.replace("return x", "return -x", 1)):
        assert hashes(tiles=changed)[0] != first[0]
    assert hashes(rows="int g(int);\n")[1] != first[1]
    by_another = "template <class T>\nstruct S { T x; };\nint g() { return S<int>().x; }\n"
    assert hashes(rows=by_another)[1] != hashes(rows=by_another.replace("T x;", "T x = 0;"))[1]
    kernel_sources.digests.cache_clear()


def test_definitions_of_a_header():
    header = """
#pragma once
#include "a.h"
#ifdef __CUDACC__
#define HD __host__ \\
           __device__
#endif
namespace ffcl {
namespace {
struct Chip { int a = 0; void f() { if (a) {} } };  // {
template <class T, int (*F)(int) = nullptr>
HD T most(T a, T b) { return a > b ? a : b; }
template <int N>
__global__ void __launch_bounds__(256, 2) kernel(int* x) {
#if __CUDA_ARCH__ >= 900
  x[0] = 1; /* ; } */
#endif
}
using Row = float[4];
constexpr int SIZE = 3, LIST[] = {1, 2};
constexpr int
#ifdef __CUDACC__
    LATE = 1;
#else
    LATE = 2;
#endif
enum class Way : int { one, two = 3 };
inline const char* brace() { return "{ // } \\""; }
template <>
int special<float>() { return 4; }
bool operator==(Chip a, Chip b);
int later(int n = 3);
extern int count;
}  // namespace
static_assert(SIZE == 3);
}
"""
    found = list(cpp_definitions.definitions(header))
    names = ["HD", "Chip", "most", "kernel", "Row", "SIZE", "LATE", "LATE", "enum", "brace", "", "", "later", "count",
             "static_assert"]  # fmt: skip
    assert [found_names[0] for found_names, _ in found] == names
    assert ("SIZE", "LIST") in [found_names for found_names, _ in found]
    assert {"Way", "one", "two"} <= set(found[8][0])
    texts = {found_names[0]: text for found_names, text in found}
    assert texts["brace"].endswith('return "{ // } \\""; }')
    assert texts["Chip"] == "struct Chip { int a = 0; void f() { if (a) {} } }"
    assert texts["HD"] == "#define HD __host__ \\ __device__"
    assert "#if __CUDA_ARCH__ >= 900 x[0] = 1; #endif }" in texts["kernel"]
    assert texts["SIZE"] == "constexpr int SIZE = 3, LIST[] = {1, 2}"


def test_every_line_of_our_headers_is_of_a_definition():
    """But for conditions of the preprocessor and what opens and closes namespaces."""
    for path in (ROOT / "csrc").glob("*.*h"):
        text = cpp_definitions.without_comments(path.read_text())
        chunks = " ".join(chunk for _, chunk in cpp_definitions.definitions(text))
        for line in map(cpp_definitions.words, text.splitlines()):
            inert = re.match(r"#\s*(?!define)|(inline )?namespace\b|extern \"C\" \{", line) or line in ("}", "};", "")
            assert inert or line.rstrip("\\;").strip() in chunks, f"{path.name}: {line}"


@pytest.mark.parametrize("text", ("", "{", "[]", '{"schema": 99}'))
def test_a_file_that_is_no_results_file_is_named(tmp_path, text, capsys):
    (tmp_path / "cpu-x.json").write_text(text)
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "cpu-x.json" in capsys.readouterr().err


_SOUND = {
    "schema": 1,
    "device": {"slug": "cpu-x", "kind": "cpu", "name": "x", "isa": "avx2", "threads": 2, "flags": []},
    "versions": {"torch": "2.14"},
    "records": [record_of("clip-64x8", "open_clip", time=time_of(2.0), memory={})],
}


@pytest.mark.parametrize("records", (_SOUND["records"], [], [record_of("clip-64x8", "cpu")]))
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
        record_of("siglip-512x512", "open_clip", time=time_of(0.87)),
        record_of("goodness_normalize-65536x512", "eager, compiled", time=time_of(0.27)),
    ]
    others = [
        record_of("clip-512x512", "open_clip", time=time_of(1.0)),
        record_of("clip-512x512", "open_clip, compiled", time={"problem": "not installed"}),
        record_of("clip-512x512", "product", kind="ceiling", time=time_of(0.5)),
        record_of("clip-512x512", "cpu-bf16", kind="ours", time=time_of(0.5)),
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
    records = [record_of(CLIP.name + "-8192x128", "open_clip", time=time_of(4.0))]
    records += [record_of(f"nt_xent-{n}x128", "cpu", time={"seconds": n / 1e5}) for n in (256, 512, 1024)]
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
    assert [bar.check(results_of()).state for bar in bars.GPU] == [bars.NOT_MEASURED] * len(bars.GPU)
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
    assert bars.CPU[-2].check(results_of()).state == bars.CPU[-1].check(results_of()).state == bars.NOT_MEASURED
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

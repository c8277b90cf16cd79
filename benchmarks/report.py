"""Tables, plots and the check of every bar, from the stored measurements only.

python -m benchmarks.report                      print everything as Markdown
python -m benchmarks.report --write README.md    put the summary between its markers, and draw its plots
python -m benchmarks.report --check README.md    fail where summary or plots are not those of the measurements
python -m benchmarks.report --merge FILE         take over what another machine measured: its results file or gpu.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from . import adopt, bars, store, trainer_tables, workloads
from .bars import MET, MISSED, NOT_MEASURED, NOT_REACHABLE, Verdict
from .kernel_sources import KERNELS, SOURCES, confirmed
from .machine import target
from .provider import baseline
from .variants import FAMILIES

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
_MARK = {MET: "✅ met", MISSED: "❌ missed", NOT_MEASURED: "not yet measured", NOT_REACHABLE: "not reachable here"}
_ROOT = Path(__file__).resolve().parent.parent
IMAGES = _ROOT / "docs" / "images"

Results = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first two is set to the right."""
    rule = ["---" if i < 2 else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def verdicts(results: Results) -> list[tuple[bars.Bar, Verdict]]:
    """Every bar of this kind of device."""
    asked = bars.GPU if results["device"]["kind"] == "gpu" else bars.CPU
    return [(bar, bar.check(results)) for bar in asked]


def bars_table(results: Results) -> str:
    """The verdicts on one device."""
    rows = [
        [bar.what, bar.required, verdict.measured or "–", _MARK[verdict.state], verdict.note]
        for bar, verdict in verdicts(results)
    ]
    head = "| bar | required | measured | | |\n|---|--:|--:|---|---|\n"
    return head + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def gpu_table(all_results: list[Results]) -> str:
    """Which kernels have run on which GPU, and the GPU bars on each, or as not yet measured."""
    rows = []
    for title, (kernels, families) in KERNELS.items():
        rows.append([title, *(_confirmed(all_results, backend, kernels, families) for backend in SOURCES)])
    lines = [table(["kernels", *SOURCES], rows), ""]
    gpus = [results for results in all_results if results["device"]["kind"] == "gpu"]
    if not gpus:
        return "\n".join([*lines, *(f"- {bar.what}: {NOT_MEASURED}" for bar in bars.GPU)])
    for results in gpus:
        versions = "".join(f", {name} {version}" for name, version in results.get("versions", {}).items())
        when = f"{results['device']['name']}{versions}; {_span(results)}"
        lines += [f"{when} (what the table calls changed: in its earlier form):", ""]
        lines += [bars_table(results), ""]
    return "\n".join(lines).rstrip()


def _confirmed(all_results: list[Results], backend: str, kernels: str, families: tuple[str, ...]) -> str:
    if kernels not in SOURCES[backend]:
        return "no such kernel"
    return confirmed(all_results, backend, kernels, families)


def family_table(results: Results, family: str) -> str:
    """Every timed record of a family, by size and then by time."""
    records = [r for r in results["records"] if r["family"] == family and "time" in r]
    records.sort(key=lambda r: (r["shape"], r["time"].get("seconds", float("inf"))))
    head = ["size", "provider", "forward", "forward + backward", "times ours", "rate", "of ceiling", "peak memory",
            "error", "same bits"]  # fmt: skip
    rows = []
    for r in records:
        time = r["time"]
        name = f"{r['provider']} (ours)" if r["kind"] == "ours" else r["provider"]
        if "problem" in time:
            rows.append([bars.size(r), name, *[""] * 7, time["problem"]])
            continue
        gigabytes = time.get("gigabytes_per_second")
        divisor = baseline(r["kind"], r["provider"], "")
        own = f" ({divisor})" if divisor else ""
        rate = f"{gigabytes:.1f} GB/s" if gigabytes else f"{1e3 * (time['tflops'] or 0):.0f} GFLOP/s"
        rows.append(
            [
                bars.size(r),
                name,
                *(_called(time, part) for part in ("forward_", "")),
                _optional(time.get("over_ours"), "{:.2f}" + own),
                rate,
                _optional(time.get("fraction_of_ceiling"), "{:.0%}"),
                _megabytes(time["peak_bytes"]),
                _optional(time["rel_error"], "{:.1e}"),
                {True: "yes", False: "no", None: "–"}[time["deterministic"]],
            ]
        )
    return table(head, rows)


def _called(time: dict[str, Any], part: str) -> str:
    """Time as called, and of the kernels alone where that was measured."""
    device = time.get(f"{part}device_seconds")
    return _milliseconds(time[f"{part}seconds"]) + (f" ({_milliseconds(device)} on the device)" if device else "")


def memory_table(results: Results) -> str:
    """Peak memory in fresh processes."""
    rows = []
    for r in sorted((r for r in results["records"] if "memory" in r), key=lambda r: (r["family"], r["shape"])):
        memory = r["memory"]
        name = f"{r['provider']} (ours)" if r["kind"] == "ours" else r["provider"]
        if "problem" in memory:
            rows.append([f"{r['family']} {bars.size(r)}", name, memory["problem"], ""])
        else:
            own = memory["input_bytes"] + memory["gradient_bytes"]
            rows.append([f"{r['family']} {bars.size(r)}", name, _megabytes(memory["peak_bytes"]), _megabytes(own)])
    return table(["workload", "provider", "peak beyond inputs and gradients", "inputs and gradients"], rows)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f} MB"


def _optional(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def device_line(results: Results, measured: str = "measured ") -> str:
    device, versions = results["device"], results["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "triton")
    line = f"{device['name']}, {device['threads']} threads, kernels compiled for {device['isa']}; {packages}; "
    span = _span(results)
    return f"{line}{measured}{span}." if span else f"{line}nothing measured."


def _span(results: Results) -> str:
    """When and of which sources the records are, "" for none."""
    stamps = [r[part] for r in results["records"] for part in ("time", "memory") if part in r]
    commits = sorted({s["commit"] for s in stamps if "commit" in s})
    when = sorted(s["when"][:10] for s in stamps if "when" in s)
    return f"{' to '.join(dict.fromkeys((when[0], when[-1])))} at {', '.join(commits)}" if when else ""


def full_report(all_results: list[Results]) -> str:
    parts = ["# Measurements"]
    for results in all_results:
        parts += [f"## {results['device']['slug']}", device_line(results), "### Bars", bars_table(results)]
        for family in dict.fromkeys(r["family"] for r in results["records"] if "time" in r):
            parts += [f"### {family}", family_table(results, family)]
        if any("memory" in r for r in results["records"]):
            parts += ["### Peak memory, each in a process of its own", memory_table(results)]
        if "trainer" in results:
            parts += ["### A step of FFCL's local stage", trainer_tables.tables(results["trainer"])]
        parts += ["### Rivals that did not run", absent_table(results)]
        parts += ["### Not measured yet", unmeasured_table(results)] if _kind(results) == target() else []
    parts += ["## GPU", gpu_table(all_results)]
    return "\n\n".join(parts) + "\n"


def absent_table(results: Results) -> str:
    """Every rival without a time on this device, with the reason: what its records say, or that it cannot run here."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in results["records"]:
        for part in ("time", "memory"):
            if r["kind"] == "rival" and "problem" in r.get(part, {}):
                sizes = reasons.setdefault((r["provider"], r[part]["problem"]), [])
                sizes.append(f"{r['family']} {bars.size(r)}")
    kind = _kind(results)
    there: dict[str, set[str]] = {}
    for r in results["records"]:
        there.setdefault(r["family"], set()).add(r["provider"])
    for family in FAMILIES.values():
        for name in (name for name, provider in family.providers.items() if provider.kind == "rival"):
            if kind not in family.providers[name].devices:
                needs = "needs a CUDA GPU" if kind == "cpu" else "runs on a CPU only"
                reasons.setdefault((name, needs), []).append(family.name)
            # of the devices of this kind unmeasured_table knows the sizes as well
            elif kind != target() and family.name in there and not {name, adopt.RIVALS.get(name)} & there[family.name]:
                reasons.setdefault((name, "no record: not installed there, or left out"), []).append(family.name)
    rows = [[name, reason, ", ".join(dict.fromkeys(where))] for (name, reason), where in sorted(reasons.items())]
    return table(["rival", "why", "where"], rows) if rows else "None: every rival ran at every size."


def unmeasured_table(results: Results) -> str:
    """Every workload of this kind of device with providers that have no record, not even a reason for having none."""
    rows: dict[tuple[str, str], list[str]] = {}
    for part, questions in (("time", workloads.TIMED), ("memory", (workloads.MEMORY,))):
        there = {(r["workload"], r["provider"]) for r in results["records"] if part in r}
        for workload in (w for question in questions for w in question):
            missing = [name for name in workload.providers() if (workload.name, name) not in there]
            rows.setdefault((workload.name, part), []).extend(missing)
    lines = [[name, part, "; ".join(missing)] for (name, part), missing in rows.items() if missing]
    return table(["workload", "what", "of"], lines) if lines else "Nothing: every workload has its records."


def _kind(results: Results) -> str:
    """The type of device, as PyTorch calls it, that was measured."""
    return {"cpu": "cpu", "gpu": "cuda"}[results["device"]["kind"]]


def site_page(all_results: list[Results]) -> str:
    """The documentation site's page: the plots, which lie in plots/ there, before the whole report."""
    from . import plots

    images = [
        f"![{plots.PLOTS[name]}](plots/{results['device']['slug']}-{name}.svg)"
        for results in all_results
        for name in plots.available(results)
    ]
    title, _, rest = full_report(all_results).partition("\n\n")
    how = "Drawn from the records in `benchmarks/results/` when this site was built; `make bench` measures anew."
    return "\n\n".join([title, how, *images, rest])


# --- the README's block ----------------------------------------------------------------------------------------------


def readme_block(all_results: list[Results]) -> str:
    """The summary, without its markers: the CPU of most records, then the others, folded."""
    cpus = [results for results in all_results if results["device"]["kind"] == "cpu"]
    cpus.sort(key=lambda results: -len(results["records"]))
    parts = []
    for results in cpus:
        block = _cpu_block(results)
        whole = results is cpus[0]
        parts += block if whole else _folded(f"The same on {results['device']['name']}", "\n\n".join(block))
    parts += _folded("Which kernels were measured on a GPU, and the GPU bars", gpu_table(all_results))
    return "\n\n".join(parts)


def _cpu_block(results: Results) -> list[str]:
    """Plots, the line of the machine, what is not met and the table of the bars."""
    from . import plots

    images = [
        f"![{plots.PLOTS[name]}]({_image(results['device']['slug'], name).relative_to(_ROOT).as_posix()})"
        for name in plots.available(results)
        if name in plots.SUMMARY
    ]
    found = verdicts(results)
    met = sum(verdict.state == MET for _, verdict in found)
    count = f"**{met} of {len(found)} CPU bars met**, speeds and sizes that this project set itself."
    unmet = "\n".join([*_unmet(found), _slower(results)])
    bars_of_all = _folded("Every CPU bar", bars_table(results))
    return [*images, f"{count} Measured on {device_line(results, measured='')}", unmet, *bars_of_all]


def _unmet(found: list[tuple[bars.Bar, Verdict]]) -> list[str]:
    """A line for each bar that is not met, so that none is told in a folded table only."""
    return [
        f"- {_MARK[verdict.state]}: {bar.what}: {verdict.measured or 'no measurement'}, required {bar.required}"
        for state in (MISSED, NOT_REACHABLE, NOT_MEASURED)
        for bar, verdict in found
        if verdict.state == state
    ]


def _slower(results: Results) -> str:
    """A line on every stored comparison, in a bar or not, in which a rival is faster than our CPU kernels."""
    compared = [r for r in results["records"] if r["kind"] == "rival" and "over_ours" in r.get("time", {})]
    lost = sorted((r for r in compared if r["time"]["over_ours"] < 1), key=lambda r: r["time"]["over_ours"])
    named = "; ".join(
        f"{FAMILIES[r['family']].title if r['family'] in FAMILIES else r['family']}, {bars.size(r)}: {r['provider']}"
        f" ({r['time']['over_ours']:.2f} x)"
        for r in lost
    )
    return f"- rivals are faster in {len(lost) or 'none'} of {len(compared)} comparisons{': ' + named if lost else ''}"


def _folded(summary: str, body: str) -> list[str]:
    return [f"<details><summary>{summary}</summary>", body, "</details>"]


def digest(results: Results) -> str:
    """What a plot was drawn from; stored inside it."""
    return "records:" + hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:16]


def _image(slug: str, name: str) -> Path:
    return IMAGES / f"{slug}-{name}.png"


def _parts(text: str, path: Path) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} ... {END}")
    return before, inside, after


def write(path: Path, all_results: list[Results]) -> None:
    """Renew the block between the markers of ``path``, and the plots."""
    from . import plots

    before, _, after = _parts(path.read_text(encoding="utf-8"), path)
    for results in (r for r in all_results if r["device"]["kind"] == "cpu"):
        for name in (name for name in plots.available(results) if name in plots.SUMMARY):
            plots.draw(name, results, _image(results["device"]["slug"], name), digest(results))
    store.write_text(path, f"{before}{BEGIN}\n\n{readme_block(all_results)}\n\n{END}{after}")


def stale(path: Path, all_results: list[Results]) -> list[str]:
    """What in ``path`` or its plots is not as the stored measurements have it."""
    from . import plots

    found = []
    if _parts(path.read_text(encoding="utf-8"), path)[1].strip() != readme_block(all_results).strip():
        found.append(f"the block between the benchmark markers of {path}")
    for results in (r for r in all_results if r["device"]["kind"] == "cpu"):
        for name in (name for name in plots.available(results) if name in plots.SUMMARY):
            image = _image(results["device"]["slug"], name)
            if not image.exists() or digest(results).encode() not in image.read_bytes():
                found.append(str(image.relative_to(_ROOT)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the results files")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", type=Path, metavar="FILE", help="renew the block between the markers, and the plots")
    group.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 where --write would change something")
    group.add_argument("--merge", type=Path, metavar="FILE", help="store another machine's results or gpu.json")
    options = parser.parse_args(arguments)
    try:
        if options.merge:
            print(adopt.adopt(options.results, options.merge))
            return 0
        all_results = store.load_all(options.results)
        if options.check:
            found = stale(options.check, all_results)
            for what in found:
                print(f"stale: {what}; run python -m benchmarks.report --write {options.check}", file=sys.stderr)
            return 1 if found else 0
        if options.write:
            write(options.write, all_results)
            return 0
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(full_report(all_results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

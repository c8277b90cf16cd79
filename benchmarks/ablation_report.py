"""Ablation tables, sentences and plots in the documentation, from the stored runs only.

python -m benchmarks.ablation_report --write docs/ffcl.md README.md   renew the blocks between markers, and the plots
python -m benchmarks.ablation_report --check docs/ffcl.md README.md   fail where one is not as the stored runs have it

docs/results/ablations/NAME.json is what ``ffcl ablate`` wrote. A Markdown file shows its table between
<!-- ablation-table:NAME --> and <!-- ablation:end -->, its numbers in a sentence after <!-- ablation-summary:NAME -->.
docs/images/ablation-NAME.png is its plot, docs/results/ablations/NAME.md the table alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from ffcl_fast.train import ablate

from .store import write_text

ROOT = Path(__file__).resolve().parent.parent
STORED, IMAGES = ROOT / "docs" / "results" / "ablations", ROOT / "docs" / "images"
_BLOCK = re.compile(r"<!-- ablation-(table|summary):([\w-]+) -->\n(.*?)\n?<!-- ablation:end -->", re.DOTALL)

Found = dict[str, Any]


def load(folder: Path) -> dict[str, Found]:
    """Every stored ablation by name. Raises ValueError naming a file that is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            assert found[path.stem]["rows"][0]["runs"]
        except (ValueError, TypeError, KeyError, IndexError, AssertionError) as error:
            raise ValueError(f"{path} is no ablation.json of ffcl ablate ({type(error).__name__})") from None
    return found


def summary(found: Found) -> str:
    """FFCL's accuracy, the first row's, the range of the others', and how sure the difference is."""

    def accuracies(row: Found) -> list[float]:
        return [100 * run["test"]["accuracy"] for run in row["runs"]]

    first = found["rows"][0]
    ffcl = next((row for row in found["rows"] if row["name"].startswith("FFCL")), found["rows"][-1])
    others = [
        sum(a) / len(a) for row in found["rows"] if row is not first and row is not ffcl and (a := accuracies(row))
    ]
    base = {run["seed"]: run["test"]["accuracy"] for run in first["runs"]}
    gain = [100 * (run["test"]["accuracy"] - base[run["seed"]]) for run in ffcl["runs"] if run["seed"] in base]
    mean, _, deviation = ablate.spread(gain, "+", 1).partition(" ± ")
    text = f"FFCL {ablate.spread(accuracies(ffcl), '', 1)} % test accuracy, {first['name']} "
    text += f"{ablate.spread(accuracies(first), '', 1)} %"
    text += f", the other variants between {min(others):.1f} and {max(others):.1f} %" if others else ""
    if deviation:
        text += f"; FFCL's {mean} points come with a standard deviation of {deviation} over {len(gain)} seeds"
    return text + "."


def _content(kind: str, found: Found) -> str:
    return ablate.markdown(found).strip() if kind == "table" else summary(found)


def image(name: str) -> Path:
    return IMAGES / f"ablation-{name.replace('_', '-')}.png"


def renewed(text: str, stored: dict[str, Found], path: Path) -> tuple[str, int]:
    """``text`` with every block as the stored runs have it, and how many blocks there are. Raises ValueError for a
    block of an ablation that is not stored."""

    def block(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if name not in stored:
            raise ValueError(f"{path} shows the ablation {name}, which {STORED} does not hold")
        return f"<!-- ablation-{kind}:{name} -->\n\n{_content(kind, stored[name])}\n\n<!-- ablation:end -->"

    return _BLOCK.subn(block, text)


def write(files: list[Path], stored: dict[str, Found]) -> None:
    """Renew the blocks of ``files``, the tables beside the stored runs, and the plots."""
    for path in files:
        write_text(path, renewed(path.read_text(encoding="utf-8"), stored, path)[0])
    for name, found in stored.items():
        write_text(STORED / f"{name}.md", ablate.markdown(found))
        ablate.draw(image(name), found)


def stale(files: list[Path], stored: dict[str, Found]) -> list[str]:
    """What is not as the stored runs have it."""
    found, blocks = [], 0
    for path in files:
        text = path.read_text(encoding="utf-8")
        fresh, count = renewed(text, stored, path)
        blocks += count
        if fresh != text:
            found.append(f"an ablation's numbers in {path}")
    if not blocks:
        raise ValueError(f"no ablation is shown in {', '.join(map(str, files))}")
    for name, runs in stored.items():
        table, plot = STORED / f"{name}.md", image(name)
        if not table.exists() or table.read_text(encoding="utf-8") != ablate.markdown(runs):
            found.append(str(table.relative_to(ROOT)))
        if not plot.exists() or ablate.digest(runs).encode() not in plot.read_bytes():
            found.append(str(plot.relative_to(ROOT)))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation_report", description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", type=Path, nargs="+", metavar="FILE", help="renew the blocks, tables and plots")
    group.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", help="exit with 1 where --write would change one"
    )
    options = parser.parse_args(arguments)
    try:
        stored = load(STORED)
        if options.write:
            write(options.write, stored)
            return 0
        found = stale(options.check, stored)
    except (OSError, ValueError) as error:
        print(f"benchmarks.ablation_report: {error}", file=sys.stderr)
        return 2
    command = f"python -m benchmarks.ablation_report --write {' '.join(map(str, options.check))}"
    for what in found:
        print(f"stale: {what}; run {command}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

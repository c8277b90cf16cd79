"""Keep the counts of long test runs: ``python -m tools.long_results RUN.xml ...`` into docs/results/long.json.

Each run has its date and its sources' commit; runs that are not named keep theirs.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.machine import source

from .files import write_text

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "long.json"


def summary(path: Path) -> dict[str, object]:
    """Tests, failures and seconds of one of pytest's JUnit files."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    count = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    when = {"date": time.strftime("%Y-%m-%d"), "commit": source()["commit"]}
    return {"run": path.stem, **count, "seconds": round(sum(float(s.get("time", 0)) for s in suites)), **when}


def main(words: list[str]) -> int:
    new = [summary(Path(word)) for word in words]
    runs = {r["run"]: r for r in json.loads(RESULTS.read_text())["runs"]} if RESULTS.exists() else {}
    runs |= {r["run"]: r for r in new}
    stored = {"machine": platform.processor() or platform.machine(), "runs": list(runs.values())}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(stored, indent=1) + "\n")
    print("\n".join(f"{r['run']}: {r['tests']} tests, {r['failures']} failed, {r['seconds']} s" for r in new))
    return int(any(r["failures"] or r["errors"] for r in new))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

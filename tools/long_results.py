"""Keep the counts of long test runs: ``python -m tools.long_results RUN.xml ...`` into docs/results/long.json."""

from __future__ import annotations

import json
import platform
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .files import write_text

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "long.json"


def summary(path: Path) -> dict[str, object]:
    """Tests, failures and seconds of one of pytest's JUnit files."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    count = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    return {"run": path.stem, **count, "seconds": round(sum(float(s.get("time", 0)) for s in suites))}


def main(words: list[str]) -> int:
    runs = [summary(Path(word)) for word in words]
    stored = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine(), "runs": runs}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(stored, indent=1) + "\n")
    print("\n".join(f"{r['run']}: {r['tests']} tests, {r['failures']} failed, {r['seconds']} s" for r in runs))
    return int(any(r["failures"] or r["errors"] for r in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""pytest plugin of tools.gpu_check: leave out the tests that an earlier, cut run has seen pass, and note those that do.

The list is FFCL_OUT/passed.txt (FFCL_PASSED names another), one node id a line, written as the tests end, so that a
run stopped at any moment loses the tests in flight only. Without FFCL_OUT it does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _list() -> Path | None:
    out = os.environ.get("FFCL_OUT")
    return Path(out) / os.environ.get("FFCL_PASSED", "passed.txt") if out else None


def _passed() -> set[str]:
    path = _list()
    # A last line without an end is a name that was being written when the run was stopped.
    return set(path.read_text().rpartition("\n")[0].split("\n")) if path and path.exists() else set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = _passed()
    passed = [item for item in items if item.nodeid in before]
    if passed:
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if item not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = _list()
    # Workers report to the process that started them, which writes.
    if path and report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with path.open("a") as file:
            file.write(report.nodeid + "\n")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With nothing left to run, all has passed."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _passed():
        session.exitstatus = pytest.ExitCode.OK

"""Fixtures and markers of every test: fresh random inputs that a failure tells how to repeat, and the data folder."""

from __future__ import annotations

import os
import random
import secrets
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "compiler: needs a C or C++ compiler; left out where a wheel is tested without")
    config.addinivalue_line("markers", "long: takes more than about ten seconds; leave out with -m 'not long'")
    # In the environment, so that every pytest-xdist worker draws from the same seed.
    os.environ.setdefault("FFCL_TEST_SEED", str(secrets.randbelow(2**31)))


def pytest_report_header(config: pytest.Config) -> str:
    return f"FFCL_TEST_SEED={os.environ['FFCL_TEST_SEED']}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped has shown nothing: it ends like one that found no tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and reporter and not session.config.option.collectonly:
        if not hasattr(session.config, "workerinput") and not reporter.stats.get("passed"):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed, already given to torch, numpy and random; FFCL_TEST_SEED repeats a run."""
    value = zlib.crc32(f"{os.environ['FFCL_TEST_SEED']}:{request.node.nodeid}".encode())
    request.node.stash[_SEED] = value
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that changes the number of threads changes the bits of those after it, unless it is put back."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A CPU generator of this test's own: ``torch.randn(5, generator=rng)``."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: FFCL_DATA, or ../shared/data from the project's root."""
    folder = Path(os.environ.get("FFCL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FFCL_DATA")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and _SEED in item.stash:
        report.sections.append(("repeat with", f"FFCL_TEST_SEED={os.environ['FFCL_TEST_SEED']} pytest '{item.nodeid}'"))
    return report

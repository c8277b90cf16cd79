"""How ``pytest benchmarks/`` measures: a workload's providers in turn when its first test runs, then each test hands
its provider's times to pytest-benchmark and to the results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, memory, store
from benchmarks.measure import Samples, base_record, limit_memory, measure, records
from benchmarks.variants import NUMERICS
from benchmarks.workloads import ON_GPU, Workload


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ffcl_fast benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, two rounds, nothing stored: is the code alive?")
    group.addoption("--brief", action="store_true", help="leave out the largest sizes: a report in minutes")
    group.addoption(
        "--results", type=Path, default=None, help="folder of the results files (default: benchmarks/results)"
    )
    group.addoption("--seconds", type=float, default=15.0, help="about how long to time each workload (default: 15)")


_THOROUGH = 5.0  # seconds a workload, below which three rounds have to do


@pytest.fixture(scope="session", autouse=True)
def _limits() -> None:
    limit_memory()


class Replay:
    """A clock that shows times measured elsewhere: pytest-benchmark's own rounds would run one provider at a time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += self.pending.pop(0) if self.pending else 0.0


_clock = Replay()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first: dict[tuple[object, str], Workload] = {}
    leave_out = []
    for item in items:
        workload = getattr(item, "callspec", None) and item.callspec.params.get("workload")
        if not isinstance(workload, Workload):
            continue
        item.add_marker(pytest.mark.benchmark(group=workload.name, timer=_clock))
        # Tiny sizes are the same for every size of a family, and temperatures differ in a number: one is enough.
        group = "numerics" if workload.family.name in NUMERICS else workload.family.name
        thorough = workload.providers()[item.callspec.params["provider"]].thorough and not ON_GPU
        quick, brief = config.getoption("--quick"), config.getoption("--brief")
        repeated = workload is not first.setdefault((item.function, group), workload)
        if (quick and (repeated or thorough)) or (brief and (thorough or not workload.brief)):
            leave_out.append(item)
    if leave_out:
        config.hook.pytest_deselected(items=leave_out)
        items[:] = [item for item in items if item not in leave_out]


@pytest.fixture(scope="session")
def _measured() -> dict[str, dict[str, Any]]:
    return {}


@pytest.fixture
def side_by_side(request: pytest.FixtureRequest, benchmark, _measured):
    """``side_by_side(workload, provider)``: times of the providers of this workload that were selected."""

    def run(workload: Workload, provider: str) -> None:
        quick = request.config.getoption("--quick")
        if workload.name not in _measured:
            names = _selected(request, workload)
            size = workload.resized(workload.family.quick) if quick else workload
            seconds = 0.0 if quick else request.config.getoption("--seconds")
            rounds = 2 if quick else size.rounds if seconds >= _THOROUGH else min(3, size.rounds)
            samples = measure(size, names, seconds, rounds)
            found = records(size, samples, store.stamp())
            _store(request, found)
            _measured[workload.name] = {r["provider"]: (samples[r["provider"]], r) for r in found}
        samples, record = _measured[workload.name][provider]
        _hand_over(benchmark, record, samples, record["time"])

    return run


@pytest.fixture
def alone(request: pytest.FixtureRequest, benchmark):
    """``alone(workload, provider)``: peak memory in a fresh process."""

    def run(workload: Workload, provider: str) -> None:
        size = workload.resized(workload.family.quick) if request.config.getoption("--quick") else workload
        # A new interpreter takes seconds to import everything: in a quick run one shows that it works.
        here = request.config.getoption("--quick") and (provider, workload.family.name) != ("cpu", "clip")
        found = (memory.measure_here if here else memory.measure_apart)(size, provider)
        record = base_record(size, provider) | {"memory": store.stamp() | found}
        _store(request, [record])
        samples = Samples(total={0: found["seconds_once"]}) if "problem" not in found else Samples()
        _hand_over(benchmark, record, samples, record["memory"])

    return run


def _selected(request: pytest.FixtureRequest, workload: Workload) -> list[str]:
    return [
        item.callspec.params["provider"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.callspec.params.get("workload") is workload
    ]


def _store(request: pytest.FixtureRequest, found: list[dict[str, Any]]) -> None:
    folder = request.config.getoption("--results")
    if folder is None and not request.config.getoption("--quick"):
        folder = store.RESULTS
    if folder is not None:
        store.merge(folder, found)


def _hand_over(benchmark, record: dict[str, Any], samples: Samples, part: dict[str, Any]) -> None:
    if "problem" in part:
        if record["kind"] == "ours":
            pytest.fail(part["problem"], pytrace=False)
        pytest.skip(part["problem"])
    device = machine.device()
    benchmark.extra_info.update(
        provider=record["provider"],
        workload=record["workload"],
        units=record["units"],
        tflops=part.get("tflops"),
        fraction_of_ceiling=part.get("fraction_of_ceiling"),
        peak_bytes=part.get("peak_bytes"),
        rel_error=part.get("rel_error"),
        deterministic=part.get("deterministic"),
        device=machine.summary(device),
        torch=machine.versions()["torch"],
        triton=machine.versions().get("triton"),
        commit=part["commit"],
    )
    _clock.pending = list(samples.total.values())
    benchmark.pedantic(_clock.tick, rounds=len(samples.total), iterations=1)

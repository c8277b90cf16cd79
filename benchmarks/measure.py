"""Times in alternation, peak memory, errors and equality of bits of one workload's providers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import kernel_sources
from .provider import Family, Inputs, Provider, baseline
from .workloads import ON_GPU, Workload, prepared

BASELINE = "triton" if ON_GPU else "cpu"  # the provider that most times are divided by
_MAX_ROUNDS = 200
_COMPARED_ROUNDS = 5
FAILURES = (ImportError, RuntimeError, MemoryError, ValueError, TypeError, AttributeError)


class Call:
    """A provider on its inputs. Gradients are freed between calls, as ``zero_grad(set_to_none=True)`` does."""

    def __init__(
        self,
        provider: Provider,
        family: Family,
        inputs: Inputs,
        dtype: torch.dtype | None = None,
        usual: torch.dtype | None = None,
    ) -> None:
        self.inputs = prepared(provider, family, inputs, dtype, usual)
        self.leaves = [self.inputs[name] for name in family.leaves]
        self.upstream = family.upstream(self.inputs) if family.upstream else None
        self.differentiable = provider.kind != "ceiling"
        self.function = provider.build()

    def __call__(self) -> tuple[float, float, list[Tensor | None]]:
        """Seconds of the forward pass, of forward and backward, and outputs and gradients (nothing for a ceiling).

        A gradient is None where the provider has none, as memeff for its temperature.
        """
        began = _now()
        outputs = self.function(self.inputs)
        forward = _now()
        if self.differentiable:
            torch.autograd.backward(outputs, self.upstream)
        ended = _now()
        results: list[Tensor | None] = []
        if self.differentiable:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            results = [x.detach() for x in outputs] + [x.grad for x in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return forward - began, ended - began, results

    def results(self) -> list[Tensor | None]:
        """Outputs and gradients of one run."""
        return self()[2]

    def gradient_bytes(self) -> int:
        """What the gradients that it returns take."""
        return sum(x.numel() * x.element_size() for x in self.leaves) if self.differentiable else 0


def _now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Samples:
    """Seconds by the number of the round, or why there are none."""

    forward: dict[int, float] = field(default_factory=dict)
    total: dict[int, float] = field(default_factory=dict)
    problem: str | None = None
    peak_bytes: int | None = None
    deterministic: bool | None = None
    rel_error: float | None = None


def measure(workload: Workload, names: Sequence[str], seconds: float, min_rounds: int = 5) -> dict[str, Samples]:
    """Run the named providers in turn, round by round, for about ``seconds`` and at least ``min_rounds`` rounds.

    Every provider runs in every round, and turns rotate, so that all see the same machine, caches and free memory. The
    first run of each is not timed: it is the one whose peak memory is measured, and the bits of the first rounds are
    compared with its own.
    """
    providers = workload.providers()
    found = {name: Samples() for name in names}
    if any(providers[name].thorough for name in names):
        torch.compiler.reset()  # other workloads' sizes count against a limit, past which a function runs eagerly
    calls: dict[str, Call] = {}
    first: dict[str, list[Tensor | None]] = {}
    inputs = workload.inputs()
    truths: Truths = {}
    for name in names:
        with _failing(found[name]):
            found[name].rel_error = relative_error(workload, providers[name], truths)
            call = Call(providers[name], workload.family, inputs, usual=workload.dtype)
            peak, first[name] = peak_beyond(call.results)
            found[name].peak_bytes = None if peak is None else max(0, peak - call.gradient_bytes())
            calls[name] = call
    gc.collect()
    gc.disable()
    try:
        _rounds(calls, first, found, seconds, min_rounds)
    finally:
        gc.enable()
    return found


def _rounds(
    calls: dict[str, Call],
    first: dict[str, list[Tensor | None]],
    found: dict[str, Samples],
    seconds: float,
    min_rounds: int,
) -> None:
    running = list(calls)
    end = time.perf_counter() + seconds
    for r in range(_MAX_ROUNDS):
        turn = r % max(1, len(running))
        for name in running[turn:] + running[:turn]:
            samples = found[name]
            with _failing(samples):
                samples.forward[r], samples.total[r], results = calls[name]()
                if results and r < _COMPARED_ROUNDS:
                    same = all(a is b or torch.equal(a, b) for a, b in zip(first[name], results, strict=True))
                    samples.deterministic = same and samples.deterministic is not False
                del results
        running = [name for name in running if not found[name].problem]
        if not running or (r + 1 >= min_rounds and time.perf_counter() > end):
            return


@contextlib.contextmanager
def _failing(samples: Samples) -> Iterator[None]:
    """A provider that cannot run costs its own row only, and says why."""
    try:
        yield
    except FAILURES as error:
        samples.problem = problem_of(error)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()


def problem_of(error: BaseException) -> str:
    """One line on why a provider gave no result."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: more than the device's {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "bad_alloc" in str(error):
        soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
        limit = "" if soft == resource.RLIM_INFINITY else f": more than the {soft / 1e9:.1f} GB that this run allows"
        return "out of memory" + limit
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def limit_memory(share: float = 0.6) -> None:
    """Let this process allocate no more than a share of what is available, so that a rival that needs more raises.

    A GPU needs no such help, and its driver reserves more addresses than there is memory.
    """
    if ON_GPU:
        return
    available = next(
        (int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")), None
    )
    if available is None:
        return
    limit = _status("VmData") + int(share * available)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


Truths = dict[torch.dtype | None, list[Tensor | None]]  # of the reference in float64, by the dtype of its inputs


def relative_error(workload: Workload, provider: Provider, truths: Truths | None = None) -> float | None:
    """Largest norm-relative error of outputs and gradients against float64, at a size where that is affordable.

    float64 gets the provider's own inputs, rounded where its dtype rounds them. ``truths`` keeps the reference's
    results for the workload's other providers.
    """
    family = workload.family
    if provider.kind == "ceiling":
        return None
    inputs = workload.resized(family.check(workload.shape)).inputs()
    call = Call(provider, family, inputs, usual=workload.dtype)
    rounded = {name: x.detach() for name, x in call.inputs.items()}
    truths = {} if truths is None or provider.own_definition else truths
    if provider.dtype not in truths:
        which = provider if provider.own_definition else family.providers["reference"]
        truths[provider.dtype] = Call(which, family, rounded, torch.float64).results()
    truth = truths[provider.dtype]
    pairs = [(x, y) for x, y in zip(call.results(), truth, strict=True) if x is not None and y is not None]
    return max(float((x.double() - y).norm() / y.norm().clamp_min(1e-300)) for x, y in pairs)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_beyond(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """Resident bytes at their peak during ``run`` above those before it, and what it returns; None outside Linux.

    On a GPU the bytes that PyTorch's allocator has given out.
    """
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - held, result
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept would otherwise be used again, unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except OSError:
        return None, run()
    before = _status("VmRSS")
    result = run()
    return max(0, _status("VmHWM") - before), result


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _status(name: str) -> int:
    return next((int(line.split()[1]) << 10 for line in _lines("/proc/self/status") if line.startswith(name + ":")), 0)


# --- records ---------------------------------------------------------------------------------------------------------


def records(workload: Workload, found: dict[str, Samples], stamp: dict[str, str]) -> list[dict[str, Any]]:
    """One record a provider, summary statistics only; ratios are medians over rounds of the time over ours in that
    round, so that what slows the whole machine for a while cancels."""
    run = uuid.uuid4().hex[:8]
    ceiling = next((found[n].total for n, p in workload.providers().items() if p.kind == "ceiling" and n in found), [])
    made = []
    for name, samples in found.items():
        record = base_record(workload, name)
        ours = found.get(baseline(record["kind"], name, BASELINE), Samples()).total
        sources = kernel_sources.told(name.split("-")[0], workload.family.name, kernel_sources.digests())
        made.append(record | {"time": stamp | {"run": run} | sources | _time(workload, name, samples, ours, ceiling)})
    return made


def base_record(workload: Workload, name: str) -> dict[str, Any]:
    provider = workload.providers()[name]
    dtype = provider.dtype or workload.dtype or torch.float32
    return {
        "workload": workload.name,
        "family": workload.family.name,
        "shape": list(workload.shape),
        "provider": name,
        "kind": provider.kind,
        "what": provider.what,
        "dtype": str(dtype).removeprefix("torch."),
        "units": workload.family.units,
    }


def _time(
    workload: Workload, name: str, samples: Samples, ours: dict[int, float], ceiling: dict[int, float]
) -> dict[str, Any]:
    if samples.problem or not samples.total:
        return {"problem": samples.problem or "no round was run"}
    seconds = list(samples.total.values())
    median = statistics.median(seconds)
    family = workload.family
    provider = workload.providers()[name]
    kind = provider.kind
    work = provider.flops or family.unit_flops(workload.shape) if kind == "ceiling" else workload.flops()
    found: dict[str, Any] = {
        "rounds": len(seconds),
        "seconds": _short(median),
        "seconds_quartiles": [_short(x) for x in _quartiles(seconds)],
        "seconds_least": _short(min(seconds)),
        "forward_seconds": _short(statistics.median(samples.forward.values())),
        "tflops": _short(work / median / 1e12) if work else None,
        "peak_bytes": samples.peak_bytes,
        "rel_error": None if samples.rel_error is None else _short(samples.rel_error, 3),
        "deterministic": samples.deterministic,
        "fraction_of_ceiling": None,
    }
    if family.useful_bytes and family.ceiling_bytes:
        moved = (family.ceiling_bytes if kind == "ceiling" else family.useful_bytes)(workload.shape)
        found["gigabytes_per_second"] = _short(moved / median / 1e9)
    if ceiling:
        # what counts as useful, in ceilings: products of one unit, or copies
        share = 1.0 if kind == "ceiling" else _share(workload)
        found["fraction_of_ceiling"] = _short(share * statistics.median(_ratios(ceiling, samples.total)))
        if family.forward_units and kind != "ceiling":
            share *= family.forward_units / family.units
            found["forward_fraction_of_ceiling"] = _short(share * statistics.median(_ratios(ceiling, samples.forward)))
    if ours:
        ratios = _ratios(samples.total, ours)
        found["over_ours"] = _short(statistics.median(ratios))
        found["over_ours_quartiles"] = [_short(x) for x in _quartiles(ratios)]
    return found


def _share(workload: Workload) -> float:
    """A workload's useful work, forward and backward, in runs of its ceiling."""
    family, shape = workload.family, workload.shape
    if not family.units:
        return family.useful_bytes(shape) / family.ceiling_bytes(shape)
    own = next((p.flops for p in workload.providers().values() if p.kind == "ceiling"), None)
    return workload.flops() / (own or family.unit_flops(shape))


def _ratios(a: dict[int, float], b: dict[int, float]) -> list[float]:
    """Of the rounds in which both ran."""
    return [x / b[r] for r, x in a.items() if r in b]


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[0], quartiles[2]


def _short(x: float, digits: int = 5) -> float:
    return float(f"{x:.{digits}g}")

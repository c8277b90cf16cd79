"""``ffcl doctor``: what this machine has, and whether every backend is right on it.

Each check runs one operator forward and backward on a backend and compares value and gradients with the reference
in float64. A backend is called wrong by the project's test rule: more than twice the error of plain PyTorch in the
same precision (three times for gradients), plus a few units in the last place; or where a second run has other bits
(the reference makes no such promise). One that raises is reported with its message, and the rest goes on.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import __version__, backends, functional

_ROWS, _WIDTH = 261, 96  # no multiple of any block
_REPEATS = 3
_SETTINGS = (  # environment variables that change what runs, or how fast
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "FFCL_ISA", "FFCL_TUNE", "FFCL_CACHE", "FFCL_DATA", "FFCL_GATHER_LIMIT",
    "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
)  # fmt: skip
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
BAD = ("WRONG", "FAILED")
_SLACK = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def _check_similarity(x: dict[str, Tensor], backend: str) -> Tensor:
    rows, cols = functional.similarity_lse(x["q"], x["k"], 10.0, normalize=True, backend=backend)
    return rows.sum() + cols.sum()


def _check_triangle(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.nt_xent(x["q"], x["k"], 0.1, backend=backend)


def _check_siglip(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.siglip(x["q"], x["k"], 0.1, -1.0, backend=backend)


def _check_goodness(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.goodness(x["q"], "mean_squares", relu=True, backend=backend).sum()


def _check_normalize(x: dict[str, Tensor], backend: str) -> Tensor:
    return (functional.goodness_normalize(x["q"], relu=True, backend=backend) * x["k"].detach()).sum()


def _check_pair_cosine(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.pair_cosine(x["q"], x["k"], x["target"], backend=backend)


def _check_pool(x: dict[str, Tensor], backend: str) -> Tensor:
    goodness, pooled = functional.pool_goodness(x["q"].unflatten(1, (6, 4, 4)), relu=True, backend=backend)
    return goodness.sum() + pooled.square().sum()


def _check_many(x: dict[str, Tensor], backend: str) -> Tensor:
    layers = [x["q"], x["k"][:100]]
    return torch.cat(functional.goodness_many(layers, "mean_squares", backend=backend)).sum()


def _check_linear(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.linear_goodness(x["q"], x["k"], kind="mean_squares", relu=True, backend=backend).sum()


# what is checked -> (the operator that decides the backend, the function)
_CHECKS: dict[str, tuple[str, Callable[[dict[str, Tensor], str], Tensor]]] = {
    "similarity_lse": ("similarity_forward", _check_similarity),
    "nt_xent (triangle)": ("similarity_forward", _check_triangle),
    "siglip": ("siglip", _check_siglip),
    "goodness": ("goodness_forward", _check_goodness),
    "goodness_normalize": ("goodness_forward", _check_normalize),
    "pair_cosine": ("pair_cosine_forward", _check_pair_cosine),
    "pool_goodness": ("pool_goodness_forward", _check_pool),
    "goodness_many": ("goodness_many", _check_many),
    "linear_goodness": ("linear_goodness", _check_linear),
}


def examine() -> dict[str, Any]:
    """What is here: ``machine``, ``choices`` (what ``auto`` picks and why), ``checks`` (one a backend and operator)
    and the ``seconds`` that it took.

    Verdicts are ``ok``, ``WRONG``, ``FAILED`` and ``unavailable``, the last three with a ``reason``; times are medians
    in milliseconds, forward and backward.
    """
    began = time.perf_counter()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for name, (op, _) in _CHECKS.items():
                shape, capability = (_ROWS, _WIDTH), backends._capability(torch.device(device))
                backend, reason = backends.choose(op, device, dtype, shape, capability)
                choices.append(
                    {"operator": name, "device": device, "dtype": _short(dtype), "backend": backend, "reason": reason}
                )
    checks = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _inputs(device, dtype)
            for name, (op, function) in _CHECKS.items():
                checks += _check(name, op, function, inputs, device, dtype)
    seconds = round(time.perf_counter() - began, 1)
    return {"machine": machine(), "choices": choices, "checks": checks, "seconds": seconds}


def machine() -> dict[str, Any]:
    """Versions, processor, memory and devices."""
    found: dict[str, Any] = {
        "ffcl_fast": f"{__version__} in {os.path.dirname(__file__)}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "system": platform.platform(),
        "processor": _processor(),
        "features": [flag for flag in _FLAGS if flag in _cpuinfo("flags", "Features").split()],
        "memory": _memory(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    try:
        from . import _native

        info = _native.build_info()
        found["native"] = f"compiled for {', '.join(info['isas'])}; runs {_native.isa()}"
        found["cuda kernels"] = f"built with CUDA {info['cuda']}" if info["cuda"] else "not built"
    except (ImportError, RuntimeError, ValueError) as error:
        found["native"] = f"not usable: {error}"
    found["gpus"] = [
        f"{p.name}, {p.total_memory >> 30} GiB, compute capability {p.major}.{p.minor}"
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]
    found["settings"] = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
    return found


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(package).__version__


def _cpuinfo(*names: str) -> str:
    """The first processor's value of one of these names in Linux's list; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith(names))
    except (OSError, StopIteration):
        return ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _memory() -> str:
    try:
        page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # another system
        return "unknown"
    return f"{page * pages >> 30} GiB, {page * free >> 30} GiB unused"


def _inputs(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(_ROWS, _WIDTH, generator=random).to(device, dtype) for _ in range(2))
    target = torch.randint(0, 2, (_ROWS,), generator=random).mul(2).sub(1).to(device)
    return {"q": q, "k": k, "target": target}


def _run(function: Callable, inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients with respect to q and k)."""
    x = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    loss = function(x, backend)
    loss.backward()
    empty = torch.zeros(1, device=loss.device)
    return loss.detach(), *(empty if x[name].grad is None else x[name].grad for name in ("q", "k"))


def _error(got: tuple[Tensor, ...], true: tuple[Tensor, ...]) -> tuple[float, float]:
    """Largest relative error of the loss, and of the gradients in proportion to their largest element."""
    errors = [
        float((g.double() - t.double()).abs().max() / t.double().abs().max().clamp_min(1e-30))
        for g, t in zip(got, true, strict=True)
    ]
    return errors[0], max(errors[1:])


def _check(
    name: str, op: str, function: Callable, inputs: dict[str, Tensor], device: str, dtype: torch.dtype
) -> list[dict[str, Any]]:
    true = _run(function, {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}, "reference")
    plain = _error(_run(function, inputs, "reference"), true)
    rows = []
    for backend in backends.BACKENDS:
        row: dict[str, Any] = {"operator": name, "device": device, "dtype": _short(dtype), "backend": backend}
        try:
            problem = backends.load(backend).unavailable(op, inputs["q"])
        except (ImportError, RuntimeError) as error:
            problem = str(error)
        if problem:
            rows.append({**row, "verdict": "unavailable", "reason": problem})
            continue
        try:
            rows.append(row | _measured(function, inputs, backend, true, plain))
        except Exception as error:  # whatever a broken build, driver or compiler raises belongs into the report
            first = (str(error).strip().splitlines() or ["no message"])[0]
            rows.append({**row, "verdict": "FAILED", "reason": f"{type(error).__name__}: {first}"})
    return rows


def _measured(
    function: Callable, inputs: dict[str, Tensor], backend: str, true: tuple[Tensor, ...], plain: tuple[float, float]
) -> dict[str, Any]:
    """The verdict on one backend, given the true results and plain PyTorch's errors."""
    dtype, device = inputs["q"].dtype, inputs["q"].device.type
    got, again = _run(function, inputs, backend), _run(function, inputs, backend)
    loss, grad = _error(got, true)
    found: dict[str, Any] = {
        "verdict": "ok",
        "loss_error": loss,
        "gradient_error": grad,
        "milliseconds": _milliseconds(function, inputs, backend, device),
    }
    # "not more than", not "less": NaN is wrong
    if not (loss <= 2 * plain[0] + _SLACK[dtype] and grad <= 3 * plain[1] + _SLACK[dtype]):
        reason = f"plain PyTorch in {_short(dtype)} errs by {plain[0]:.1e} and {plain[1]:.1e}"
        return found | {"verdict": "WRONG", "reason": reason}
    if backend != "reference" and not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        return found | {"verdict": "WRONG", "reason": "a second run gave other bits"}
    return found


def _milliseconds(function: Callable, inputs: dict[str, Tensor], backend: str, device: str) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        _run(function, inputs, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_text(findings: dict[str, Any]) -> str:
    """The findings as three blocks of aligned lines."""
    lines = [
        f"{key:13} {', '.join(value) or 'none' if isinstance(value, list) else value}"
        for key, value in findings["machine"].items()
    ]
    lines += ["", "auto picks"]
    for choice in findings["choices"]:
        lines.append(
            f"  {choice['operator']:20} {choice['device']:5} {choice['dtype']:9} {choice['backend']:10}"
            f" {choice['reason']}"
        )
    lines += [
        "",
        f"  {'against float64':20} {'on':5} {'dtype':9} {'backend':10} {'loss err':>9} {'grad err':>9}"
        f" {'ms':>8}  verdict",
    ]
    missing: dict[str, list[str]] = {}
    for check in findings["checks"]:
        if check["verdict"] == "FAILED":
            lines.append(f"  {check['operator']:20} {check['device']:5} {check['dtype']:9} {check['backend']:10}"
                         f" FAILED  {check['reason']}")  # fmt: skip
            continue
        if check["verdict"] == "unavailable":
            where = f"  {check['backend']} on {check['device']}: {check['reason']}"
            missing.setdefault(where, []).append(check["operator"])
            continue
        lines.append(
            f"  {check['operator']:20} {check['device']:5} {check['dtype']:9} {check['backend']:10}"
            f" {check['loss_error']:9.1e} {check['gradient_error']:9.1e} {check['milliseconds']:8.2f}"
            f"  {check['verdict']}{': ' + check['reason'] if 'reason' in check else ''}"
        )
    lines += ["", "not available"] if missing else []
    lines += [f"{where} ({', '.join(dict.fromkeys(operators))})" for where, operators in missing.items()]
    bad = sum(check["verdict"] in BAD for check in findings["checks"])
    done = sum(check["verdict"] != "unavailable" for check in findings["checks"])
    lines += ["", f"{done - bad} of {done} checks ok, {findings['seconds']} s"]
    lines += ["Please report this with the output of `ffcl doctor --json`."] if bad else []
    return "\n".join(lines)

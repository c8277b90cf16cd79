"""``ffcl doctor``: what this machine has, and whether every backend is right on it.

Each check runs one operator forward and backward on a backend and compares value and gradients with the reference
in float64. A backend is called wrong by the project's test rule: more than twice the error of plain PyTorch in the
same precision (three times for gradients), plus a few units in the last place; or where a second run has other bits
(the reference makes no such promise). One that raises is reported with its message, and the rest goes on. Times are
told and not judged: a busy machine changes no verdict.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import __version__, backends, functional
from .backends import native

_ROWS, _WIDTH = 261, 96  # no multiple of any block
_LARGE = 65536, 512  # a GPU may take other kernels for as many rows of such a width: told, not checked
_INTERPRETED_ROWS = 37  # likewise; Triton's interpreter takes seconds for what a GPU does in microseconds
_REPEATS = 3
# how the environment variables begin that change what runs, or how fast
_SETTINGS = (
    "FFCL_", "OMP_", "GOMP_", "KMP_", "MKL_", "TRITON_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "PYTORCH_", "TORCH_",
    "TORCHINDUCTOR_", "LD_PRELOAD",
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
    layers = [x["q"], x["k"][: len(x["k"]) // 2]]
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
    choices: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in (torch.float32, torch.bfloat16):
            where = {"device": device, "dtype": _short(dtype)}
            try:
                inputs = _inputs(device, dtype)
                picks = [{"operator": name, **where, **_choice(op, inputs["q"])} for name, (op, _) in _CHECKS.items()]
            except Exception as error:  # a device that is there and cannot be used
                checks += [{"operator": name, **where, "backend": "reference", **_failed(error)} for name in _CHECKS]
                continue
            choices += picks + (_large_choices(where) if device == "cuda" else [])
            for name, (op, function) in _CHECKS.items():
                checks += [{"operator": name, **where, **row} for row in _check(op, function, inputs)]
    seconds = round(time.perf_counter() - began, 1)
    return {"machine": machine(), "choices": choices, "checks": checks, "seconds": seconds}


def _large_choices(where: dict[str, str]) -> list[dict[str, str]]:
    """What ``"auto"`` runs for normalisers and gradients of a large batch of pairs."""
    rows, width = _LARGE
    x = torch.empty((), device=where["device"], dtype=getattr(torch, where["dtype"])).expand(rows, width)
    passes = {"similarity": "similarity_forward", "gradients": "similarity_backward"}
    return [
        {"operator": f"{name} {rows}x{width}", **where, **_choice(op, x, backends.Pairs(cols=rows))}
        for name, op in passes.items()
    ]


def _choice(op: str, x: Tensor, pairs: backends.Pairs | None = None) -> dict[str, str]:
    """What ``"auto"`` runs for tensors like ``x`` on this machine, and why."""
    try:
        backend, reason = backends._auto(op, x, pairs or backends.Pairs())
    except Exception as error:  # its choice does not load: the checks tell of that, and of what works instead
        return {"backend": "none", "reason": _told(error)}
    if backend == "cpu" and native.module is None:
        reason += f"; in plain PyTorch over row panels: {native.problem}"
    return {"backend": backend, "reason": reason}


def machine() -> dict[str, Any]:
    """Versions, processor, memory and devices."""
    found: dict[str, Any] = {
        "ffcl_fast": f"{_installed()} in {os.path.dirname(__file__)}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "system": platform.platform(),
        "processor": _processor(),
        "features": [flag for flag in _FLAGS if flag in _cpuinfo("flags", "Features").split()],
        "memory": _memory(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "compiler": os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
    }
    try:
        from . import _native

        info = _native.build_info()
        found["native"] = f"compiled for {', '.join(info['isas'])}; runs {_native.isa()}"
        archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"])
        found["cuda kernels"] = f"built with CUDA {info['cuda']} for {archs}" if info["cuda"] else "not built"
    except (ImportError, RuntimeError, ValueError) as error:
        found["native"] = f"not usable: {error}"
    found["driver"] = _driver()
    try:
        found["gpus"] = [
            f"{p.name}, {p.total_memory >> 30} GiB, compute capability {p.major}.{p.minor}"
            for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        ]
    except (AssertionError, RuntimeError) as error:
        found["gpus"] = [f"not usable: {_told(error)}"]
    found["settings"] = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_SETTINGS)]
    return found


def _installed() -> str:
    """The version of the sources, and what the installed distribution says of itself where that is another one."""
    try:
        version = metadata.version("ffcl-fast")
    except metadata.PackageNotFoundError:
        return f"{__version__}, not installed,"
    return __version__ if version == __version__ else f"{__version__}, installed as {version},"


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.import_module(package).__version__
    except Exception as error:  # whatever a broken installation raises
        return f"does not import: {_told(error)}"


def _driver() -> str | None:
    """The NVIDIA driver's description of itself, which Linux shows also where PyTorch cannot use it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().removeprefix("NVRM version:").strip()
    except OSError:
        return None


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
    left = page * free
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:  # what caches hold can be had as well
            left = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    return f"{page * pages >> 30} GiB, {left >> 30} GiB available"


def _inputs(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows = _INTERPRETED_ROWS if _interpreted() else _ROWS
    q, k = (torch.randn(rows, _WIDTH, generator=random).to(device, dtype) for _ in range(2))
    target = torch.randint(0, 2, (rows,), generator=random).mul(2).sub(1).to(device)
    return {"q": q, "k": k, "target": target}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


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


def _check(op: str, function: Callable, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each backend: its name, a verdict, and what there is to say."""
    try:
        true = _run(function, {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}, "reference")
        plain = _error(_run(function, inputs, "reference"), true)
    except Exception as error:  # without the truth there is nothing to compare with
        return [{"backend": "reference", **_failed(error)}]
    rows: list[dict[str, Any]] = []
    for backend in backends.BACKENDS:
        try:
            problem = backends.load(backend).unavailable(op, inputs["q"])
        except (ImportError, RuntimeError) as error:
            problem = str(error)
        except Exception as error:  # there, and broken
            rows.append({"backend": backend, **_failed(error)})
            continue
        if problem:
            rows.append({"backend": backend, "verdict": "unavailable", "reason": problem})
            continue
        try:
            rows.append({"backend": backend, **_measured(function, inputs, backend, true, plain)})
        except Exception as error:  # whatever a broken build, driver or compiler raises belongs into the report
            rows.append({"backend": backend, **_failed(error)})
    return rows


def _failed(error: Exception) -> dict[str, str]:
    return {"verdict": "FAILED", "reason": _told(error)}


def _told(error: Exception) -> str:
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}"


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
    for _ in range(1 if _interpreted() else _REPEATS):
        began = time.perf_counter()
        _run(function, inputs, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_json(findings: dict[str, Any]) -> str:
    """The findings as JSON, which has neither NaN nor infinity: such an error is text."""
    checks = [
        {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in check.items()}
        for check in findings["checks"]
    ]
    return json.dumps({**findings, "checks": checks}, indent=1, allow_nan=False)


def as_text(findings: dict[str, Any]) -> str:
    """The findings as three blocks of aligned lines."""
    lines = [
        f"{key:13} {', '.join(value) or 'none' if isinstance(value, list) else 'none' if value is None else value}"
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

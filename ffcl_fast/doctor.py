"""``ffcl doctor``: what this machine has, and whether every backend is right on it.

Each check runs one operator forward and backward on a backend and compares value and gradients with the reference
in float64. A backend is called wrong by the project's test rule: more than twice the error of plain PyTorch in the
same precision (three times for gradients), plus a few units in the last place.
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

_REPEATS = 3
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


def _check_pair_cosine(x: dict[str, Tensor], backend: str) -> Tensor:
    return functional.pair_cosine(x["q"], x["k"], x["target"], backend=backend)


# what is checked -> (the operator that decides the backend, the function)
_CHECKS: dict[str, tuple[str, Callable[[dict[str, Tensor], str], Tensor]]] = {
    "similarity_lse": ("similarity_forward", _check_similarity),
    "nt_xent (triangle)": ("similarity_forward", _check_triangle),
    "siglip": ("siglip", _check_siglip),
    "goodness": ("goodness_forward", _check_goodness),
    "pair_cosine": ("pair_cosine_forward", _check_pair_cosine),
}


def examine() -> dict[str, Any]:
    """What is here: ``machine``, ``choices`` (what ``auto`` picks and why) and ``checks`` (one a backend and operator).

    Verdicts are ``ok``, ``WRONG`` and ``unavailable``; times are medians in milliseconds, forward and backward.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for name, (op, _) in _CHECKS.items():
                backend, reason = backends.choose(op, device, dtype)
                choices.append(
                    {"operator": name, "device": device, "dtype": _short(dtype), "backend": backend, "reason": reason}
                )
    checks = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = _inputs(device, dtype)
            for name, (op, function) in _CHECKS.items():
                checks += _check(name, op, function, inputs, device, dtype)
    return {"machine": machine(), "choices": choices, "checks": checks}


def machine() -> dict[str, Any]:
    """Versions, processor, memory and devices."""
    found: dict[str, Any] = {
        "ffcl_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": platform.platform(),
        "processor": _processor(),
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
    return found


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(package).__version__


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _inputs(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    # sizes that are no multiple of any block
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(261, 96, generator=random).to(device, dtype) for _ in range(2))
    target = torch.randint(0, 2, (261,), generator=random).mul(2).sub(1).to(device)
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
        loss, grad = _error(_run(function, inputs, backend), true)
        right = loss <= 2 * plain[0] + _SLACK[dtype] and grad <= 3 * plain[1] + _SLACK[dtype]
        rows.append(
            {
                **row,
                "verdict": "ok" if right else "WRONG",
                "loss_error": loss,
                "gradient_error": grad,
                "milliseconds": _milliseconds(function, inputs, backend, device),
            }
        )
    return rows


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
        if check["verdict"] == "unavailable":
            where = f"  {check['backend']} on {check['device']}: {check['reason']}"
            missing.setdefault(where, []).append(check["operator"])
            continue
        lines.append(
            f"  {check['operator']:20} {check['device']:5} {check['dtype']:9} {check['backend']:10}"
            f" {check['loss_error']:9.1e} {check['gradient_error']:9.1e} {check['milliseconds']:8.2f}"
            f"  {check['verdict']}"
        )
    lines += ["", "not available"] if missing else []
    lines += [f"{where} ({', '.join(dict.fromkeys(operators))})" for where, operators in missing.items()]
    return "\n".join(lines)

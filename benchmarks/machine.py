"""What a measurement ran on and from which sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Of all the flags a processor has, those that decide which kernels can run.
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
_PACKAGES = (
    "torch", "triton", "lightly", "open_clip_torch", "pytorch-metric-learning", "info-nce-pytorch", "memeff", "inf-cl",
    "quack-kernels", "cut-cross-entropy", "liger-kernel", "siglip-kernel",
)  # fmt: skip


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@functools.cache
def target() -> str:
    """The type of device that this process measures on: FFCL_BENCH_DEVICE, else a GPU where there is one."""
    wanted = os.environ.get("FFCL_BENCH_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise ValueError(f"FFCL_BENCH_DEVICE must be cpu, cuda or unset; got {wanted!r}")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def device() -> dict[str, Any]:
    """What the measurements run on; ``slug`` names its results file."""
    return _gpu() if target() == "cuda" else _cpu()


def _gpu() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {
        "slug": "gpu-" + re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-"),
        "kind": "gpu",
        "name": found.name,
        "isa": f"sm_{found.major}{found.minor}",
        "threads": torch.get_num_threads(),
        "flags": [],
        "memory_bytes": found.total_memory,
        "system": f"{platform.system()} {platform.machine()}, CUDA {torch.version.cuda}",
    }


def _cpu() -> dict[str, Any]:
    info = _cpuinfo()
    try:
        from ffcl_fast import _native

        isa = _native.isa()
    except ImportError:
        isa = "none: the compiled part is missing"
    name = info.get("model name") or platform.processor() or platform.machine()
    model = f"{name}, family {info['cpu family']} model {info['model']}" if "cpu family" in info else name
    threads = torch.get_num_threads()
    flags = info.get("flags", info.get("Features", "")).split()
    slug = re.sub(r"[^a-z0-9]+", "-", f"cpu {model.replace(' family', '').replace('model', '')}".lower()).strip("-")
    return {
        "slug": f"{slug}-{threads}t",
        "kind": "cpu",
        "name": model,
        "isa": isa,
        "threads": threads,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def has_bf16_products(found: dict[str, Any]) -> bool:
    """Whether the processor multiplies bfloat16 in hardware."""
    return any(flag in found["flags"] for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def summary(found: dict[str, Any]) -> str:
    """The device in one line."""
    return f"{found['name']}; {found['isa']}; {found['threads']} threads"


@functools.cache
def versions() -> dict[str, str]:
    """Installed packages that are measured or measured with."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def source() -> dict[str, str]:
    """The commit, marked where sources differ from it, and the digest of the compiled part that ran."""
    import ffcl_fast

    root = Path(ffcl_fast.__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        commit += "+changes" if _git(root, "status", "--porcelain", "--", "ffcl_fast", "csrc") else ""
    except (OSError, subprocess.CalledProcessError):
        commit = f"ffcl-fast {ffcl_fast.__version__}"
    native = next(iter((root / "ffcl_fast").glob("_native*.so")), None)
    digest = hashlib.sha256(native.read_bytes()).hexdigest()[:12] if native else "none"
    return {"commit": commit, "native": digest}


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()

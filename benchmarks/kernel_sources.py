"""Which code a kernel is made of, as a hash: whether a stored GPU measurement is of the kernels that are here now.

Comments, docstrings and what surrounds a kernel (tile shapes, launches) do not count; a kernel's own functions, all
that they call and the constants that they name do. A CUDA file counts as a whole, of the headers what it uses.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from . import cpp_definitions
from .verdict import Results

Digests = dict[str, dict[str, str]]  # by backend and kind of kernels
Definitions = dict[str, ast.FunctionDef | ast.expr]  # of a module, by name
NOT_YET = "not yet measured on a GPU"
_ROOT = Path(__file__).resolve().parents[1]
# What kernels are begun from: modules of ffcl_fast/backends/triton, files of csrc.
SOURCES = {
    "triton": {
        "similarity, normalisers": ("similarity_forward",),
        "similarity, gradients": ("similarity_backward", "gradient_panels"),
        "SupCon's positives": ("class_positives", "positives"),
        "SigLIP": ("siglip",),
        "pair cosine": ("pair_cosine",),
        "ReLU + goodness + normalise": ("goodness",),
        "goodness of many layers": ("goodness_many",),
        "pooling + goodness": ("pool_goodness",),
        "linear + ReLU + goodness": ("linear_goodness",),
        "L2-normalisation": ("normalize",),
    },
    "cuda": {
        "similarity, normalisers": ("similarity_sm80.cu", "similarity_sm90.cu"),
        "similarity, gradients": ("similarity_sm80.cu", "similarity_sm90.cu", "similarity_vectors.cu"),
        "pair cosine": ("pair_cosine.cu",),
        "ReLU + goodness + normalise": ("goodness.cu",),
        "goodness of many layers": ("goodness.cu",),
        "pooling + goodness": ("pool_goodness.cu",),
    },
}
# Kernels as a reader knows them: what they are made of, and the workload families (of families.py) whose GPU records
# show that they have run.
_PAIRS, _TRIANGLE = ("clip", "info_nce", "info_nce_queue"), ("nt_xent", "sup_con")
KERNELS = {
    "similarity, both sums or rows only: forward": ("similarity, normalisers", _PAIRS),
    "similarity, both sums or rows only: gradients": ("similarity, gradients", _PAIRS),
    "similarity, the triangle: forward": ("similarity, normalisers", _TRIANGLE),
    "similarity, the triangle: gradients": ("similarity, gradients", _TRIANGLE),
    "SupCon's positives": ("SupCon's positives", ("sup_con",)),
    "SigLIP": ("SigLIP", ("siglip",)),
    "pair cosine": ("pair cosine", ("pair_cosine",)),
    "ReLU + goodness + normalise": ("ReLU + goodness + normalise", ("goodness_normalize",)),
    "goodness of many layers, one launch": ("goodness of many layers", ("layerwise",)),
    "pooling + goodness": ("pooling + goodness", ("pool_goodness", "pool_goodness_nhwc")),
    "linear + ReLU + goodness, activation not stored": ("linear + ReLU + goodness", ("linear_goodness",)),
    "L2-normalisation": ("L2-normalisation", ("unit_rows", "nt_xent")),
}


@functools.cache
def digests(root: Path = _ROOT) -> Digests:
    """A hash for each backend and kind of kernels, as SOURCES has them, of the checkout ``root``."""
    modules = {path.stem: _definitions(path) for path in (root / "ffcl_fast/backends/triton").glob("*.py")}
    code = {"triton": lambda files: _triton(modules, files), "cuda": lambda files: _cuda(root, files)}
    return {
        backend: {
            kernels: hashlib.sha256("\n".join(sorted(code[backend](files))).encode()).hexdigest()[:12]
            for kernels, files in groups.items()
        }
        for backend, groups in SOURCES.items()
    }


def _triton(found: dict[str, Definitions], modules: tuple[str, ...]) -> set[str]:
    """The compiled functions of the modules, what they call and the constants that they name."""
    waiting = [
        (module, name)
        for module in modules
        for name, node in found.get(module, {}).items()
        if isinstance(node, ast.FunctionDef)
    ]
    reached = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in reached:
            continue
        reached.add((module, name))
        for used in _global_names(found[module][name]):
            homes = [module] if used in found[module] else [other for other in found if used in found[other]]
            waiting += [(home, used) for home in homes]
    return {f"{name}: {_structure(found[module][name])}" for module, name in reached}


def _global_names(node: ast.AST) -> set[str]:
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    local = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {
        n.arg for n in ast.walk(node) if isinstance(n, ast.arg)
    }
    return {n.id for n in names} - local


def _structure(node: Any) -> str:
    """What a node means, in words that every version of Python has for it (ast.dump and ast.unparse differ)."""
    if isinstance(node, list):
        return f"[{' '.join(map(_structure, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_structure(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({' '.join(fields)})"


def _definitions(path: Path) -> Definitions:
    """Triton's functions and the constants of a module, without docstrings."""
    made: Definitions = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            made[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id.lstrip("_").isupper():
                made[node.targets[0].id] = node.value
    return made


def _cuda(root: Path, files: tuple[str, ...]) -> set[str]:
    """The files, and what they use, directly or not, of what our headers define."""
    reached: set[str] = set()
    names = set(cpp_definitions.ALWAYS)
    defined: list[tuple[tuple[str, ...], str]] = []
    waiting, seen = list(files), set()
    while waiting:
        path = root / "csrc" / waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8")
        waiting += re.findall(r'#include "([^"]+)"', text)
        if path.name in files:
            whole = cpp_definitions.words(cpp_definitions.without_comments(text))
            reached.add(f"{path.name}: {whole}")
            names |= set(re.findall(r"\w+", whole))
        else:
            defined += ((found, f"{path.name}: {chunk}") for found, chunk in cpp_definitions.definitions(text))
    while more := {chunk for found, chunk in defined if names & set(found)} - reached:
        reached |= more
        names |= set(re.findall(r"\w+", " ".join(more)))
    return reached


def told(backend: str, family: str, hashes: Digests) -> dict[str, dict[str, str]]:
    """What a record of a backend's kernels in a workload family says of their sources; nothing for other providers."""
    used = {kernels for kernels, families in KERNELS.values() if family in families}
    found = {kernels: digest for kernels, digest in hashes.get(backend, {}).items() if kernels in used}
    return {"sources": found} if found else {}


def confirmed(all_results: list[Results], backend: str, kernels: str, families: tuple[str, ...]) -> str:
    """The GPUs that have stored measurements of a backend's ``kernels`` in workloads of ``families``; where none is of
    the kernels that are here now, those that it was of others."""
    now = digests()[backend][kernels]
    same, other = [], []
    for results in all_results:
        times = [
            record["time"]
            for record in results["records"]
            if results["device"]["kind"] == "gpu"
            and record["provider"].split("-")[0] == backend
            and record["family"] in families
            and "seconds" in record.get("time", {})
        ]
        of = [time.get("sources", {}).get(kernels) for time in times]
        if any(of):
            (same if now in of else other).append(results["device"]["name"])
    if same:
        return "; ".join(same)
    return f"changed since it ran on {', '.join(other)}" if other else NOT_YET

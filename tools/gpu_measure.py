"""Measure our kernels on this GPU beside its own product and copy, plain losses and peers; raw results, a table.

    python -m tools.gpu_measure [--seconds S] [--only NAME,...] [--providers NAME,...] [--budget SECONDS] [--dry-run]

Medians over CUDA events, in milliseconds, on inputs drawn anew for each workload: as called, and as `device ms` of the
same kernels replayed from a CUDA graph, without the time in which the host prepares and launches them (absent where a
call cannot be captured). `fraction` is the counted useful work (similarity.md: 1 U = 2 N M D; forward 1 U, both passes
4 U, halved where k = q, SigLIP 3 U) over device time, else over time as called, as a part of the rate of an 8192-cubed
bf16 torch.matmul timed in turn with the replays, or for memory-bound work the counted bytes over those of a copy.
"triton" and "cuda" are our kernels, the latter only where they were built, "auto" what is taken of both (`takes` says
which); "panels" is our plain PyTorch.
FFCL_OUT (default: the current folder) gets gpu.json after each measurement, so that a cut run keeps what it measured
and the next, with other --providers as well, goes on there, and gpu.md, its table, after each workload. FFCL_COMMIT
names the sources where git cannot.
Exit status 1 where one of our kernels failed, 2 where the budget left workloads out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from benchmarks import kernel_sources
from ffcl_fast import backends
from ffcl_fast.backends import native

from .files import write_text
from .gpu_peers import PEERS, problem_of
from .gpu_table import OURS, markdown
from .gpu_timing import Spoiled, device_milliseconds, healthy, milliseconds
from .gpu_workloads import COMPILED_LIMIT, PLAIN_LIMIT, WORKLOADS, Products, Workload, by_auto, by_cuda, by_panels


def passes(loss: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> tuple[Callable, Callable]:
    def forward() -> None:
        with torch.no_grad():
            loss(*arguments)

    def both() -> tuple[Tensor | None, ...]:
        return backward(loss(*arguments), arguments)

    return forward, both


def backward(out: Tensor | tuple[Tensor, ...], arguments: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    # What a next layer would hand back, at no traffic of its own: outputs that are no loss are their own gradients.
    seeds = None if isinstance(out, Tensor) and not out.dim() else out
    return torch.autograd.grad(out, arguments, seeds, allow_unused=True)


class Ceiling(NamedTuple):
    """What a fraction is of: a call, its work (operations or bytes), and its rate at the beginning of the run."""

    call: Callable[[], object]
    work: float
    rate: float


def product_ceiling() -> Ceiling:
    """torch's 8192-cubed bf16 product of random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)

    def call() -> object:
        return torch.mm(a, b, out=c)

    return Ceiling(call, 2.0 * 8192**3, 2 * 8192**3 / (1e-3 * milliseconds(call)))


def copy_ceiling() -> Ceiling:
    """A copy of a gigabyte, bytes read and written."""
    a = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)

    def call() -> object:
        return b.copy_(a)

    return Ceiling(call, 4.0 * a.numel(), 4 * a.numel() / (1e-3 * milliseconds(call)))


def losses(workload: Workload) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What runs on a workload, by name; each is built when its turn comes, and may fail then."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {"triton": lambda: workload.ours}
    if (cuda := by_cuda(workload)) and native.module is not None and native.module.cuda_built():
        found["cuda"] = lambda: cuda
        if workload.name == "clip":  # "auto" may take both
            found["auto"] = lambda: by_auto(workload)
    if panels := by_panels(workload):
        found["panels"] = lambda: panels
    fits = compiles = True
    if isinstance(workload, Products):
        fits = workload.rivals and workload.rows <= PLAIN_LIMIT and workload.cols <= 4 * PLAIN_LIMIT
        compiles = workload.name == "clip" and workload.rows <= COMPILED_LIMIT
        for peer in PEERS if workload.rivals else ():
            if peer.family == workload.name and peer.fits(workload.rows, workload.width):
                found[peer.name] = peer.build
    plain = workload.plain
    if plain and fits:
        found["plain"] = lambda: plain
        if compiles:
            found["compiled"] = lambda: torch.compile(plain)
    return found


def taken(call: Callable[[], object]) -> dict[str, str]:
    """The backend that "auto" takes for each operator of a call that is asked for it; those on positives follow."""
    found = {}
    get = backends.get

    def told(backend: str, op: str, *rest: object) -> ModuleType:
        module = get(backend, op, *rest)
        if backend == "auto":
            found[op] = module.__name__.rpartition(".")[2]
        return module

    backends.get = told
    try:
        call()
    finally:
        backends.get = get
    return found


def described(workload: Workload) -> dict:
    """A row of results before anything is measured."""
    sizes = {"rows": workload.rows, "width": workload.width} if isinstance(workload, Products) else {}
    return {"key": workload.key, "name": workload.name, **sizes}


def measure(
    workload: Workload,
    row: dict,
    names: list[str],
    ceiling: Ceiling,
    seconds: float,
    spoilers: dict[str, str | None],
    save: Callable[[], None],
) -> None:
    """Add what is called `names` to a row, and `save` each time. `spoilers`: what an earlier process could not go on
    after, by `label`: the problem, which is not tried again, or None for what is not captured again. Raises Spoiled,
    after noting it there."""
    arguments = workload.inputs("cuda")
    builders = losses(workload)
    for name in names:
        build, label = builders[name], f"{workload.key}: {name}"
        if problem := spoilers.get(label):
            row[name] = {"problem": problem}
            save()
            continue
        capture = not workload.once and label not in spoilers
        try:
            loss = build()
            found = {"takes": taken(passes(loss, arguments)[1])} if name == "auto" else {}
            found |= _one(loss, name in OURS, arguments, workload, ceiling, seconds, capture)
        except Spoiled:
            spoilers[label] = None
            raise
        except Exception as error:  # a peer's failure costs its own column only; ours fails the run at its end
            found = {"problem": problem_of(error)}
        if "problem" in found and not healthy():  # an error of CUDA that ends with its process
            spoilers[label] = found["problem"]
            raise Spoiled
        row[name] = found
        save()
        torch.cuda.empty_cache()


def _one(
    loss: Callable[..., Tensor],
    ours: bool,
    arguments: tuple[Tensor, ...],
    workload: Workload,
    ceiling: Ceiling,
    seconds: float,
    capture: bool,
) -> dict:
    forward, both = passes(loss, arguments)
    found: dict = {}
    if ours and not workload.once:
        first = both()
        found["same bits"] = all(
            torch.equal(a, b) for _ in range(3) for a, b in zip(first, both(), strict=True) if a is not None
        )
        del first
    if workload.once:  # its kernels, on fewer rows, so that nothing is compiled inside the one call
        fewer = tuple(x[:16384].detach().requires_grad_() if x.dim() else x for x in arguments)
        passes(loss, fewer)[1]()
    each = tuple(zip(("forward", "both"), (forward, both), workload.useful(), strict=True))
    for which, function, _ in each:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found[f"{which} ms"] = round(milliseconds(function, seconds, workload.once), 4)
        found["MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    rates = {}
    for which, function, _ in each if capture else ():
        if (times := device_milliseconds(function, seconds, ceiling.call)) is None:
            break
        found[f"{which} device ms"] = round(times[0], 4)
        rates[which] = ceiling.work / (1e-3 * times[1])
    for which, _, work in each:
        ms = found.get(f"{which} device ms", found[f"{which} ms"])
        found[f"{which} fraction"] = round(work / (1e-3 * ms) / rates.get(which, ceiling.rate), 3)
    return found


def check_arguments() -> list[str]:
    """Every call on tiny tensors on the CPU, ours under the interpreter: that names and arguments still fit. A line a
    peer: whether it is installed, and what it says on a CPU."""
    for workload in WORKLOADS:
        small = workload.small()
        arguments = tuple(x.detach().float().requires_grad_() for x in small.inputs("cpu"))
        for loss in filter(None, (small.plain, small.ours, by_panels(small), by_auto(small))):
            if loss is small.ours and os.environ.get("TRITON_INTERPRET") != "1":
                continue  # without the interpreter its backend needs a GPU
            passes(loss, arguments)[1]()
    lines = []
    for peer in PEERS:
        try:
            loss = peer.build()
            q, k, scale = (x.detach().float() for x in WORKLOADS[0].small().inputs("cpu"))
            lines.append(f"{peer.name}: {float(loss(q, k, scale)):.4f} on a CPU")
        except Exception as error:  # most need a GPU, and say so in many ways
            lines.append(f"{peer.name}: {problem_of(error)}")
    return lines


def commit() -> str | None:
    """The sources' commit, "-dirty" where they have changed since: FFCL_COMMIT where a copy of the tree has no
    repository."""
    if named := os.environ.get("FFCL_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def stored(path: Path, of: dict) -> dict:
    """What an earlier, cut run of the same sources has measured on this machine: ``of`` tells what must be equal."""
    try:
        found = json.loads(path.read_text())
        return found if all(found.get(name) == value for name, value in of.items()) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def restart(arguments: list[str], budget: float) -> NoReturn:
    """Go on as a new process, which takes nothing over from this one's use of the GPU."""
    print("this process cannot measure any more: going on in a new one", flush=True)
    sys.stderr.flush()
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2:
            try:
                os.set_inheritable(descriptor, False)
            except OSError:
                pass  # the listing's own
    os.execv(sys.executable, [sys.executable, "-m", "tools.gpu_measure", *arguments, "--budget", f"{budget:.1f}"])


PROVIDERS = (*OURS, "panels", "plain", "compiled", *(peer.name for peer in PEERS))


def chosen(parts: str, names: Iterable[str]) -> set[str]:
    """The names that have one of the comma-separated parts in them; all for no part. Raises ValueError naming the parts
    that are in none."""
    names, wanted = list(names), [part for part in map(str.strip, parts.split(",")) if part]
    if unknown := [part for part in wanted if not any(part in name for name in names)]:
        raise ValueError(f"{', '.join(map(repr, unknown))} is in none of {'; '.join(names)}")
    return {name for name in names if not wanted or any(part in name for part in wanted)}


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_measure", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.2, help="per measured function (default %(default)s)")
    parser.add_argument("--only", default="", metavar="NAME,...", help="workloads with one of these in their key")
    parser.add_argument("--providers", default="", metavar="NAME,...", help="with one of these in their name")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no workload is begun")
    parser.add_argument("--dry-run", action="store_true", help="check every workload's call on a CPU, measure nothing")
    options = parser.parse_args(arguments)
    try:
        keys = chosen(options.only, (workload.key for workload in WORKLOADS))
        providers = chosen(options.providers, PROVIDERS)
    except ValueError as error:
        parser.error(str(error))
    if options.dry_run:
        print("\n".join(check_arguments()))
        print(f"{len(WORKLOADS)} workloads callable, {len(PEERS)} peers tried")
        return 0
    folder = Path(os.environ.get("FFCL_OUT", "."))
    path = folder / "gpu.json"
    product, copy = product_ceiling(), copy_ceiling()
    same = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_version(),
        **({"commit": found} if (found := commit()) else {}),
        "sources": kernel_sources.digests(),
    }
    before = stored(path, same)
    result = {
        **same,
        "product_tflops": round(product.rate / 1e12, 1),
        "copy_gbytes": round(copy.rate / 1e9, 1),
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "rows": before.get("rows", []),
        "spoilers": before.get("spoilers", {}),
    }
    print(f"{result['device']}: bf16 product {result['product_tflops']} TFLOP/s, copy {result['copy_gbytes']} GB/s")
    rows = {row["key"]: row for row in result["rows"]}
    late = []

    def save() -> None:
        result["rows"] = [rows[workload.key] for workload in WORKLOADS if workload.key in rows]
        write_text(path, json.dumps(result, indent=1))

    for workload in WORKLOADS:
        row = rows.get(workload.key, described(workload))
        names = [name for name in losses(workload) if name in providers and name not in row]
        if workload.key not in keys or not names:
            continue
        if time.monotonic() - started > options.budget:
            late.append(workload.key)
            continue
        ceiling = product if isinstance(workload, Products) else copy
        rows[workload.key] = row
        try:
            measure(workload, row, names, ceiling, options.seconds, result["spoilers"], save)
        except Spoiled:
            save()
            restart(arguments, options.budget - (time.monotonic() - started))
        write_text(folder / "gpu.md", markdown(result))
        print(json.dumps(row), flush=True)
    failed = [f"{row['key']} ({name})" for row in result["rows"] for name in OURS if "problem" in row.get(name, {})]
    print(f"{len(result['rows'])} workloads measured" + (f"; ours failed on {', '.join(failed)}" if failed else ""))
    if late:
        print(f"no time left for {', '.join(late)}")
    return 1 if failed else 2 if late else 0


if __name__ == "__main__":
    sys.exit(main())

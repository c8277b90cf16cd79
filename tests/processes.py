"""Processes of one gloo group for a test, started quickly: from a fork server that has imported what they need.

``results = run(world, function, *args)`` calls ``function(rank, world, *args)`` in each of ``world`` processes, inside
a process group, and returns what they returned by rank; ``Died(exit code)`` for one that ended without an answer.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 30  # seconds a collective waits
LONGEST = 300  # seconds until a test is given up

_context = multiprocessing.get_context("forkserver")
# DistributedDataParallel imports torch._dynamo, which takes longer than all of a test.
_PRELOADED = ["torch", "torch._dynamo", "torch.distributed", "numpy", "pytest", "ffcl_fast"]
# A started process imports the test by its name: the folder of the tests, and the package's, must be on its path.
_PATHS = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def preload(*modules: str) -> None:
    """Let the fork server import these too; call it where a test module is imported, before any process is started."""
    _PRELOADED.extend(modules)


def start_server() -> None:
    """The fork server, which imports from where this process does; nothing where it runs already."""
    _context.set_forkserver_preload(_PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS + ([before] if before else []))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass(frozen=True)
class Died:
    exit_code: int | None


@dataclass(frozen=True)
class Raised:
    text: str


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, check: bool = True
) -> list[Any]:
    """See above. With ``check`` an exception in any process fails the test, else it is its result, as ``Raised``."""
    sys.path[:0] = [path for path in _PATHS if path not in sys.path]
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            arguments = (function, rank, world, f"file://{folder}/rendezvous", timeout, sender, check, args)
            process = _context.Process(target=_process, args=arguments, daemon=True)
            process.start()
            sender.close()
            started.append((process, receiver))
        try:
            results = [_result(process, receiver) for process, receiver in started]
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    if check:
        failed = [f"rank {rank}: {r}" for rank, r in enumerate(results) if isinstance(r, Raised | Died)]
        assert not failed, "\n".join(failed)
    return results


def start(function: Callable[..., Any], *args: Any):
    """A process that calls ``function(*args)``, outside any group; the caller ends or joins it."""
    sys.path[:0] = [path for path in _PATHS if path not in sys.path]
    process = _context.Process(target=function, args=args)
    process.start()
    return process


def _result(process, receiver) -> Any:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        if receiver.poll(0.2):
            try:
                return receiver.recv()
            except EOFError:
                process.join(10)
                return Died(process.exitcode)
    raise AssertionError(f"a process has not answered in {LONGEST} s")


def _process(function, rank, world, address, timeout, sender, check, args) -> None:
    torch.set_num_threads(1)
    seconds = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=seconds)
    try:
        result = function(rank, world, *args)
        if check:
            dist.barrier()  # nobody leaves while another still reads from it
    except Exception:  # goes to the test as text
        result = Raised(traceback.format_exc())
    sender.send(result)
    sender.close()
    os._exit(0)  # no waiting for peers that are gone

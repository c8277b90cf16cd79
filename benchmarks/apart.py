"""Calls in a process of their own, whose peak of resident memory is theirs alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .measure import ON_GPU, problem_of

# Forked from a server that has imported PyTorch and done nothing else: an import anew takes many times as long as most
# measurements. A CUDA context, which asking for a GPU may make, does not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
_PRELOAD = ["benchmarks.memory", "benchmarks.trainer"]


def call_apart(function: Callable[..., dict[str, Any]], *arguments: Any, timeout: float = 600) -> dict[str, Any]:
    """What ``function``, of a module, returns there; ``{"problem": ...}`` where it raises, dies or takes too long."""
    if not ON_GPU:
        _CONTEXT.set_forkserver_preload(_PRELOAD)
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(sender, function, arguments), daemon=True)
    with receiver:
        process.start()
        sender.close()
        try:
            if not receiver.poll(timeout):
                return {"problem": f"not done after {timeout:.0f} s"}
            return receiver.recv()
        except EOFError:
            process.join()
            return {"problem": f"exit status {process.exitcode}"}
        finally:
            process.kill()
            process.join()


def _run(sender: Connection, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        found = function(*arguments)
    except Exception as error:
        found = {"problem": problem_of(error)}
    sender.send(found)

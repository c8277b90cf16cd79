"""Processes of one gloo group on this machine, one thread each, from a fork server that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(rank, world, *args)`` returns in each of ``world`` processes, by rank."""
    multiprocessing.set_forkserver_preload(["torch", "ffcl_fast"])
    with tempfile.TemporaryDirectory() as folder:
        answers = torch.multiprocessing.get_context("forkserver").SimpleQueue()
        arguments = (world, f"file://{folder}/rendezvous", function, args, answers)
        torch.multiprocessing.start_processes(_process, args=arguments, nprocs=world, start_method="forkserver")
        return [result for _, result in sorted((answers.get() for _ in range(world)), key=lambda answer: answer[0])]


def _process(rank: int, world: int, address: str, function, args, answers) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    answers.put((rank, function(rank, world, *args)))
    dist.barrier()  # nobody leaves while another still reads from it
    dist.destroy_process_group()

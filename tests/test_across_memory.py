"""Memory of a process: flat in the number of processes round the ring, in proportion to its own rows both ways, and
no copy of a queue or bank. ``tools/rank_memory.py`` is what measures."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from processes import run

import ffcl_fast as ff
from tools.rank_memory import MIB, Step, expected, peak_of, peaks, tensor_peak_of

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler tells of each start on stderr

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

LOSSES = ("clip", "siglip", "info_nce", "nt_xent", "sup_con")
ROWS, WIDE = 128, 4096
BLOCK = ROWS * WIDE * 4 / MIB
WORKSPACE = 64  # MiB that a kernel may take at any size


def _measured(world: int, steps: list[Step], measured=peak_of) -> dict[Step, float]:
    """MiB at the process that took most."""
    return {s: max(p) / MIB for s, p in zip(steps, zip(*run(world, peaks, steps, measured), strict=True), strict=True)}


def test_ring_is_flat_in_processes():
    """Tensors of eight processes against six, from where on no block more is under way; a gather grows by each.

    Tensors, because resident pages are counted too roughly to see half a block.
    """
    steps = [Step(loss, way, ROWS, WIDE) for loss in LOSSES for way in ("ring", "gather")]
    six, eight = (_measured(world, steps, tensor_peak_of) for world in (6, 8))
    for step in steps:
        paper = expected(step, 8) / MIB
        print(f"{step}: {six[step]:.2f} MiB on 6 processes, {eight[step]:.2f} on 8; {paper:.2f} on paper")
        if step.strategy == "ring":
            assert eight[step] - six[step] < BLOCK / 2, step
        else:
            assert eight[step] - six[step] > 4 * BLOCK, step  # which shows that this would be seen


def test_memory_grows_with_rows_and_not_with_pairs():
    """4096 rows of 32 by 8192 keys: the matrix would take 128 MiB, the embeddings take half of one."""
    steps = [Step(loss, way, 4096, 32) for loss in ("clip", "siglip", "nt_xent") for way in ("gather", "ring")]
    for step, peak in _measured(2, steps).items():
        print(f"{step}: {peak:.1f} MiB")
        assert peak < expected(step, 2) / MIB + WORKSPACE, step


def test_no_copy_of_a_queue_or_bank():
    for name, peak in run(1, _constant_keys)[0].items():
        assert peak < 48, f"{name}: {peak:.1f} MiB"


def _constant_keys(rank: int, world: int) -> dict[str, float]:
    """MiB of a step against 64 MiB of keys, enqueueing included; a kernel's workspace takes some."""
    queue, bank = ff.Queue(1 << 16, 256), ff.NTXentLoss(memory_bank_size=(1 << 16, 256))
    x, y = torch.randn(64, 256, requires_grad=True), torch.randn(64, 256)

    def with_queue() -> None:
        value = ff.InfoNCELoss()(x, y, queue)
        queue.enqueue(y)
        value.backward()

    def with_bank() -> None:
        bank(x, y).backward()

    with_queue(), with_bank()  # for what stays: libraries, thread pools
    return {step.__name__: peak_of(step) / MIB for step in (with_queue, with_bank)}

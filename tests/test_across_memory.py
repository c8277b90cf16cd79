"""Memory of a process: flat in the number of processes round the ring, in proportion to its own rows both ways, and
no copy of a queue or bank. ``tools/rank_memory.py`` is what measures."""

from __future__ import annotations

import sys

import pytest
import torch
from processes import run

import ffcl_fast as ff
from tools.rank_memory import MIB, Step, expected, peak_of, peaks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

LOSSES = ("clip", "siglip", "info_nce", "nt_xent", "sup_con")
ROWS, WIDE = 128, 4096
BLOCK = ROWS * WIDE * 4 / MIB
WORKSPACE = 64  # MiB that a kernel may take at any size


def _measured(world: int, steps: list[Step]) -> dict[Step, float]:
    """MiB at the process that took most."""
    return {s: max(p) / MIB for s, p in zip(steps, zip(*run(world, peaks, steps), strict=True), strict=True)}


def test_ring_is_flat_in_processes():
    """Eight processes against six, from where on no block more is under way. A gather grows by three blocks each."""
    steps = [Step(loss, "ring", ROWS, WIDE) for loss in LOSSES] + [Step("clip", "gather", ROWS, WIDE)]
    six, eight = (_measured(world, steps) for world in (6, 8))
    for step in steps:
        paper = expected(step, 8) / MIB
        print(f"{step}: {six[step]:.1f} MiB on 6 processes, {eight[step]:.1f} on 8; {paper:.1f} and workspace on paper")
        if step.strategy == "ring":
            assert eight[step] - six[step] < BLOCK, step
        else:
            assert eight[step] - six[step] > 2 * BLOCK  # which shows that this would be seen


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

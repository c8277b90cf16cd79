"""Memory of a process: flat in the number of processes round the ring, and linear in its own rows both ways."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from processes import run
from torch.nn.functional import normalize

import ffcl_fast as ff

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

DIM = 1024
MIB = 1 << 20


def _peak(rank: int, world: int, shapes: list[tuple[str, str, int]]) -> list[float]:
    """MiB that a step of each (loss, strategy, rows) takes at most beyond what was there before."""
    peaks = []
    for name, strategy, rows in shapes:
        for _ in range(2):  # once for what stays: buffers of the backend, thread pools
            x, y = (normalize(torch.randn(rows, DIM), dim=1).requires_grad_() for _ in range(2))
            loss = {"clip": lambda s: ff.ClipLoss(distributed=s), "nt_xent": lambda s: ff.NTXentLoss(distributed=s)}
            loss = loss[name](strategy)
            torch.distributed.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
            before = _status("VmHWM")
            value = loss(x, y, 10.0) if name == "clip" else loss(x, y)
            value.backward()
            peak = _status("VmHWM") - before
        peaks.append(peak / MIB)
    return peaks


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(name)


def test_memory():
    rows, block = 1024, 1024 * DIM * 4 / MIB
    ways = [("clip", "ring", rows), ("nt_xent", "ring", rows // 2), ("clip", "gather", rows)]
    small = [("clip", way, rows // 4) for way in ("ring", "gather")]
    two = [max(peaks) for peaks in zip(*run(2, _peak, ways + small), strict=True)]
    four = [max(peaks) for peaks in zip(*run(4, _peak, ways), strict=True)]
    print(f"MiB beyond the inputs, 2 and 4 processes: {list(zip(ways, two, four, strict=False))}; {small}: {two[3:]}")
    for (name, strategy, _), a, b in zip(ways, two, four, strict=False):
        if strategy == "ring":  # one process more would be a block more where all keys are held
            assert b - a < block, f"{name}: {a:.1f} MiB on 2 processes, {b:.1f} on 4"
        else:
            assert b - a > block  # which shows that this would be seen
    for strategy, large, few in (("ring", two[0], two[3]), ("gather", two[2], two[4])):
        # 2 e + 3 * 4 bytes an element of a block, and of the own gradients; a matrix of rows x rows would be 16-fold
        assert large - few < 12 * block, f"{strategy}: {few:.1f} MiB at {rows // 4} rows, {large:.1f} at {rows}"

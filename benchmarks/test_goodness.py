"""How near to a copy's speed are the memory-bound losses, and how far is plain PyTorch?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import GOODNESS


@cases(GOODNESS)
def test_goodness(workload, provider, side_by_side):
    side_by_side(workload, provider)

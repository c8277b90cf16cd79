"""How does time grow with the batch, and where do others run out of memory?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import SCALING


@cases(SCALING)
def test_scaling(workload, provider, side_by_side):
    side_by_side(workload, provider)

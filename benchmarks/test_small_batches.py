"""Is anybody slower with us at 512 rows, where fixed costs count?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import SMALL


@cases(SMALL)
def test_small_batches(workload, provider, side_by_side):
    side_by_side(workload, provider)

"""Do sizes that are no multiple of any block cost more?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import RAGGED


@cases(RAGGED)
def test_ragged(workload, provider, side_by_side):
    side_by_side(workload, provider)

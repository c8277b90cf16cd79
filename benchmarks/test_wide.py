"""What do wider embeddings, longer queues and other numbers of classes change?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import WIDE


@cases(WIDE)
def test_wide(workload, provider, side_by_side):
    side_by_side(workload, provider)

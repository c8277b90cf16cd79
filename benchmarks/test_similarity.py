"""How much faster is each loss than the library it replaces, at the batch sizes that contrastive training uses?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import SIMILARITY


@cases(SIMILARITY)
def test_similarity(workload, provider, side_by_side):
    side_by_side(workload, provider)

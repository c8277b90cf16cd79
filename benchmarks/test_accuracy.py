"""How far from float64 are values and gradients, by temperature and geometry, and are the bits the same every time?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import ACCURACY


@cases(ACCURACY)
def test_accuracy(workload, provider, side_by_side):
    side_by_side(workload, provider)

"""Do bfloat16 inputs pay on this processor, and how do rivals do with them?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import BF16


@cases(BF16)
def test_bf16(workload, provider, side_by_side):
    side_by_side(workload, provider)

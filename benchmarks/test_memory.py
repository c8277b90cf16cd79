"""How much memory does a loss need beyond its inputs and gradients?"""

from __future__ import annotations

from benchmarks.cases import cases
from benchmarks.workloads import MEMORY


@cases(MEMORY)
def test_memory(workload, provider, alone):
    alone(workload, provider)

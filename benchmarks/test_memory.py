"""How much memory does a loss need beyond its inputs and gradients?"""

from __future__ import annotations

from benchmarks.workloads import MEMORY, cases


@cases(MEMORY)
def test_memory(workload, provider, alone):
    alone(workload, provider)

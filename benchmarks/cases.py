"""Workloads as pytest's parameters, apart from their list: the documentation reads that list without pytest."""

from __future__ import annotations

import pytest

from .workloads import Workload


def cases(workloads: list[Workload]) -> pytest.MarkDecorator:
    """``@cases(SIMILARITY)``: a test for each provider of each workload, ``-k`` choosing among them."""
    return pytest.mark.parametrize(
        ("workload", "provider"),
        [pytest.param(w, name, id=f"{w.name}:{name}") for w in workloads for name in w.providers()],
    )

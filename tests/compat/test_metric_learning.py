"""NTXentLoss and SupConLoss against pytorch-metric-learning, where the definitions coincide."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees
from similarity_cases import BACKENDS

import ffcl_fast as ff

losses = pytest.importorskip("pytorch_metric_learning.losses")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", (0.07, 0.5))
def test_nt_xent(backend, temperature):
    labels = torch.arange(60).repeat(2)
    original = losses.NTXentLoss(temperature)
    out0 = torch.randn(60, 32)
    assert_agrees(
        ff.NTXentLoss(temperature, backend=backend),
        lambda a, b: original(torch.cat((a, b)), labels),
        out0,
        out0 + torch.randn(60, 32),
        scale=1 / temperature,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", (5, 30))
def test_sup_con(backend, classes):
    """Rows without a positive are left out of the mean here too."""
    labels = torch.randint(0, classes, (70,))
    original = losses.SupConLoss(0.1)
    assert_agrees(
        lambda x: ff.functional.sup_con(
            torch.nn.functional.normalize(x, dim=1)[:, None], labels, None, 0.1, "all", 0.1, backend=backend
        ),
        lambda x: original(x, labels),
        torch.randn(70, 24),
        scale=10,
    )

"""InfoNCELoss against info-nce-pytorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_same_start
from similarity_cases import BACKENDS

import ffcl_fast as ff

info_nce = pytest.importorskip("info_nce")

# At a few rows a low temperature leaves a loss of one or two terms, whose relative error is luck.
CASES = [((1, 5, 7), 0.5), ((2, 1, 3), 0.5)] + [
    (shape, temperature)
    for shape in ((64, 33, 40), (100, 130, 96), (300, 257, 128))
    for temperature in (0.5, 0.1, 0.03)
]


def truth(query, positive_key, negative_keys=None, temperature=0.1):
    """info_nce without cancellation: float64's own log_softmax is 0 below 1e-16."""
    q, p = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    positive = (q * p).sum(1, keepdim=True)
    if negative_keys is None:
        negatives = (q @ p.T)[~torch.eye(len(q), dtype=torch.bool)].view(len(q), -1)
    else:
        keys = F.normalize(negative_keys, dim=-1)
        negatives = q @ keys.T if keys.dim() == 2 else (keys * q[:, None]).sum(2)
    return torch.log1p(((negatives - positive) / temperature).exp().sum(1)).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape,temperature", CASES, ids=str)
@pytest.mark.parametrize("negatives", ("in-batch", "unpaired", "paired"))
def test_agrees(backend, shape, temperature, negatives):
    n, m, d = shape
    mode = "paired" if negatives == "paired" else "unpaired"
    query = torch.randn(n, d)
    inputs = [query, query + torch.randn(n, d)]
    if negatives != "in-batch":
        inputs.append(torch.randn(m, d) if mode == "unpaired" else torch.randn(n, m, d))
    ours = ff.InfoNCELoss(temperature, negative_mode=mode, backend=backend)
    original = info_nce.InfoNCE(temperature, negative_mode=mode)
    assert_agrees(ours, original, *inputs, truth=lambda *x: truth(*x, temperature=temperature), scale=1 / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_reductions(backend, reduction):
    inputs = torch.randn(50, 24), torch.randn(50, 24), torch.randn(70, 24)
    weight = torch.rand(50) if reduction == "none" else None
    ours, original = (
        ff.InfoNCELoss(reduction=reduction, backend=backend), info_nce.InfoNCE(reduction=reduction)
    )  # fmt: skip
    assert_agrees(ours, original, *inputs, weight=weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learnable_temperature(backend):
    for negatives in ((), (torch.randn(30, 16),)):
        inputs = (torch.randn(40, 16), torch.randn(40, 16), torch.tensor(0.07), *negatives)
        assert_agrees(
            lambda q, k, t, *n: ff.functional.info_nce(q, k, *n, temperature=t, backend=backend),
            lambda q, k, t, *n: info_nce.info_nce(q, k, *n, temperature=t),
            *inputs,
            scale=1 / 0.07,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend):
    query, key = torch.randn(20, 8), torch.randn(20, 8)
    query[3] = 0
    assert_agrees(ff.InfoNCELoss(backend=backend), info_nce.InfoNCE(), query, key)


def test_signatures():
    for ours, theirs in (
        (ff.InfoNCELoss.__init__, info_nce.InfoNCE.__init__),
        (ff.InfoNCELoss.forward, info_nce.InfoNCE.forward),
        (ff.functional.info_nce, info_nce.info_nce),
    ):
        assert_same_start(ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    (
        (torch.randn(3), torch.randn(3, 4)),
        (torch.randn(3, 4), torch.randn(3, 4, 1)),
        (torch.randn(3, 4), torch.randn(2, 4)),
        (torch.randn(3, 4), torch.randn(3, 5)),
        (torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 2, 4)),
        (torch.randn(3, 4), torch.randn(3, 4), torch.randn(2, 5)),
    ),
)
def test_same_errors(arguments):
    for loss in (ff.InfoNCELoss(), info_nce.InfoNCE()):
        with pytest.raises(ValueError):
            loss(*arguments)

"""SupConLoss against the formulation of SupContrast (not on PyPI), written out here from the paper's equation 2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees
from similarity_cases import BACKENDS

import ffcl_fast as ff


def plain(features, labels=None, mask=None, temperature=0.07, contrast_mode="all", base_temperature=0.07):
    """Mean over all anchors; every anchor has to have a positive."""
    batch, views = features.shape[:2]
    features = features.flatten(2)
    keys = features.transpose(0, 1).flatten(0, 1)
    anchors = keys if contrast_mode == "all" else features[:, 0]
    if labels is not None:
        weights = (labels.reshape(-1, 1) == labels.reshape(1, -1)).to(features.dtype)
    else:
        weights = torch.eye(batch, dtype=features.dtype) if mask is None else mask.to(features.dtype)
    weights = weights.repeat(anchors.shape[0] // batch, views)
    others = ~torch.eye(anchors.shape[0], keys.shape[0], dtype=torch.bool)
    weights = weights * others
    logits = anchors @ keys.T / temperature
    logits = logits - logits.amax(1, keepdim=True).detach()
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -(temperature / base_temperature) * ((weights * log_prob).sum(1) / weights.sum(1)).mean()


def _features(batch, views, dim):
    return F.normalize(torch.randn(batch, views, dim, dtype=torch.float64), dim=2).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ((2, 2, 3), (40, 2, 96), (33, 3, 17), (150, 2, 128), (50, 4, 200)), ids=str)
@pytest.mark.parametrize("classes", (1, 10, 1000))
@pytest.mark.parametrize("mode", ("all", "one"))
def test_labels(backend, shape, classes, mode):
    labels = torch.randint(-classes, classes, shape[:1])
    ours = ff.SupConLoss(contrast_mode=mode, backend=backend)
    assert_agrees(ours, lambda f, y: plain(f, y, contrast_mode=mode), _features(*shape), labels, scale=1 / 0.07)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("all", "one"))
@pytest.mark.parametrize("views", (2, 3))
def test_without_labels(backend, mode, views):
    ours = ff.SupConLoss(0.1, mode, backend=backend)
    assert_agrees(ours, lambda f: plain(f, None, None, 0.1, mode), _features(45, views, 40), scale=10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ("all", "one"))
@pytest.mark.parametrize("kind", ("symmetric", "asymmetric", "weighted"))
def test_mask(backend, mode, kind):
    mask = torch.rand(30, 30) if kind == "weighted" else (torch.rand(30, 30) < 0.2).float()
    mask = ((mask + mask.T) > 0).float() if kind == "symmetric" else mask
    mask.fill_diagonal_(1)
    ours = ff.SupConLoss(0.2, mode, 0.1, backend=backend)
    assert_agrees(
        lambda f: ours(f, mask=mask), lambda f: plain(f, None, mask, 0.2, mode, 0.1), _features(30, 2, 24), scale=5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labelled", (True, False))
def test_learnable_temperature(backend, labelled):
    labels = torch.randint(0, 7, (60,)) if labelled else None
    assert_agrees(
        lambda f, t: ff.functional.sup_con(f, labels, temperature=t, backend=backend),
        lambda f, t: plain(f, labels, temperature=t),
        _features(60, 2, 32),
        torch.tensor(0.1),
        scale=10,
    )


def test_trailing_dimensions_are_flattened():
    features = torch.randn(10, 2, 3, 4)
    features = features / features.flatten(2).norm(dim=2)[..., None, None]
    assert_agrees(ff.SupConLoss(), plain, features, torch.randint(0, 3, (10,)), scale=1 / 0.07)

"""What people write in plain PyTorch, from the published formulas: rivals that no package provides."""

from __future__ import annotations

import torch
from torch import Tensor


def sup_con(features: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """SupContrast's formulation of SupCon (Khosla et al. 2020, L_out), every pair in N x N matrices.

    features (B, V, D) of unit length, labels (B,); the loss is the mean over all B V anchors of minus the mean
    log-probability of their positives. Its steps and their masks of floats are those of the formula as published:
    similarities less their row maximum, exp, both masks, log-probabilities, mean over the positives.
    """
    views = features.shape[1]
    z = features.transpose(0, 1).flatten(0, 1)
    same = (labels[:, None] == labels[None, :]).to(z.dtype).repeat(views, views)
    others = torch.ones_like(same).fill_diagonal_(0)
    positives = same * others
    logits = z @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    normaliser = (torch.exp(logits) * others).sum(1, keepdim=True)
    log_probability = logits - torch.log(normaliser)
    return -((positives * log_probability).sum(1) / positives.sum(1)).mean()


def goodness_normalize(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """ReLU, mean of squares and the normalised output, each as Forward-Forward codes write it: (N,) and (N, D)."""
    h = torch.relu(x)
    goodness = h.pow(2).mean(1)
    return goodness, h / (h.norm(p=2, dim=1, keepdim=True) / h.shape[1] ** 0.5 + eps)


def goodness_normalize_shared(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same with the norm taken from the goodness: one pass less, for those who notice."""
    h = torch.relu(x)
    goodness = h.pow(2).mean(1)
    return goodness, h / (goodness.sqrt()[:, None] + eps)

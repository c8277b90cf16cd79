"""Losses on goodness: what a Forward-Forward layer minimises, given one number a sample.

These touch N numbers, not activations, so plain PyTorch does them; everything large happens in
:mod:`ffcl_fast.functional.goodness`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from .goodness import check_activation, check_number, goodness

OBJECTIVES = ("logistic", "silu", "symba", "two_threshold")


@dataclass(frozen=True)
class TwoThreshold:
    """Constants of Self-Contrastive Forward-Forward's objective; SCFF tunes them for each layer."""

    slope_positive: float = 1.0
    slope_negative: float = 1.0
    threshold_positive: float | None = None  # None: the layer's threshold
    threshold_negative: float | None = None
    penalty: float = 0.0  # lambda, weight of the norm of the positive goodness


def default_threshold(kind: str, width: int) -> float:
    """theta where the user gives none: 2 for a mean of squares, the number of elements for a sum.

    2 is what common PyTorch versions use; a layer's width is a mean square of 1, the value of an activation that
    :func:`goodness_normalize` has normalised.
    """
    return 2.0 if kind == "mean_squares" else float(width)


def goodness_loss(
    g_pos: Tensor,
    g_neg: Tensor,
    objective: str = "logistic",
    threshold: float = 2.0,
    alpha: float = 4.0,
    two_threshold: TwoThreshold | None = None,
) -> Tensor:
    """Loss that raises the goodness of positive samples and lowers that of negative ones.

    With theta the threshold, means over samples:

    - ``"logistic"``: softplus(theta - g_pos) and softplus(g_neg - theta), averaged over all samples of both kinds: the
      binary cross-entropy of Hinton 2022's probability sigmoid(g - theta) that a sample is positive.
    - ``"silu"``: the same with x sigmoid(x) in place of softplus(x), which stops pushing samples far beyond theta.
    - ``"symba"``: softplus(-alpha (g_pos - g_neg)), SymBa; pairs g_pos[i] with g_neg[i] and has no threshold.
    - ``"two_threshold"``: softplus(a (t1 - g_pos)) + softplus(b (g_neg - t2)) + lambda norm(g_pos), Self-Contrastive
      Forward-Forward; each term a mean of its own, the norm divided by the square root of the number of samples so
      that lambda does not depend on the batch.

    Args:
        g_pos, g_neg: (N,) and (M,) goodness of positive and negative samples; N == M for ``"symba"``. Further
            dimensions (groups, positions) count as samples.
        objective: one of the above.
        threshold: theta; see :func:`default_threshold`.
        alpha: SymBa's slope.
        two_threshold: constants of that objective; None for the defaults.

    Returns:
        0-dimensional tensor of the goodness's dtype; NaN where a goodness is infinite or NaN.

    Raises:
        TypeError: no floating-point tensor, or a constant that is no number.
        ValueError: an empty tensor, an unknown objective, or different shapes for ``"symba"``.
    """
    for name, g in (("g_pos", g_pos), ("g_neg", g_neg)):
        check_activation(g, name, dims=1)
    check_number(threshold, "threshold")
    return goodness_loss_over(None, g_pos, g_neg, objective, threshold, alpha, two_threshold)


def goodness_loss_over(
    dim: int | None,
    g_pos: Tensor,
    g_neg: Tensor,
    objective: str,
    threshold: float | Tensor,
    alpha: float,
    two_threshold: TwoThreshold | None,
) -> Tensor:
    """:func:`goodness_loss` of the samples along one dimension, or (None) of all. ``threshold``: checked."""
    _checks.choice("objective", objective, OBJECTIVES)
    check_number(alpha, "alpha")
    if objective == "symba" and g_pos.shape != g_neg.shape:
        raise ValueError(
            f"objective 'symba' compares pairs: g_pos and g_neg must have the same shape; got {tuple(g_pos.shape)}"
            f" and {tuple(g_neg.shape)}"
        )
    if objective == "two_threshold" and two_threshold is not None and not isinstance(two_threshold, TwoThreshold):
        raise TypeError(f"two_threshold must be a TwoThreshold or None; got {type(two_threshold).__name__}")
    samples = [g.numel() if dim is None else g.shape[dim] for g in (g_pos, g_neg)]
    # 0, or NaN where a goodness is not finite: softplus would make a plausible 0 of a positive's infinity.
    nothing = (g_pos.detach() - g_pos.detach()).sum(dim) + (g_neg.detach() - g_neg.detach()).sum(dim)
    if objective in ("logistic", "silu"):
        cost = F.softplus if objective == "logistic" else F.silu
        total = cost(threshold - g_pos).sum(dim) + cost(g_neg - threshold).sum(dim)
        return (total + nothing) / sum(samples)
    if objective == "symba":
        return F.softplus(-alpha * (g_pos - g_neg)).mean(dim) + nothing
    c = two_threshold or TwoThreshold()
    t1 = threshold if c.threshold_positive is None else c.threshold_positive
    t2 = threshold if c.threshold_negative is None else c.threshold_negative
    loss = F.softplus(c.slope_positive * (t1 - g_pos)).mean(dim)
    loss = loss + F.softplus(c.slope_negative * (g_neg - t2)).mean(dim) + nothing
    return loss + c.penalty * g_pos.norm(dim=dim) / samples[0] ** 0.5 if c.penalty else loss


def channel_group_loss(h: Tensor, labels: Tensor, classes: int, *, relu: bool = False, backend: str = "auto") -> Tensor:
    """Softmax cross-entropy over the mean squares of each class's group of channels: CwComp's objective.

    Args:
        h: (N, C, ...) activations, C a multiple of ``classes``; group c is class c's. Pre-activations if ``relu``.
        labels: (N,) integers in [0, classes).
        classes: number of groups.
        relu, backend: as in :func:`ffcl_fast.functional.goodness`.

    Returns:
        0-dimensional float32 tensor. Raises as ``goodness`` does, and ValueError for labels of another shape or, where
        the check needs no device synchronisation (CPU, not under ``torch.compile``), outside [0, classes).
    """
    g = goodness(h, "mean_squares", relu=relu, groups=classes, backend=backend)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.shape != h.shape[:1]:
        raise ValueError(f"labels must have shape {(h.shape[0],)}; got {tuple(labels.shape)}")
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(x) for x in torch.aminmax(labels))
        if least < 0 or most >= classes:
            raise ValueError(f"labels must be in [0, {classes}); got {least if least < 0 else most}")
    return F.cross_entropy(g, labels)


def margin_sup_con(features: Tensor, labels: Tensor, margin: float = 0.0, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss whose positive similarities are min(s + margin, 1): Contrastive FF for ViT.

    A layer's margin says how much closeness of its positives is enough; it rises or falls with depth. A row's loss is
    the mean over its positives j of ``logsumexp over k != i of s_ik / temperature - s_ij / temperature``; rows without
    a positive are left out of the mean (0 if there are none). The margin changes each positive's similarity on its own,
    which no fused kernel does, so this holds the N x N matrix: it is meant for one layer's batch.

    Args:
        features: (N, D) pooled activations of all views, normalised here.
        labels: (N,) integers: rows with equal labels are positives of each other.
        margin: m_l >= 0, in cosine.
        temperature: divides the similarities, > 0.

    Returns:
        0-dimensional float32 tensor (float64 for float64 features).

    Raises:
        TypeError, ValueError: features or labels of the wrong type or shape, a negative margin, a temperature <= 0.
    """
    check_activation(features, "features")
    if features.dim() != 2:
        raise ValueError(f"features must be (N, D); got {tuple(features.shape)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape {(features.shape[0],)}; got {tuple(labels.shape)}")
    check_number(margin, "margin", minimum=0.0)
    check_number(temperature, "temperature")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    with torch.autocast(features.device.type, enabled=False):
        f = F.normalize(features.to(torch.float64 if features.dtype == torch.float64 else torch.float32), dim=1)
        similarity = f @ f.T
    self_pair = torch.eye(f.shape[0], dtype=torch.bool, device=f.device)
    positive = (labels[:, None] == labels[None, :]) & ~self_pair
    logits = torch.where(positive, (similarity + margin).clamp_max(1.0), similarity) / temperature
    log_p = logits - logits.masked_fill(self_pair, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    rows = -torch.where(positive | log_p.isnan(), log_p, 0.0).sum(1) / count.clamp_min(1)
    return rows.sum() / (count > 0).sum().clamp_min(1)

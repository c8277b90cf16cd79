"""Losses on goodness against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import activations

from ffcl_fast import GoodnessLoss, SupConLoss
from ffcl_fast.functional import TwoThreshold, channel_group_loss, goodness, goodness_loss, margin_sup_con


def test_formulas():
    g_pos, g_neg = 5 * torch.rand(7), 5 * torch.rand(4)
    both = torch.cat((g_pos, g_neg))
    positive = torch.tensor([1.0] * 7 + [0.0] * 4)
    close = torch.testing.assert_close
    # Hinton: the binary cross-entropy of "positive", with probability sigmoid(g - theta)
    close(goodness_loss(g_pos, g_neg, "logistic", 1.5), F.binary_cross_entropy_with_logits(both - 1.5, positive))
    margins = torch.cat((1.5 - g_pos, g_neg - 1.5))
    close(goodness_loss(g_pos, g_neg, "silu", 1.5), (margins * margins.sigmoid()).mean())
    pairs = -4 * (g_pos[:4] - g_neg)
    close(goodness_loss(g_pos[:4], g_neg, "symba"), torch.log1p(pairs.exp()).mean())
    close(goodness_loss(g_pos[:4], g_neg, "symba", alpha=2.0), torch.log1p((pairs / 2).exp()).mean())
    two = TwoThreshold(0.5, 2.0, 3.0, 1.0, 0.1)
    expected = F.softplus(0.5 * (3 - g_pos)).mean() + F.softplus(2 * (g_neg - 1)).mean()
    expected = expected + 0.1 * math.sqrt(float(g_pos.square().mean()))
    close(goodness_loss(g_pos, g_neg, "two_threshold", two_threshold=two), expected)
    expected = F.softplus(2 - g_pos).mean() + F.softplus(g_neg - 2).mean()
    close(goodness_loss(g_pos, g_neg, "two_threshold", threshold=2.0), expected)


@pytest.mark.parametrize("objective", ("logistic", "silu", "symba", "two_threshold"))
def test_gradients_push_the_right_way_and_are_right(objective):
    g_pos = torch.rand(5, dtype=torch.float64, requires_grad=True)
    g_neg = torch.rand(5, dtype=torch.float64, requires_grad=True)
    two = TwoThreshold(penalty=0.1)

    def loss(a, b):
        return goodness_loss(a, b, objective, 0.5, two_threshold=two)

    assert torch.autograd.gradcheck(loss, (g_pos, g_neg))
    up, down = torch.autograd.grad(goodness_loss(g_pos, g_neg, objective, 0.5), (g_pos, g_neg))
    assert (up < 0).all() and (down > 0).all()


@pytest.mark.parametrize("kind", ("sum_squares", "mean_squares"))
@pytest.mark.parametrize("relu", (False, True))
def test_goodness_loss_module(kind, relu):
    h_pos = activations(6, 4, 3, 3).requires_grad_()
    h_neg = activations(5, 4, 3, 3).requires_grad_()
    g = [goodness(h, kind, relu=relu) for h in (h_pos, h_neg)]
    theta = 2.0 if kind == "mean_squares" else 36.0
    loss = GoodnessLoss(kind, relu=relu)
    torch.testing.assert_close(loss(h_pos, h_neg), goodness_loss(*g, threshold=theta))
    torch.testing.assert_close(
        GoodnessLoss(kind, threshold=0.7, relu=relu)(h_pos, h_neg), goodness_loss(*g, "logistic", 0.7)
    )
    grads = torch.autograd.grad(loss(h_pos, h_neg), (h_pos, h_neg))

    def eager(h):
        a = (torch.relu(h) if relu else h).square().flatten(1)
        return a.mean(1) if kind == "mean_squares" else a.sum(1)

    expected = torch.autograd.grad(goodness_loss(eager(h_pos), eager(h_neg), threshold=theta), (h_pos, h_neg))
    torch.testing.assert_close(grads, expected)
    assert kind in repr(loss)


def test_channel_groups():
    h, labels = activations(6, 12, 4, 4).requires_grad_(), torch.randint(3, (6,))
    logits = h.square().reshape(6, 3, -1).mean(2)
    loss = channel_group_loss(h, labels.to(torch.int32), 3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    expected = torch.autograd.grad(F.cross_entropy(logits, labels), h)
    torch.testing.assert_close(torch.autograd.grad(loss, h), expected)


def test_margin_sup_con():
    features = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 4, 2])  # 3 and 4 have no positive
    unit = F.normalize(features, dim=1)
    rows = []
    for i in range(10):
        positives = [j for j in range(10) if j != i and labels[j] == labels[i]]
        s = [(unit[i] @ unit[j] + (0.3 if j in positives else 0.0)).clamp(max=1.0 if j in positives else 9.0)
             for j in range(10)]  # fmt: skip
        log_sum = torch.logsumexp(torch.stack([s[j] for j in range(10) if j != i]) / 0.2, 0)
        if positives:
            rows.append(torch.stack([log_sum - s[j] / 0.2 for j in positives]).mean())
    torch.testing.assert_close(margin_sup_con(features, labels, 0.3, 0.2), torch.stack(rows).mean())
    assert torch.autograd.gradcheck(lambda f: margin_sup_con(f, labels, 0.05, 0.2), features)
    plain = SupConLoss(temperature=0.2, base_temperature=0.2)
    views = torch.stack((unit[:5], unit[5:]), 1).float()
    torch.testing.assert_close(
        margin_sup_con(views.transpose(0, 1).reshape(10, 8), labels[:5].repeat(2), 0.0, 0.2), plain(views, labels[:5])
    )
    lonely = margin_sup_con(features, torch.arange(10))
    assert lonely == 0 and torch.autograd.grad(lonely, features)[0].eq(0).all()


def test_bad_arguments():
    g, h = torch.rand(3), torch.randn(3, 4)
    labels = torch.tensor([0, 1, 0])
    for call, error, words in (
        (lambda: goodness_loss(g, g, "hinge"), ValueError, "objective must be one of"),
        (lambda: goodness_loss(g, g[:2], "symba"), ValueError, r"same shape; got \(3,\) and \(2,\)"),
        (lambda: goodness_loss(g[:0], g), ValueError, "g_pos must not be empty"),
        (lambda: goodness_loss(g, g.int()), TypeError, "g_neg"),
        (lambda: goodness_loss(g, g, threshold="2"), TypeError, "threshold must be a number"),
        (lambda: goodness_loss(g, g, alpha=None), TypeError, "alpha must be a number"),
        (lambda: GoodnessLoss("cubes"), ValueError, "goodness must be one of"),
        (lambda: GoodnessLoss(objective="hinge"), ValueError, "objective must be one of"),
        (lambda: GoodnessLoss(backend="gpu"), ValueError, "backend must be one of"),
        (lambda: GoodnessLoss()(h, h[:, :2]), ValueError, "h_pos and h_neg must be activations of one layer"),
        (lambda: GoodnessLoss()(h, h[:0]), ValueError, "h_neg must not be empty"),
        (lambda: channel_group_loss(h, labels[:2], 2), ValueError, r"labels must have shape \(3,\)"),
        (lambda: channel_group_loss(h, labels, 3), ValueError, "groups must divide"),
        (lambda: channel_group_loss(h, [0, 1, 0], 2), TypeError, "labels must be a tensor; got list"),
        (lambda: goodness_loss(g, g, "two_threshold", two_threshold=3), TypeError, "two_threshold must be a TwoThresh"),
        (lambda: margin_sup_con(h, [0, 1, 0]), TypeError, "labels must be a tensor; got list"),
        (lambda: margin_sup_con(h, labels[:2]), ValueError, "labels must have shape"),
        (lambda: margin_sup_con(h[:, :, None], labels), ValueError, r"features must be \(N, D\)"),
        (lambda: margin_sup_con(h, labels, -0.1), ValueError, "margin must be at least 0"),
        (lambda: margin_sup_con(h, labels, temperature=0.0), ValueError, "temperature must be positive"),
    ):
        with pytest.raises(error, match=words):
            call()

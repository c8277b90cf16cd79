"""The truth against formulas written out with Python loops and against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import MODES, eager, problem

from ffcl_fast import ops, reference


def _left_out(mode, i, j, row_ids, col_ids):
    if mode in ("none", "diagonal"):
        return mode == "diagonal" and i == j
    same = bool(row_ids[i] == col_ids[j])
    return {"same_id": same, "same_id_off_diagonal": same and i != j, "different_id": not same}[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", (False, True))
def test_similarity_by_loops(mode, symmetric):
    arguments = problem(7, 5, 3, torch.float64, MODES[mode], symmetric, 2.0, "raw")
    q, k, scale, row_ids, col_ids, _ = arguments
    other, other_ids = (q, row_ids) if symmetric else (k, col_ids)
    row, col, cache = reference.similarity_forward(*arguments, True, True)
    s = {
        (i, j): float(scale) * sum(float(a) * float(b) for a, b in zip(q[i], other[j], strict=True))
        for i in range(len(q))
        for j in range(len(other))
        if not _left_out(mode, i, j, row_ids, other_ids)
    }
    for i in range(len(q)):
        total = sum(math.exp(v) for (a, _), v in s.items() if a == i)
        assert float(row[i]) == pytest.approx(math.log(total) if total else -math.inf)
    assert col.numel() == (0 if symmetric else len(other)) and not cache.numel()
    for j in range(col.numel()):
        total = sum(math.exp(v) for (_, b), v in s.items() if b == j)
        assert float(col[j]) == pytest.approx(math.log(total) if total else -math.inf)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", (False, True))
def test_gradients_are_autograd_s(mode, symmetric):
    arguments = problem(9, 6, 4, torch.float64, MODES[mode], symmetric, 2.0, "raw")
    row, col, cache = reference.similarity_forward(*arguments, True, True)
    row_grad, col_grad = torch.randn_like(row), torch.randn_like(col)
    dq, dk = reference.similarity_backward(*arguments, row, col, row_grad, col_grad, cache, True, True)
    _, _, expected_dq, expected_dk = eager(*arguments, row_grad, col_grad)
    if row.isfinite().all() and col.isfinite().all():  # autograd has no gradient where every pair is left out
        torch.testing.assert_close(dq, expected_dq)
        torch.testing.assert_close(dk, expected_dk)
    assert dq.isfinite().all() and dk.isfinite().all()


@pytest.mark.parametrize("positives", (True, False))
def test_siglip_by_autograd(positives):
    q, k = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -2.0))
    z = (2 * torch.eye(6) if positives else 0) - torch.ones(6, 6)
    expected = -F.logsigmoid(z * (scale * q @ k.T + bias)).sum()
    expected.backward()
    loss, dq, dk, dbias = reference.siglip(q.detach(), k.detach(), scale.detach(), bias.detach(), positives, True, True)
    for a, b in zip((loss, dq, dk, dbias), (expected.detach(), q.grad, k.grad, bias.grad), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close((q.detach() * dq).sum() / scale.detach(), scale.grad)


@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("pairing", (ops.POSITIVE_GIVEN, ops.POSITIVE_STACKED, ops.POSITIVE_INTERLEAVED))
def test_positives(pairing, decoupled):
    """Against autograd of the definition, for normalisers that are constants."""
    q, other = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    row_lse, col_lse, grad = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    partner = {0: other, 1: torch.cat((q[3:], q[:3])), 2: q.view(3, 2, 5).flip(1).reshape(6, 5)}[pairing]
    given = other.detach() if pairing == ops.POSITIVE_GIVEN else None
    logit = scale * (q * partner).sum(1)
    activation = (lambda x: x) if decoupled else torch.nn.functional.softplus
    expected = activation(row_lse - logit) + activation(col_lse - logit)
    leaves = (q, scale, other) if given is not None else (q, scale)
    dq, dscale, *rest = torch.autograd.grad((expected * grad).sum(), leaves)

    head = q.detach(), given, scale.detach()
    loss, slope, col_slope, logits = reference.positive_odds(*head, row_lse, col_lse, pairing, decoupled)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits, logit.detach())
    changed = torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6 if rest else 0, 5, dtype=torch.float64)
    inner = reference.add_positives_(*head, grad, slope, col_slope, logits, *changed, pairing)
    torch.testing.assert_close(changed[0], dq)
    torch.testing.assert_close(inner.sum() / scale.detach(), dscale)
    if rest:
        torch.testing.assert_close(changed[1], rest[0])
    before = torch.randn(6, 5, dtype=torch.float64)  # the normalisers' part, which the scale's gradient is made of
    again = reference.add_positives_(*head, grad, slope, col_slope, logits, before.clone(), changed[1], pairing)
    share = (again - inner).sum()
    torch.testing.assert_close(share, (q.detach() * before).sum() * (1.0 if rest else 0.5))


def test_class_positives_are_what_autograd_makes_of_the_formula():
    q = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 3, 0, 1, 3, 0, 4, 1, 0])  # four, two, two, one row and a class without any
    row_lse, grad = (torch.randn(9, dtype=torch.float64) for _ in range(2))
    same = (group[:, None] == group) & ~torch.eye(9, dtype=torch.bool)
    number = same.sum(1)
    logit = scale * ((q @ q.T) * same).sum(1) / number.clamp_min(1)
    x = row_lse - logit
    expected = torch.where(number == 0, 0.0, torch.where(number == 1, torch.nn.functional.softplus(x), x))
    dq, dscale = torch.autograd.grad((expected * grad).sum(), (q, scale))

    q, scale = q.detach(), scale.detach()
    sums, counts = reference.class_sums(q, group, None, 5)
    assert counts.tolist() == [4, 2, 0, 2, 1]
    loss, slope, logits = reference.class_odds(q, sums, counts, group, scale, row_lse)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits, logit.detach())
    share = grad * slope
    taken, _ = reference.class_sums(q, group, share, 5)
    of_positives = sums, taken, counts, group, scale, share, logits
    found, inner = reference.add_class_positives(q, *of_positives, torch.zeros_like(q))
    torch.testing.assert_close(found, dq)
    torch.testing.assert_close(inner.sum() / scale, dscale)
    before = torch.randn(9, 5, dtype=torch.float64)
    again, more = reference.add_class_positives(q, *of_positives, before)
    torch.testing.assert_close(again - before, dq)
    torch.testing.assert_close((more - inner).sum(), (q * before).sum() / 2)

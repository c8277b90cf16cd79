"""Sums of rows by class in fixed point, which a GPU takes, against float64; and that their order does not matter."""

from __future__ import annotations

import pytest
import torch

from ffcl_fast.functional.class_sums import class_sums, fixed_point_sums


@pytest.mark.parametrize("size", (1.0, 1e-30, 1e30))
@pytest.mark.parametrize("shape", ((1, 1, 1), (700, 5, 3), (5000, 33, 2)), ids=str)
def test_fixed_point(shape, size):
    rows, width, classes = shape
    x, group = torch.randn(rows, width) * size, torch.randint(classes + 2, (rows,))
    found = fixed_point_sums(x, group, classes + 2)
    exact = class_sums(x.double(), group, classes + 2)
    # Half a unit in the last place of a float32 of this size: nothing is lost on the way.
    torch.testing.assert_close(found.double(), exact, rtol=2**-24, atol=float(x.abs().max()) * 2.0**-40)
    order = torch.randperm(rows)
    assert torch.equal(found, fixed_point_sums(x[order], group[order], classes + 2))


def test_what_is_not_finite_stays_in_its_class():
    x, group = torch.randn(60, 4), torch.arange(60) % 6
    x[1, 2], x[8, 0], x[14, 3] = torch.nan, torch.inf, -torch.inf
    found = fixed_point_sums(x, group, 6)
    assert found[[1, 2]].isnan().all() and found[[0, 3, 4, 5]].isfinite().all()
    assert not fixed_point_sums(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2).any()


def test_sup_con_is_the_same_by_either_sum(monkeypatch):
    from ffcl_fast.functional import contrastive

    features = torch.nn.functional.normalize(torch.randn(30, 2, 16), dim=2).requires_grad_()
    labels = torch.randint(4, (30,))

    def both():
        loss = contrastive.sup_con(features, labels, backend="panels")
        return loss, torch.autograd.grad(loss, features)[0]

    expected = both()
    monkeypatch.setattr(contrastive, "class_sums", fixed_point_sums)
    torch.testing.assert_close(both(), expected, rtol=1e-5, atol=1e-7)

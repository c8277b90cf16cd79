"""Sums of rows by class in fixed point, which a GPU takes, against float64; and that their order does not matter."""

from __future__ import annotations

import pytest
import torch
from drawing import drawn, sizes, tensors, widths
from hypothesis import given
from hypothesis import strategies as st

from ffcl_fast.functional import contrastive
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


@given(st.data(), sizes, widths, st.integers(1, 9), st.sampled_from((0, -149, -120, 60, 124)), st.booleans())
@drawn
def test_fixed_point_of_any_rows(data, rows, width, classes, power, mixed):
    """Any memory layout and size, rows of different sizes, classes without a row: a rounding for each row added, of the
    largest element's, and the last one to float32; the same bits in any order."""
    (x,) = data.draw(tensors((rows, width), dtype=torch.float32))
    x = x * 2.0**power
    x = x * 2.0 ** -(torch.arange(rows) % 40)[:, None] if mixed else x
    group = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)))
    found, exact = fixed_point_sums(x, group, classes), class_sums(x.double(), group, classes)
    lost = rows * float(x.abs().max()) * 2.0 ** (rows.bit_length() - 62)
    bound = exact.abs() * 2.0**-24 + lost + 2.0**-149
    assert found.dtype == torch.float32 and bool(((found.double() - exact).abs() <= bound).all())
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    assert torch.equal(found, fixed_point_sums(x[order], group[order], classes))


def test_sup_con_compiles_for_any_number_of_rows(monkeypatch):
    """As a GPU runs it, with the sums that eager mode makes, and arguments left at their defaults."""
    monkeypatch.setattr(contrastive, "class_sums", fixed_point_sums)
    compiled = torch.compile(
        lambda z, labels: contrastive.sup_con(z, labels, backend="panels"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows, stance in ((20, "default"), (33, "fail_on_recompile")):
        z = torch.nn.functional.normalize(torch.randn(rows, 2, 6), dim=2).requires_grad_()
        labels = torch.randint(4, (rows,))
        with torch.compiler.set_stance(stance):
            found = compiled(z, labels)
            (gradient,) = torch.autograd.grad(found, z)
        expected = contrastive.sup_con(z, labels, backend="panels")
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_what_is_not_finite_stays_in_its_class():
    x, group = torch.randn(60, 4), torch.arange(60) % 6
    x[1, 2], x[8, 0], x[14, 3] = torch.nan, torch.inf, -torch.inf
    found = fixed_point_sums(x, group, 6)
    assert found[[1, 2]].isnan().all() and found[[0, 3, 4, 5]].isfinite().all()
    assert not fixed_point_sums(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2).any()


def test_sup_con_is_the_same_by_either_sum(monkeypatch):
    features = torch.nn.functional.normalize(torch.randn(30, 2, 16), dim=2).requires_grad_()
    labels = torch.randint(4, (30,))

    def both():
        loss = contrastive.sup_con(features, labels, backend="panels")
        return loss, torch.autograd.grad(loss, features)[0]

    expected = both()
    monkeypatch.setattr(contrastive, "class_sums", fixed_point_sums)
    torch.testing.assert_close(both(), expected, rtol=1e-5, atol=1e-7)

"""Triton's kernels for the positives of a contrast against float64, under the interpreter: `make test-triton`."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.compiled_autograd as _compiled_autograd
from drawing import drawn, dtypes, sizes, tensors, widths
from goodness_cases import DTYPES
from gpu_cases import unit
from guards import guarded, inside_nan  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from positives_cases import check_class_positives, check_positives

from ffcl_fast import functional, ops

OPS = torch.ops.ffcl_fast
pytestmark = pytest.mark.usefixtures("guarded")
SHAPES = ((2, 1), (6, 3), (34, 96), (8, 200), (4, 1000), (2, 4096))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_positives(shape, dtype):
    for pairing in (ops.POSITIVE_GIVEN, ops.POSITIVE_STACKED, ops.POSITIVE_INTERLEAVED):
        q = inside_nan(unit(*shape, dtype), 8)
        positive = None if pairing else inside_nan(unit(*shape, dtype), 3)
        check_positives(q, positive, pairing, both=not pairing, decoupled=bool(torch.rand(()) < 0.3))


@given(st.data(), sizes, widths, dtypes, st.sampled_from((0, 1, 2)), st.booleans(), st.booleans())
@drawn
def test_positives_of_any_shape_and_layout(data, n, d, dtype, pairing, both, decoupled):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    rows = n if pairing == ops.POSITIVE_GIVEN else 2 * n
    q, *positive = data.draw(tensors((rows, d), *[(rows, d)] * (not pairing), dtype=dtype, unit=True))
    check_positives(q, positive[0] if positive else None, pairing, both and not pairing, decoupled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_classes(shape, dtype):
    for classes in (1, 3, shape[0]):
        check_class_positives(inside_nan(unit(*shape, dtype), 8), torch.randint(classes, shape[:1]), classes)


@given(st.data(), sizes, widths, dtypes, st.integers(1, 9))
@drawn
def test_classes_of_any_shape_and_layout(data, n, d, dtype, classes):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    (q,) = data.draw(tensors((n, d), dtype=dtype, unit=True))
    check_class_positives(q, torch.randint(classes, (n,)), classes)


@pytest.mark.parametrize("size", (1e-42, 1e-30, 1e30))
def test_class_sums_of_any_size(size):
    x, group = torch.randn(50, 7) * size, torch.randint(4, (50,))
    (sums, _), (expected, _) = (OPS.class_sums(x, group, None, 4, b) for b in ("triton", "reference"))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=50 * size * 2.0**-22)
    order = torch.randperm(50)
    assert torch.equal(sums, OPS.class_sums(x[order], group[order], None, 4, "triton")[0])


@pytest.mark.parametrize("group", (torch.arange(12) % 3, (torch.arange(12) // 4 + 1) % 3), ids=("apart", "neighbours"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_values_that_are_not_finite_stay_in_their_classes(value, group):
    x = torch.randn(12, 33)
    x[int(torch.nonzero(group == 1)[-1]), 7] = value  # the second of two neighbours
    sums, counts = OPS.class_sums(x, group, None, 3, "triton")
    assert sums[1].isnan().all() and sums[[0, 2]].isfinite().all() and counts.tolist() == [4, 4, 4]
    loss, slope, _ = OPS.class_odds(x, sums, counts, group, torch.tensor(2.0), torch.randn(12), "triton")
    assert torch.equal(loss.isnan(), group == 1) and slope[group != 1].isfinite().all()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_values_that_are_not_finite_stay_in_their_rows(value):
    q, positive = torch.randn(4, 33), torch.randn(4, 33)
    q[2, 5] = value
    head = q, positive, torch.tensor(5.0), torch.randn(4), torch.randn(4)
    loss, slope, col_slope, logit = OPS.positive_odds(*head, ops.POSITIVE_GIVEN, False, "triton")
    for x in (loss, slope):
        assert x[2].isnan() and x[[0, 1, 3]].isfinite().all()
    assert not logit[2].isfinite()


def test_small_losses_keep_their_digits_and_large_ones_do_not_overflow():
    q = torch.ones(6, 1)
    row_lse = torch.tensor([-80.0, -30.0, 0.0, 30.0, 1000.0, -torch.inf])
    expected = torch.nn.functional.softplus(row_lse.double() - 1, threshold=50)
    head = q, q, torch.tensor(1.0), row_lse, row_lse[:0], ops.POSITIVE_GIVEN
    loss, slope, _, _ = OPS.positive_odds(*head, False, "triton")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), torch.sigmoid(row_lse.double() - 1), rtol=1e-6, atol=0)
    loss, slope, _, _ = OPS.positive_odds(*head, True, "triton")
    assert loss.tolist() == [-81, -31, -1, 29, 999, 0] and slope.tolist() == [1, 1, 1, 1, 1, 0]


LOSSES = {
    "clip": lambda x, y, t, b: functional.clip(x, y, 1 / t, backend=b),
    "info_nce": lambda x, y, t, b: functional.info_nce(x, y, temperature=t, backend=b),
    "queue": lambda x, y, t, b: functional.info_nce(x, y, y.flip(0)[:7] + 0.1, temperature=t, backend=b),
    "nt_xent": lambda x, y, t, b: functional.nt_xent(x, y, t, backend=b),
    "decoupled": lambda x, y, t, b: functional.nt_xent(x, y, t, decoupled=True, backend=b),
    "sup_con": lambda x, y, t, b: functional.sup_con(torch.stack((x, y), 1), temperature=t, backend=b),
    "sup_con, labels": lambda x, y, t, b: functional.sup_con(
        torch.stack((x, y), 1), torch.arange(len(x)) // 2, temperature=t, backend=b
    ),
    "sup_con, one view": lambda x, y, t, b: functional.sup_con(
        torch.cat((x, y))[:, None], torch.arange(2 * len(x)) // 3, temperature=t, backend=b
    ),
    "sup_con, three views": lambda x, y, t, b: functional.sup_con(torch.stack((x, y, y), 1), temperature=t, backend=b),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_plain_pytorch(name):
    leaves = [torch.nn.functional.normalize(torch.randn(9, 20), dim=1).requires_grad_() for _ in range(2)]
    leaves.append(torch.tensor(0.3, requires_grad=True))
    results = []
    for backend in ("triton", "panels"):
        loss = LOSSES[name](*leaves, backend)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", ((0,), (1,), (2,)), ids=str)
def test_only_what_is_asked_for(wanted):
    leaves = [torch.nn.functional.normalize(torch.randn(9, 20), dim=1), torch.randn(9, 20), torch.tensor(3.0)]
    for i in wanted:
        leaves[i].requires_grad_()
    for loss in (functional.clip, lambda x, y, s, backend: functional.info_nce(x, y, x + y, 1 / s, backend=backend)):
        found, truth = (
            torch.autograd.grad(loss(*leaves, backend=b), [leaves[i] for i in wanted]) for b in ("triton", "panels")
        )
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares storage offsets, which guards change
    q, positive, lse = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6)
    head = q, positive, torch.tensor(2.0)
    torch.library.opcheck(OPS.positive_odds.default, (*head, lse, lse + 1, ops.POSITIVE_GIVEN, False, "triton"))
    rest = lse, lse, lse, lse, torch.randn(6, 8), torch.randn(6, 8), ops.POSITIVE_GIVEN, "triton"
    torch.library.opcheck(OPS.add_positives_.default, (*head, *rest))


def test_opcheck_of_classes(monkeypatch):
    monkeypatch.undo()
    q, group, lse = torch.randn(6, 8), torch.arange(6) % 2, torch.randn(6)
    torch.library.opcheck(OPS.class_sums.default, (q, group, lse, 2, "triton"))
    sums, counts = OPS.class_sums(q, group, None, 2, "triton")
    torch.library.opcheck(OPS.class_odds.default, (q, sums, counts, group, torch.tensor(2.0), lse, "triton"))
    rest = group, torch.tensor(2.0), lse, lse, torch.randn(6, 8), "triton"
    torch.library.opcheck(OPS.add_class_positives.default, (q, sums, sums, counts, *rest))


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_gives_the_same_gradients_however_it_is_asked(name):
    """Twice, for several incoming gradients at once, and under compiled autograd."""
    x, y = (torch.nn.functional.normalize(torch.randn(8, 20), dim=1).requires_grad_() for _ in range(2))
    loss = LOSSES[name](x, y, 0.3, "triton")
    first, again = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    several = torch.autograd.grad(loss, (x, y), torch.tensor([1.0, 2.0]), retain_graph=True, is_grads_batched=True)
    traced = first
    if name not in ("info_nce", "queue"):  # there PyTorch's own tracing fails, whatever the backend
        with _compiled_autograd._enable(torch.compile(backend="eager")):
            traced = torch.autograd.grad(loss, (x, y), retain_graph=True)
    for a, b, c, d in zip(first, again, several, traced, strict=True):
        assert torch.equal(a, b)
        for found in (c[0], c[1] / 2, d):
            torch.testing.assert_close(found, a, rtol=1e-5, atol=1e-7)


def test_what_the_operators_refuse():
    q, lse = torch.randn(5, 8), torch.randn(5)
    for pairing in (ops.POSITIVE_STACKED, ops.POSITIVE_INTERLEAVED):
        with pytest.raises(ValueError, match="come in pairs; got 5 rows"):
            OPS.positive_odds(q, None, torch.tensor(2.0), lse, lse[:0], pairing, False, "triton")
    with pytest.raises(ValueError, match="must be contiguous"):
        turned, rest = torch.randn(8, 5).T, (lse, lse, lse[:0], lse)
        OPS.add_positives_(q, q, torch.tensor(2.0), *rest, turned, q[:0], ops.POSITIVE_GIVEN, "triton")

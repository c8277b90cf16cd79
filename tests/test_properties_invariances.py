"""What must not change a loss: the order of rows, lengths before a normalisation, swapped sides, parts of a batch."""

from __future__ import annotations

import pytest
import torch
from drawing import drawn, sizes, tensors, widths
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ffcl_fast.functional as fn
from ffcl_fast import ops

SYMMETRIC = {
    "clip": lambda x, y: fn.clip(x, y, 14.0),
    "siglip": lambda x, y: fn.siglip(x, y, 10.0, -5.0),
    "nt_xent": lambda x, y: fn.nt_xent(x, y, 0.1),
    "pair_cosine": lambda x, y: fn.pair_cosine(x, y, torch.ones(len(x))),
}
NORMALISED = {
    "info_nce": lambda x, y: fn.info_nce(x, y),
    "nt_xent": lambda x, y: fn.nt_xent(x, y),
    "pair_cosine": lambda x, y: fn.pair_cosine(x, y, torch.ones(len(x))),
    "lse": lambda x, y: fn.similarity_lse(x, y, 9.0, normalize=True)[1].mean(),
}
EVERY = {
    **SYMMETRIC,
    **NORMALISED,
    "sup_con": lambda x, y: fn.sup_con(torch.stack((x, y), 1)),
    "goodness": lambda x, y: fn.goodness(x).mean() + fn.goodness(y, "mean_squares").mean(),
}


def _same(a: Tensor, b: Tensor, more: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 + more)


def _unit(data, n, d) -> list[Tensor]:
    return data.draw(tensors((n, d), (n, d), dtype=torch.float32, unit=True))


@pytest.mark.parametrize("name", EVERY)
@given(st.data(), st.integers(2, 130), widths)
@drawn
def test_the_order_of_rows_does_not_matter(name, data, n, d):
    x, y = _unit(data, n, d)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    _same(EVERY[name](x, y), EVERY[name](x[order], y[order]))


@pytest.mark.parametrize("name", NORMALISED)
@given(st.data(), sizes, st.integers(2, 70), st.sampled_from((1e-3, 0.5, 7.0, 1e4)))
@drawn
def test_the_length_of_rows_does_not_matter_before_a_normalisation(name, data, n, d, factor):
    x, y = _unit(data, n, d)
    lengths = factor * (0.5 + torch.arange(n)[:, None] / n)
    short = min(1.0, 0.5 / factor) ** 2  # squared length of the shortest row, or less
    eps = ops.PAIR_COSINE_EPS / short if name == "pair_cosine" else 0.0  # which PyTorch's formula adds to it
    _same(NORMALISED[name](x, y), NORMALISED[name](x * lengths, y / lengths), eps)


@pytest.mark.parametrize("name", SYMMETRIC)
@given(st.data(), sizes, widths)
@drawn
def test_the_sides_of_a_symmetric_loss_can_be_swapped(name, data, n, d):
    x, y = (t.contiguous().requires_grad_() for t in _unit(data, n, d))
    one, two = SYMMETRIC[name](x, y), SYMMETRIC[name](y, x)
    _same(one, two)
    for a, b in zip(torch.autograd.grad(one, (x, y)), torch.autograd.grad(two, (x, y)), strict=True):
        _same(a, b)


@given(st.data(), st.integers(2, 130), sizes, widths, st.integers(1, 4))
@drawn
def test_ranks_with_parts_of_the_rows_make_the_whole(data, n, m, d, ranks):
    """What the losses across processes rest on: rows are local, columns add up, gradients of the keys too."""
    q, k = (t.contiguous().requires_grad_() for t in data.draw(tensors((n, d), (m, d), dtype=torch.float32, unit=True)))
    row, col = fn.similarity_lse(q, k, 20.0)
    whole = torch.autograd.grad(row.sum() + col.sum(), (q, k))
    parts = [fn.similarity_lse(part, k, 20.0) for part in q.tensor_split(min(ranks, n))]
    rows, columns = zip(*parts, strict=True)
    _same(torch.cat(rows), row)
    together = torch.stack(columns).logsumexp(0)
    _same(together, col)
    for a, b in zip(torch.autograd.grad(torch.cat(rows).sum() + together.sum(), (q, k)), whole, strict=True):
        _same(a, b)

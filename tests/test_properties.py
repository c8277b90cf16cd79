"""Every function and module on drawn shapes, dtypes, strides, scales, ids and reductions, against float64; invariances.

In `make test` the draws are the same on every run, so that it cannot fail by chance; `FFCL_EXAMPLES=100` (in
`make test-long`) draws that many others for each test.
"""

from __future__ import annotations

import os

import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ffcl_fast
import ffcl_fast.functional as fn
from ffcl_fast import ops
from ffcl_fast.functional.similarity import EXCLUDE
from ffcl_fast.reference import similarity_matrix

EXAMPLES = int(os.environ.get("FFCL_EXAMPLES", "0"))
_health = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
drawn = settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=_health,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "every second", "inside", "expanded")


@st.composite
def tensors(draw: st.DrawFn, *shapes: tuple[int, ...], dtype: torch.dtype, unit: bool = False) -> list[Tensor]:
    """Random tensors of these shapes in any memory layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (F.normalize(x, dim=-1) if unit else x).to(dtype)
        layout = draw(st.sampled_from(LAYOUTS))
        if layout == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "every second":
            wide = x.new_full((*shape[:-1], 2 * shape[-1]), torch.nan)
            wide[..., ::2] = x
            x = wide[..., ::2]
        elif layout == "inside":
            wide = x.new_full((*shape[:-1], shape[-1] + 5), torch.nan)
            wide[..., 2:-3] = x
            x = wide[..., 2:-3]
        elif layout == "expanded":
            x = x[:1].expand(shape)
        found.append(x)
    return found


def terms_of(inputs: list[Tensor], scale: float, share: float = 1.0) -> float:
    """The size of a term of a gradient through a normalisation: of ``scale`` times a unit row, over a row's length."""
    shortest = min(float(x.detach().double().norm(dim=-1).min()) for x in inputs if x.dim() > 1)
    return scale * share / (max(shortest, 1e-6) * inputs[0].shape[-1] ** 0.5)


sizes = st.one_of(st.integers(1, 4), st.integers(5, 40), st.sampled_from((95, 96, 97, 130)))
widths = st.one_of(st.integers(1, 4), st.integers(5, 70), st.sampled_from((127, 128, 129, 384)))
dtypes = st.sampled_from(DTYPES)
scales = st.sampled_from((0.1, 1.0, 5.0, 14.0, 50.0, 100.0))


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from(list(EXCLUDE)), st.booleans(), st.booleans())
@drawn
def test_similarity_lse(data, n, m, d, dtype, scale, exclude, normalize, symmetric):
    inputs = data.draw(tensors((n, d), *[] if symmetric else [(m, d)], dtype=dtype, unit=not normalize))
    ids = [torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=r, max_size=r))) for r in (n, m)]
    ids = [None, None] if exclude in (None, "diagonal") else ids
    col_ids = ids[0] if symmetric else ids[1]

    def ours(q, k=None):
        options = {"normalize": normalize, "row_ids": ids[0], "col_ids": None if symmetric else ids[1]}
        row, col = fn.similarity_lse(q, k, scale, exclude=exclude, **options)
        return row if symmetric else torch.cat((row, col))

    def written_out(q, k=None):
        k = q if k is None else k
        q, k = (F.normalize(x, dim=1, eps=1e-12) if normalize else x for x in (q, k))
        s = similarity_matrix(q, k, torch.tensor(scale, dtype=q.dtype), ids[0], col_ids, EXCLUDE[exclude])
        return s.logsumexp(1) if symmetric else torch.cat((s.logsumexp(1), s.logsumexp(0)))

    terms = 4 * terms_of(inputs, scale) if normalize else 4 * scale / d**0.5
    plain.agree(ours, written_out, inputs, scale, terms)


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from(("own", "unpaired", "paired")), st.booleans(),
       st.booleans(), st.sampled_from(("mean", "sum", "none")))  # fmt: skip
@drawn
def test_info_nce(data, n, m, d, dtype, scale, negatives, with_ids, decoupled, reduction):
    more = {"own": [], "unpaired": [(m, d)], "paired": [(n, min(m, 9), d)]}[negatives]
    inputs = data.draw(tensors((n, d), (n, d), *more, dtype=dtype))
    with_ids = with_ids and negatives != "paired"
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) if with_ids else None
    other = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m))) if with_ids else None
    other = None if negatives == "own" else other

    def ours(x, y, z=None):
        mode = "paired" if negatives == "paired" else "unpaired"
        if with_ids or decoupled:
            options = {"ids": ids, "negative_ids": other, "decoupled": decoupled}
            return fn.info_nce(x, y, z, 1 / scale, reduction, mode, **options)
        return ffcl_fast.InfoNCELoss(1 / scale, reduction, mode)(x, y, z)

    def written_out(x, y, z=None):
        rows = plain.info_nce(x, y, z, 1 / scale, ids, other, decoupled)
        return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()

    terms = terms_of(inputs, scale, 1 / n if reduction == "mean" else 1.0)
    plain.agree(ours, written_out, inputs, scale * (n if reduction == "sum" else 1), terms)


@given(st.data(), sizes, widths, dtypes, scales, st.booleans(), st.booleans(), st.sampled_from(("mean", "sum", "none")))
@drawn
def test_nt_xent(data, n, d, dtype, scale, with_ids, decoupled, reduction):
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) if with_ids else None

    def ours(x, y):
        if with_ids or decoupled or reduction != "mean":
            return fn.nt_xent(x, y, 1 / scale, ids=ids, decoupled=decoupled, reduction=reduction)
        return ffcl_fast.NTXentLoss(1 / scale)(x, y)

    def written_out(x, y):
        rows = plain.nt_xent(x, y, 1 / scale, ids, decoupled)
        return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()

    terms = terms_of(inputs, scale, 1 / n if reduction == "mean" else 1.0)
    plain.agree(ours, written_out, inputs, scale * (2 * n if reduction == "sum" else 1), terms)


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from(("mean", "sum", "none")))
@drawn
def test_nt_xent_with_a_bank(data, n, m, d, dtype, scale, reduction):
    """The function with constant negatives, and the module, whose bank takes the second view in after the loss."""
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype))
    bank = F.normalize(torch.randn(m, d, dtype=torch.float64), dim=1).to(dtype)
    module = ffcl_fast.NTXentLoss(1 / scale, memory_bank_size=(m, d))

    def ours(x, y):
        if reduction != "mean":
            return fn.nt_xent(x, y, 1 / scale, bank, reduction=reduction)
        with torch.no_grad():
            module.memory_bank.bank.copy_(bank)
        return module(x, y)

    def written_out(x, y):
        rows = plain.info_nce(x, y, bank.to(x.dtype), 1 / scale, unit_negatives=True)
        return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()

    terms = terms_of(inputs, scale, 1 / n if reduction == "mean" else 1.0)
    plain.agree(ours, written_out, inputs, scale * (n if reduction == "sum" else 1), terms)


@given(st.data(), sizes, st.integers(1, 3), widths, dtypes, scales, st.integers(1, 6), st.booleans())
@drawn
def test_sup_con(data, n, views, d, dtype, scale, classes, one):
    inputs = data.draw(tensors((n, views, d), dtype=dtype, unit=True))
    labels = torch.tensor(data.draw(st.lists(st.integers(1, classes), min_size=n, max_size=n)))
    module = ffcl_fast.SupConLoss(1 / scale, "one" if one else "all")
    written_out = lambda x: plain.sup_con(x, labels, 1 / scale, one)  # noqa: E731
    plain.agree(lambda x: module(x, labels), written_out, inputs, 1 / 0.07, 1 / 0.07 / (n * views * d**0.5))


@given(st.data(), sizes, widths, dtypes, scales, st.booleans())
@drawn
def test_clip(data, n, d, dtype, scale, with_ids):
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype, unit=True)) + [torch.tensor(scale)]
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) if with_ids else None
    ours = (lambda x, y, s: fn.clip(x, y, s, ids=ids)) if with_ids else ffcl_fast.ClipLoss()
    written_out = lambda x, y, s: plain.clip(x, y, s.to(x.dtype), ids)  # noqa: E731
    plain.agree(ours, written_out, inputs, scale, scale / (n * d**0.5), 1 / d**0.5)  # the cosines


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from((-10.0, -1.0, 0.0, 2.0)), st.booleans())
@drawn
def test_siglip(data, n, m, d, dtype, scale, bias, negative_only):
    m = m if negative_only else n
    inputs = data.draw(tensors((n, d), (m, d), dtype=dtype, unit=True)) + [torch.tensor(scale), torch.tensor(bias)]
    if negative_only:
        ours = lambda x, y, s, b: fn.siglip(x, y, s, b, negative_only=True)  # noqa: E731
    else:
        ours = ffcl_fast.SigLipLoss()
    written_out = lambda x, y, s, b: plain.siglip(x, y, s.to(x.dtype), b.to(x.dtype), negative_only)  # noqa: E731
    plain.agree(ours, written_out, inputs, scale * m, scale / n, m / d**0.5)


shapes_of_maps = st.one_of(
    st.tuples(sizes, widths), st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 9), st.integers(1, 9))
)


@given(st.data(), shapes_of_maps, dtypes, st.booleans(), st.booleans())
@drawn
def test_goodness_and_its_normalisation(data, shape, dtype, mean, relu):
    inputs = data.draw(tensors(shape, dtype=dtype))
    kind = "mean_squares" if mean else "sum_squares"
    wanted = lambda h: plain.goodness(h, mean, relu)  # noqa: E731
    plain.agree(lambda h: fn.goodness(h, kind, relu=relu), wanted, inputs, 1.0, 1.0)
    wanted = lambda h: plain.normalize(h, relu=relu)  # noqa: E731
    # one positive element in a row is divided by its own size: what is left of its gradient is a difference
    plain.agree(lambda h: fn.goodness_normalize(h, relu=relu), wanted, inputs, 1.0, 10.0)
    if len(shape) > 2:
        wanted = lambda h: plain.pooled(h, relu)  # noqa: E731
        plain.agree(lambda h: fn.pool_goodness(h, kind, relu=relu)[1], wanted, inputs, 1.0, 2.0 / (shape[2] * shape[3]))
        wanted = lambda h: plain.goodness(plain.pooled(h, relu), mean)  # noqa: E731
        plain.agree(lambda h: fn.pool_goodness(h, kind, relu=relu)[0], wanted, inputs, 1.0, 2.0 / (shape[2] * shape[3]))


@given(st.data(), shapes_of_maps, dtypes, st.booleans(), st.floats(-0.5, 0.5), st.sampled_from(("mean", "sum", "none")))
@drawn
def test_pair_cosine(data, shape, dtype, relu, margin, reduction):
    inputs = data.draw(tensors(shape, shape, dtype=dtype))
    n = shape[0]
    target = torch.tensor(data.draw(st.lists(st.sampled_from((1.0, -1.0)), min_size=n, max_size=n)))
    near = plain.pair_cosine(*(x.double() for x in inputs), target, margin, relu)[target == -1]
    assume(not ((near > 0) & (near < 0.02)).any())  # there a rounding decides on which side of the margin a pair is
    assume(bool((inputs[0].double().norm(dim=-1) > 0).all()))

    def written_out(x, y):
        rows = plain.pair_cosine(x, y, target, margin, relu)
        return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()

    module = ffcl_fast.PairCosineLoss(margin, reduction)
    ours = (lambda x, y: fn.pair_cosine(x, y, target, margin, reduction, relu=True)) if relu else (
        lambda x, y: module(x, y, target)
    )  # fmt: skip
    terms = terms_of([x.flatten(1) for x in inputs], 1.0, 1 / n if reduction == "mean" else 1.0)
    plain.agree(ours, written_out, inputs, float(n if reduction == "sum" else 1), terms)


@given(st.data(), st.lists(st.tuples(sizes, widths), min_size=1, max_size=4), dtypes, st.booleans(), st.booleans())
@drawn
def test_goodness_of_many_layers(data, shapes, dtype, mean, relu):
    inputs = data.draw(tensors(*shapes, dtype=dtype))
    kind = "mean_squares" if mean else "sum_squares"
    ours = lambda *h: torch.cat(fn.goodness_many(list(h), kind, relu=relu))  # noqa: E731
    written_out = lambda *h: torch.cat([plain.goodness(x, mean, relu) for x in h])  # noqa: E731
    plain.agree(ours, written_out, inputs, 1.0, 1.0)


@given(st.data(), sizes, widths, widths, dtypes, st.booleans(), st.booleans(), st.booleans())
@drawn
def test_linear_goodness(data, n, k, width, dtype, mean, relu, with_bias):
    inputs = data.draw(tensors((n, k), (width, k), *[(width,)] * with_bias, dtype=dtype))
    kind = "mean_squares" if mean else "sum_squares"
    ours = lambda x, w, b=None: fn.linear_goodness(x, w, b, kind, relu=relu)  # noqa: E731
    written_out = lambda x, w, b=None: plain.goodness(F.linear(x, w, b), mean, relu)  # noqa: E731
    plain.agree(ours, written_out, inputs, 1.0, 1.0)


@given(st.data(), sizes, st.lists(widths, min_size=1, max_size=4), dtypes, st.floats(0.1, 3.0), st.booleans())
@drawn
def test_a_loss_of_every_layer(data, n, layers, dtype, weight, cosine):
    """Layerwise sums: of goodness losses, which are computed together, and of pair cosines, which fold their weight."""
    inputs = data.draw(tensors(*[(n, d) for d in layers for _ in range(2)], dtype=dtype))
    weights = [weight * (i + 1) for i in range(len(layers))]
    target = torch.ones(n) if cosine else None
    module = ffcl_fast.PairCosineLoss() if cosine else ffcl_fast.GoodnessLoss("mean_squares", relu=True)

    def one(a, b):
        if cosine:
            return plain.pair_cosine(a, b, target.to(a.dtype)).mean()
        return plain.goodness_loss(a, b)

    ours = lambda *h: fn.layerwise(module, list(h[::2]), list(h[1::2]), target, weights)  # noqa: E731
    written_out = lambda *h: sum(w * one(a, b) for w, a, b in zip(weights, h[::2], h[1::2], strict=True))  # noqa: E731
    plain.agree(ours, written_out, inputs, sum(weights), max(weights) * terms_of(inputs, 1.0, 1 / n))


# ------------------------------------------------------------------------------------------------------- invariances

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

"""Every loss of similarities on drawn shapes, dtypes, layouts, magnitudes, ids, devices and backends, against float64.

What is drawn: drawing.py. Losses of activations: test_properties_goodness.py. What must not change a loss:
test_properties_invariances.py.
"""

from __future__ import annotations

import plain
import torch
import torch.nn.functional as F
from drawing import drawn, dtypes, integers, opposed, places, powers, reductions, scales, sizes, tensors, widths
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import ffcl_fast
import ffcl_fast.functional as fn
from ffcl_fast.functional.similarity import EXCLUDE
from ffcl_fast.reference import similarity_matrix

REDUCE = {"mean": torch.mean, "sum": torch.sum, "none": lambda rows: rows}


def by_row(inputs: list[Tensor]) -> list[Tensor | float]:
    """Factors that make every row's gradient one of a row of root mean square 1; scalars have no rows.

    Through the scale times the normalised row, a gradient's elements are about scale / dimensions then.
    """
    return [1.0, *(powers(x) if x.dim() else 1.0 for x in inputs)]


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from(list(EXCLUDE)), st.booleans(), st.booleans(),
       places("similarity_forward"))  # fmt: skip
@drawn
def test_similarity_lse(data, n, m, d, dtype, scale, exclude, normalize, symmetric, place):
    device, backend = place
    shapes = ((n, d),) if symmetric else ((n, d), (m, d))
    by = () if symmetric or normalize else opposed(data, dtype)
    options = {"unit": not normalize, "any_size": normalize, "by": by, "device": device}
    inputs = data.draw(tensors(*shapes, dtype=dtype, **options))
    ids = [None, None] if exclude in (None, "diagonal") else [integers(data, r, -2, 2, device) for r in (n, m)]
    col_ids = ids[0] if symmetric else ids[1]

    def ours(q, k=None):
        options = {"normalize": normalize, "row_ids": ids[0], "col_ids": None if symmetric else ids[1]}
        row, col = fn.similarity_lse(q, k, scale, exclude=exclude, backend=backend, **options)
        return row if symmetric else torch.cat((row, col))

    def written_out(q, k=None):
        k = q if k is None else k
        q, k = (F.normalize(x, dim=1, eps=1e-12) if normalize else x for x in (q, k))
        factor = torch.tensor(scale, dtype=q.dtype, device=device)
        s = similarity_matrix(q, k, factor, ids[0], col_ids, EXCLUDE[exclude])
        return s.logsumexp(1) if symmetric else torch.cat((s.logsumexp(1), s.logsumexp(0)))

    plain.agree(ours, written_out, inputs, scale, 4 * scale / d, factors=by_row(inputs))


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from(("own", "unpaired", "paired")), st.booleans(),
       st.booleans(), reductions, places("similarity_forward"))  # fmt: skip
@drawn
def test_info_nce(data, n, m, d, dtype, scale, negatives, with_ids, decoupled, reduction, place):
    device, backend = place
    more = {"own": [], "unpaired": [(m, d)], "paired": [(n, min(m, 9), d)]}[negatives]
    inputs = data.draw(tensors((n, d), (n, d), *more, dtype=dtype, any_size=True, device=device))
    with_ids = with_ids and negatives != "paired"
    ids, other = (integers(data, r, 0, 3, device) if with_ids else None for r in (n, m))
    other = None if negatives == "own" else other

    def ours(x, y, z=None):
        mode = "paired" if negatives == "paired" else "unpaired"
        if with_ids or decoupled:
            options = {"ids": ids, "negative_ids": other, "decoupled": decoupled, "backend": backend}
            return fn.info_nce(x, y, z, 1 / scale, reduction, mode, **options)
        return ffcl_fast.InfoNCELoss(1 / scale, reduction, mode, backend=backend)(x, y, z)

    written_out = lambda x, y, z=None: REDUCE[reduction](plain.info_nce(x, y, z, 1 / scale, ids, other, decoupled))  # noqa: E731
    share = 1 / n if reduction == "mean" else 1.0
    terms = scale * (n if reduction == "sum" else 1)
    plain.agree(ours, written_out, inputs, terms, scale * share / d, factors=by_row(inputs))


@given(st.data(), sizes, widths, dtypes, scales, st.booleans(), st.booleans(), reductions, places("similarity_forward"))
@drawn
def test_nt_xent(data, n, d, dtype, scale, with_ids, decoupled, reduction, place):
    device, backend = place
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype, any_size=True, device=device))
    ids = integers(data, n, 0, 3, device) if with_ids else None

    def ours(x, y):
        if with_ids or decoupled or reduction != "mean":
            options = {"ids": ids, "decoupled": decoupled, "reduction": reduction, "backend": backend}
            return fn.nt_xent(x, y, 1 / scale, **options)
        return ffcl_fast.NTXentLoss(1 / scale, backend=backend)(x, y)

    written_out = lambda x, y: REDUCE[reduction](plain.nt_xent(x, y, 1 / scale, ids, decoupled))  # noqa: E731
    share = 1 / n if reduction == "mean" else 1.0
    terms = scale * (2 * n if reduction == "sum" else 1)
    plain.agree(ours, written_out, inputs, terms, scale * share / d, factors=by_row(inputs))


@given(st.data(), sizes, sizes, widths, dtypes, scales, reductions, places("similarity_forward"))
@drawn
def test_nt_xent_with_a_bank(data, n, m, d, dtype, scale, reduction, place):
    """The function with constant negatives, and the module, whose bank takes the second view in after the loss."""
    device, backend = place
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype, any_size=True, device=device))
    (bank,) = data.draw(tensors((m, d), dtype=dtype, unit=True, device=device))
    module = ffcl_fast.NTXentLoss(1 / scale, memory_bank_size=(m, d), backend=backend).to(device)

    def ours(x, y):
        if reduction != "mean":
            return fn.nt_xent(x, y, 1 / scale, bank, reduction=reduction, backend=backend)
        with torch.no_grad():
            module.memory_bank.bank.copy_(bank)
        return module(x, y)

    def written_out(x, y):
        return REDUCE[reduction](plain.info_nce(x, y, bank.to(x.dtype), 1 / scale, unit_negatives=True))

    share = 1 / n if reduction == "mean" else 1.0
    terms = scale * (n if reduction == "sum" else 1)
    plain.agree(ours, written_out, inputs, terms, scale * share / d, factors=by_row(inputs))


@given(st.data(), sizes, st.integers(1, 3), widths, dtypes, scales, st.sampled_from(("labels", "views", "mask")),
       st.booleans(), places("similarity_forward"))  # fmt: skip
@drawn
def test_sup_con(data, n, views, d, dtype, scale, positives, one, place):
    """Features are taken as they are: longer ones at a higher temperature are the same logits."""
    device, backend = place
    size = opposed(data, dtype)[0]
    inputs = data.draw(tensors((n, views, d), dtype=dtype, unit=True, by=(size,), device=device))
    temperature, base = size**2 / scale, size**2 * data.draw(st.sampled_from((0.07, 1.0, -0.5)))
    labels = mask = None
    if positives == "labels":
        labels = integers(data, n, 1, data.draw(st.integers(1, 6)), device)
    elif positives == "mask":  # weights, and not symmetric
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        mask = torch.rand(n, n, generator=generator) * (torch.rand(n, n, generator=generator) < 0.3)
        mask = mask.to(device)
    module = ffcl_fast.SupConLoss(temperature, "one" if one else "all", base, backend=backend)
    written_out = lambda x: plain.sup_con(x, labels, temperature, one, mask, base)  # noqa: E731
    largest = size**2 / abs(base)  # the logits, by the factor of the loss
    terms = largest / ((1 if one else views) * n * d)
    plain.agree(lambda x: module(x, labels, mask), written_out, inputs, largest, terms, factors=by_row(inputs))


@given(st.data(), sizes, widths, dtypes, scales, st.integers(1, 6), st.sampled_from((0.0, 0.1, 0.5, 2.5)))
@drawn
def test_margin_sup_con(data, n, d, dtype, scale, classes, margin):
    device = data.draw(places("goodness_forward"))[0]
    inputs = data.draw(tensors((n, d), dtype=dtype, any_size=True, device=device))
    labels = integers(data, n, 1, classes, device)
    z = F.normalize(inputs[0].double(), dim=1)
    # There a rounding decides whether a pair is close enough; with the margin 0 only parallel rows are, without a pull.
    assume(margin == 0 or not bool(((z @ z.T + margin - 1).abs() < 1e-3).any()))
    ours = lambda x: fn.margin_sup_con(x, labels, margin, 1 / scale)  # noqa: E731
    written_out = lambda x: plain.margin_sup_con(x, labels, margin, 1 / scale)  # noqa: E731
    plain.agree(ours, written_out, inputs, scale, scale / (n * d), factors=by_row(inputs))


@given(st.data(), sizes, widths, dtypes, scales, st.booleans(), places("similarity_forward"))
@drawn
def test_clip(data, n, d, dtype, scale, with_ids, place):
    device, backend = place
    inputs = data.draw(tensors((n, d), (n, d), dtype=dtype, unit=True, by=opposed(data, dtype), device=device))
    inputs.append(torch.tensor(scale, device=device))
    ids = integers(data, n, 0, 3, device) if with_ids else None
    module = ffcl_fast.ClipLoss(backend=backend)
    ours = (lambda x, y, s: fn.clip(x, y, s, ids=ids, backend=backend)) if with_ids else module
    written_out = lambda x, y, s: plain.clip(x, y, s.to(x.dtype), ids)  # noqa: E731
    # the scale's gradient: differences of cosines
    plain.agree(ours, written_out, inputs, scale, scale / (n * d), 1 / d**0.5, by_row(inputs))


@given(st.data(), sizes, sizes, widths, dtypes, scales, st.sampled_from((-10.0, -1.0, 0.0, 2.0)), st.booleans(),
       places("siglip"))  # fmt: skip
@drawn
def test_siglip(data, n, m, d, dtype, scale, bias, negative_only, place):
    device, backend = place
    m = m if negative_only else n
    inputs = data.draw(tensors((n, d), (m, d), dtype=dtype, unit=True, by=opposed(data, dtype), device=device))
    inputs += [torch.tensor(scale, device=device), torch.tensor(bias, device=device)]
    ours = ffcl_fast.SigLipLoss(backend=backend)
    if negative_only:
        ours = lambda x, y, s, b: fn.siglip(x, y, s, b, negative_only=True, backend=backend)  # noqa: E731
    written_out = lambda x, y, s, b: plain.siglip(x, y, s.to(x.dtype), b.to(x.dtype), negative_only)  # noqa: E731
    plain.agree(ours, written_out, inputs, scale * m, scale / (n * d**0.5), m / d**0.5, by_row(inputs))

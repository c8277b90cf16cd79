"""Numbers that break softmaxes: every loss against float64 where logits, lengths and classes are extreme.

As in test_properties.py, the numbers are the same on every run unless FFCL_EXAMPLES asks for others.
"""

from __future__ import annotations

import functools
import os
import zlib

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ffcl_fast.functional as fn
from ffcl_fast.functional.similarity import EXCLUDE
from ffcl_fast.reference import excluded_pairs

BACKENDS = ("cpu", "panels")
FRESH = "FFCL_EXAMPLES" in os.environ
TEMPERATURES = (1e-3, 5e-3, 1e-2, 0.07, 1.0, 10.0)
N, D = 37, 24


@pytest.fixture(autouse=True)
def numbers(request, seed):
    if not FRESH:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


# name -> (ours, written out), of x, y (N, D), a temperature t and a backend
LOSSES = {
    "info_nce": (
        lambda x, y, t, b: fn.info_nce(x, y, None, t, "none", backend=b),
        lambda x, y, t: plain.info_nce(x, y, None, t),
    ),
    "info_nce queue": (  # no gradient from the columns
        lambda x, y, t, b: fn.info_nce(x[:9], y[:9], y[9:], t, "none", backend=b),
        lambda x, y, t: plain.info_nce(x[:9], y[:9], y[9:], t),
    ),
    "info_nce paired": (
        lambda x, y, t, b: fn.info_nce(x[:9], y[:9], y[9:36].view(9, 3, D), t, "none", "paired", backend=b),
        lambda x, y, t: plain.info_nce(x[:9], y[:9], y[9:36].view(9, 3, D), t),
    ),
    "nt_xent": (
        lambda x, y, t, b: fn.nt_xent(x, y, t, reduction="none", backend=b),
        lambda x, y, t: plain.nt_xent(x, y, t),
    ),
    "sup_con": (
        lambda x, y, t, b: fn.sup_con(unit(x, y), torch.arange(N) % 5, None, t, backend=b),
        lambda x, y, t: plain.sup_con(unit(x, y), torch.arange(N) % 5, t),
    ),
    "clip": (
        lambda x, y, t, b: fn.clip(*unit(x, y).unbind(1), 1 / t, backend=b),
        lambda x, y, t: plain.clip(*unit(x, y).unbind(1), 1 / t),
    ),
    "siglip": (
        lambda x, y, t, b: fn.siglip(*unit(x, y).unbind(1), 1 / t, -5.0, backend=b),
        lambda x, y, t: plain.siglip(*unit(x, y).unbind(1), 1 / t, -5.0),
    ),
}


def unit(*tensors: Tensor) -> Tensor:
    return F.normalize(torch.stack(tensors, 1), dim=2)


def _random() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randn(N, D)


def _identical() -> tuple[Tensor, Tensor]:
    x = torch.randn(1, D).expand(N, D).contiguous()
    return x, x.clone()


def _opposite() -> tuple[Tensor, Tensor]:
    x, _ = _identical()
    return x, -x


def _near() -> tuple[Tensor, Tensor]:
    """Rows and their positives nearly the same, all rows close together: small losses of large logits."""
    axis = torch.randn(1, D)
    x = axis + 0.3 * torch.randn(N, D)
    return x, x + 0.01 * torch.randn(N, D)


def _all_negative() -> tuple[Tensor, Tensor]:
    """Every cosine of a row of x with a row of y is negative: at temperature 0.01 all of a row's logits are."""
    axis = torch.randn(1, D)
    return axis + 0.1 * torch.randn(N, D), -axis + 0.1 * torch.randn(N, D)


def _some_negative() -> tuple[Tensor, Tensor]:
    """A few rows opposite to everything: 200 below the largest logit at temperature 0.01."""
    axis = torch.randn(1, D)
    x, y = axis + 0.1 * torch.randn(N, D), axis + 0.1 * torch.randn(N, D)
    x[:3] *= -1
    return x, y


def _huge_row() -> tuple[Tensor, Tensor]:
    x, y = _random()
    x[3] *= 1e15
    y[5] *= 1e15
    return x, y


def _tiny() -> tuple[Tensor, Tensor]:
    x, y = _random()
    x[::2] *= 1e-9
    y[1::2] *= 1e-9
    return x, y


INPUTS = {
    f.__name__[1:]: f for f in (_random, _identical, _opposite, _near, _all_negative, _some_negative, _huge_row, _tiny)
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_temperature(kind, loss, backend):
    x, y = INPUTS[kind]()
    ours, written_out = LOSSES[loss]
    # The largest logit's share of a gradient, through the normalisation of the shortest row.
    shortest = float(torch.cat((x, y)).double().norm(dim=1).min())
    for t in TEMPERATURES if FRESH else TEMPERATURES[int(torch.randint(3, ())) :: 3]:
        functions = (functools.partial(ours, t=t, b=backend), functools.partial(written_out, t=t))
        plain.agree(*functions, [x, y], N / t, 1 / t / (shortest * D**0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ("random", "huge_row", "tiny"))
def test_every_row_has_its_own_gradient(kind, loss, backend):
    """A long row's gradient is short and a short row's long: row by row, each by its own length."""
    x, y = INPUTS[kind]()
    length = torch.cat((x, y)).double().norm(dim=1)
    ours, written_out = LOSSES[loss]
    for t in (0.05, 1.0):
        gradients = []
        for f, double in (
            (functools.partial(ours, t=t, b=backend), False),
            (functools.partial(written_out, t=t), True),
        ):
            leaves = [(v.double() if double else v.clone()).requires_grad_() for v in (x, y)]
            gradients.append(torch.cat(torch.autograd.grad(f(*leaves).sum(), leaves)).double())
        error, exact = (g.norm(dim=1) * length for g in (gradients[0] - gradients[1], gradients[1]))
        assert float(error.max()) <= 1e-4 * float(exact.max()), (t, error / exact.max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", (0.0, 1e-40, 1e-13))
def test_short_rows(value, loss, backend):
    """Zero rows, subnormals, rows shorter than their divisor, as torch.nn.functional.normalize takes them."""
    x, y = _random()
    x[4], y[7] = value, -value
    x[11, 1:] = 0.0
    ours, written_out = LOSSES[loss]
    leaves = [[v.double() if double else v.clone() for v in (x, y)] for double in (False, True)]
    results = []
    for (a, b), f in zip(
        leaves, (lambda a, b: ours(a, b, 0.1, backend), lambda a, b: written_out(a, b, 0.1)), strict=True
    ):
        a.requires_grad_(), b.requires_grad_()
        value = f(a, b)
        results.append((value.detach().double(), *torch.autograd.grad(value.sum(), (a, b))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for mine, exact in zip(results[0][1:], results[1][1:], strict=True):
        # The gradient of a row of zeros is 1e12 times that of its direction: row by row.
        error = (mine.double() - exact).norm(dim=1)
        assert bool((error <= 1e-4 * exact.norm(dim=1) + 1e-5).all()), error.argmax()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", ("equal", "different", "sizes 1 to n", "pairs", "one apart"))
@pytest.mark.parametrize("views", (1, 2))
def test_class_sizes(classes, views, backend):
    n = 45
    labels = {
        "equal": torch.zeros(n, dtype=torch.int64),
        "different": torch.randperm(n),
        "sizes 1 to n": torch.arange(9).repeat_interleave(torch.arange(1, 10)),
        "pairs": torch.arange(n) // 2,
        "one apart": (torch.arange(n) == 13).long() * 2**40,
    }[classes]
    z = F.normalize(torch.randn(n, views, D), dim=2)
    for mode, t in (("all", 0.01), ("all", 0.5), ("one", 0.1)):
        ours = functools.partial(fn.sup_con, labels=labels, temperature=t, contrast_mode=mode, backend=backend)
        written_out = functools.partial(plain.sup_con, labels=labels, temperature=t, one=mode == "one")
        plain.agree(ours, written_out, [z], 1 / 0.07, 1 / 0.07 / (n * views * D**0.5))


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random tensor inside a buffer that is NaN elsewhere: before, after, and between its rows."""
    n, d = shape
    buffer = torch.full((n + 6, d + 11), torch.nan, dtype=dtype)
    view = buffer[3:-3, 5 : 5 + d]
    view.copy_(torch.randn(n, d).to(dtype))
    return view


POISONED = {
    "info_nce": lambda x, y, b: fn.info_nce(x, y, backend=b),
    "nt_xent": lambda x, y, b: fn.nt_xent(x, y, backend=b),
    "clip": lambda x, y, b: fn.clip(x, y, 3.0, backend=b),
    "siglip": lambda x, y, b: fn.siglip(x, y, 3.0, -1.0, backend=b),
    "lse": lambda x, y, b: sum(v.sum() for v in fn.similarity_lse(x, y, 200.0, backend=b)),
    "goodness": lambda x, y, b: (fn.goodness(x, backend=b) + fn.goodness(y, relu=True, backend=b)).sum(),
    "normalised": lambda x, y, b: (fn.goodness_normalize(x, backend=b) * fn.goodness_normalize(y, backend=b)).sum(),
    "pair_cosine": lambda x, y, b: fn.pair_cosine(x, y, torch.ones(len(x)), backend=b),
    "linear_goodness": lambda x, y, b: fn.linear_goodness(x, y, backend=b).sum(),
    "goodness_loss": lambda x, y, b: fn.goodness_loss(fn.goodness(x, backend=b), fn.goodness(y, backend=b)),
    "silu": lambda x, y, b: fn.goodness_loss(fn.goodness(x, backend=b), fn.goodness(y, backend=b), "silu"),
    "symba": lambda x, y, b: fn.goodness_loss(fn.goodness(x, backend=b), fn.goodness(y, backend=b), "symba"),
    "two_threshold": lambda x, y, b: fn.goodness_loss(
        fn.goodness(x, backend=b), fn.goodness(y, backend=b), "two_threshold"
    ),
    "sup_con": lambda x, y, b: fn.sup_con(torch.stack((x, y), 1), torch.arange(len(x)) % 3, backend=b),
    "sup_con all different": lambda x, y, b: fn.sup_con(
        torch.cat((x, y))[:, None], torch.arange(2 * len(x)), backend=b
    ),
    "sup_con one": lambda x, y, b: fn.sup_con(torch.stack((x, y), 1), contrast_mode="one", backend=b),
    "margin_sup_con": lambda x, y, b: fn.margin_sup_con(torch.cat((x, y)), torch.arange(2 * len(x)) % 9),
    "queue": lambda x, y, b: fn.info_nce(x, y, y.flip(0), backend=b),
    "layerwise": lambda x, y, b: fn.layerwise(fn.pair_cosine, [x], [y], torch.ones(len(x))),
    "pooled": lambda x, y, b: sum(fn.pool_goodness(v[:, None], backend=b)[0].sum() for v in (x, y)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POISONED)
def test_what_lies_around_a_tensor_does_not_leak(name, backend, monkeypatch):
    """NaN around every input, and in every fresh output of ours, for tails of every kind."""
    fresh = torch.Tensor.new_empty

    def poison(self, *size, **options):
        x = fresh(self, *size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    for n, d in ((1, 1), (3, 17), (13, 40), (97, 33), (130, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = (_poisoned((n, d), dtype).requires_grad_() for _ in range(2))
            value = POISONED[name](x, y, backend)
            alone = POISONED[name](x.detach().clone(), y.detach().clone(), backend)
            torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-5)
            for g in torch.autograd.grad(value, (x, y)):
                assert g.isfinite().all(), (n, d, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("name", [name for name in POISONED if name != "lse"])
def test_a_number_that_is_none_is_seen_in_the_loss(name, value, backend):
    """Inf or NaN in one element of one row: NaN, or an infinite goodness, and never a plausible loss."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for side in (0, 1):
            pair = [torch.randn(41, 19).to(dtype) for _ in range(2)]
            pair[side][torch.randint(41, ()), torch.randint(19, ())] = value
            if "goodness" in name or name == "pooled":
                if value == -float("inf") and name == "goodness":
                    continue  # ReLU cuts it, rightly
                assert not POISONED[name](*pair, backend).isfinite()
            else:
                assert POISONED[name](*pair, backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("exclude", EXCLUDE)
@pytest.mark.parametrize("other", ("pair", "pair of unit rows", "self"))
def test_a_number_that_is_none_is_seen_in_every_normaliser_it_enters(other, exclude, value, backend):
    """And in no other. Against keys of one sign every logit of a row may be minus infinity, whose exponential is 0."""
    n, m = 41, 41 if other == "self" else 29
    ids = [torch.randint(6, (r,)) for r in (n, m)] if exclude not in (None, "diagonal") else [None, None]
    ids[1] = ids[0] if other == "self" else ids[1]
    left_out = excluded_pairs(n, m, *ids, EXCLUDE[exclude])
    kept = torch.ones(n, m, dtype=torch.bool) if left_out is None else ~left_out
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for side in ("q", "k")[: 2 if other != "self" else 1]:
            q, k = torch.randn(n, 19), torch.randn(m, 19)
            row, at = torch.randint(m, ()), torch.randint(19, ())
            for x in (q, k):
                x[:, at] = x[:, at].abs()
            q, k = q.to(dtype), k.to(dtype)
            (q if side == "q" else k)[row, at] = value
            rows, cols = torch.zeros(n, dtype=torch.bool), torch.zeros(m, dtype=torch.bool)
            (rows if side == "q" else cols)[row] = True
            cols = rows if other == "self" else cols
            spoilt = kept & (rows[:, None] | cols[None, :])
            options = {"exclude": exclude, "normalize": other == "pair of unit rows", "row_ids": ids[0]}
            options["col_ids"] = None if other == "self" else ids[1]
            found = fn.similarity_lse(q, None if other == "self" else k, 7.0, backend=backend, **options)
            for lse, hit, own in zip(found, (spoilt.any(1), spoilt.any(0)), (rows, cols), strict=True):
                assert lse[hit].isnan().all() and not lse[~(hit | own)].isnan().any()

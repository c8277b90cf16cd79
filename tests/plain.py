"""The losses as anyone would write them in plain PyTorch, similarity matrix and all, and the comparison with ours.

Every function computes in the dtype of its inputs and differentiates under autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import assert_close_to_reference


def info_nce(
    query, positive, negatives=None, temperature=0.1, ids=None, negative_ids=None, decoupled=False, unit_negatives=False
) -> Tensor:
    """(N,); negatives None, (M, D) or (N, M, D), normalised here unless ``unit_negatives``."""
    q, p = F.normalize(query, dim=1), F.normalize(positive, dim=1)
    logit = (q * p).sum(1) / temperature
    if negatives is None:
        s = q @ p.T / temperature
        out = torch.eye(len(q), dtype=torch.bool, device=q.device) if ids is None else ids[:, None] == ids[None, :]
    elif negatives.dim() == 3:
        s = (q[:, None] * F.normalize(negatives, dim=2)).sum(2) / temperature
        out = None
    else:
        s = q @ (negatives if unit_negatives else F.normalize(negatives, dim=1)).T / temperature
        out = None if ids is None else ids[:, None] == negative_ids[None, :]
    if out is not None:
        s = s.masked_fill(out, -torch.inf)
    if decoupled:
        odds = s.logsumexp(1) - logit
        return torch.where(odds == -torch.inf, 0.0, odds)
    return torch.cat((logit[:, None], s), 1).logsumexp(1) - logit


def nt_xent(x, y, temperature=0.5, ids=None, decoupled=False) -> Tensor:
    """(2N,), the rows of ``x`` first."""
    z = F.normalize(torch.cat((x, y)), dim=1)
    s = z @ z.T / temperature
    n = len(x)
    logit = s.diagonal(n).repeat(2)
    ids = (torch.arange(n, device=z.device) if ids is None else ids).repeat(2)
    s = s.masked_fill(ids[:, None] == ids[None, :], -torch.inf)
    if decoupled:
        odds = s.logsumexp(1) - logit
        return torch.where(odds == -torch.inf, 0.0, odds)
    return torch.cat((logit[:, None], s), 1).logsumexp(1) - logit


def sup_con(features, labels=None, temperature=0.07, one=False, mask=None, base_temperature=0.07) -> Tensor:
    """(); anchors without a positive are left out of the mean. ``mask`` (B, B) weighs samples, without labels."""
    n, views, _ = features.shape
    z = features.transpose(0, 1).reshape(n * views, -1)
    if mask is None:
        labels = torch.arange(n, device=z.device) if labels is None else labels
        mask = labels[:, None] == labels[None, :]
    anchors = n if one else n * views
    s = z[:anchors] @ z.T / temperature
    itself = torch.eye(n * views, dtype=torch.bool, device=z.device)[:anchors]
    positive = mask.to(z.dtype).repeat(views, views)[:anchors].masked_fill(itself, 0.0)
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    rows = -torch.where(positive > 0, log_p * positive, 0.0).sum(1)[count > 0] / count[count > 0]
    factor = temperature / base_temperature
    return rows.mean() * factor if rows.numel() else features.sum() * 0


def margin_sup_con(features, labels, margin=0.0, temperature=0.1) -> Tensor:
    """(); the sum over rows of the mean over their positives, with min(s + margin, 1) for a positive's cosine."""
    z = F.normalize(features, dim=1)
    s = z @ z.T
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    s = torch.where(positive, (s + margin).clamp(max=1.0), s) / temperature
    count = positive.sum(1)
    lse = s.masked_fill(itself, -torch.inf).logsumexp(1)
    rows = (lse - torch.where(positive, s, 0.0).sum(1) / count)[count > 0]
    return rows.mean() if rows.numel() else features.sum() * 0


def clip(x, y, scale, ids=None) -> Tensor:
    s = scale * x @ y.T
    if ids is not None:
        same = (ids[:, None] == ids[None, :]).fill_diagonal_(False)
        s = s.masked_fill(same, -torch.inf)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2


def siglip(x, y, scale, bias, negative_only=False) -> Tensor:
    s = scale * x @ y.T + bias
    z = -torch.ones_like(s)
    if not negative_only:
        z.diagonal().fill_(1)
    return -F.logsigmoid(z * s).sum() / len(x)


def goodness(h, mean=False, relu=False, groups=None, channels=False) -> Tensor:
    """(N,); (N, groups); without dimension 1 where over the channels alone."""
    a = F.relu(h) if relu else h
    if channels:
        squares = (a * a).movedim(1, -1)
    else:
        squares = (a * a).flatten(1) if groups is None else (a * a).reshape(len(h), groups, -1)
    return squares.mean(-1) if mean else squares.sum(-1)


def objective(g_pos, g_neg, name="logistic", threshold=2.0, alpha=4.0, constants=(1.0, 1.0, None, None, 0.0)) -> Tensor:
    """Of goodness: Hinton 2022's and its SiLU form, SymBa's, and SCFF's with its (a, b, t1, t2, lambda)."""
    if name == "symba":
        return F.softplus(-alpha * (g_pos - g_neg)).mean()
    if name == "two_threshold":
        a, b, t1, t2, penalty = constants
        t1, t2 = (threshold if t is None else t for t in (t1, t2))
        near = F.softplus(a * (t1 - g_pos)).mean() + F.softplus(b * (g_neg - t2)).mean()
        return near + penalty * g_pos.square().mean().sqrt()
    x = torch.cat((threshold - g_pos, g_neg - threshold))
    return (F.softplus(x) if name == "logistic" else x * torch.sigmoid(x)).mean()


def goodness_loss(positive, negative, threshold=2.0) -> Tensor:
    """Hinton 2022, of the mean squares after ReLU."""
    return objective(*(goodness(h, mean=True, relu=True) for h in (positive, negative)), threshold=threshold)


def normalize(h, eps=1e-6, relu=False) -> Tensor:
    a = (F.relu(h) if relu else h).flatten(1)
    return (a / (a.square().mean(1, keepdim=True).sqrt() + eps)).reshape(h.shape)


def pooled(h, relu=False) -> Tensor:
    return (F.relu(h) if relu else h).flatten(2).mean(2)


def pair_cosine(h1, h2, target, margin=0.0, relu=False) -> Tensor:
    """(N,)"""
    a, b = ((F.relu(h) if relu else h).flatten(1) for h in (h1, h2))
    return F.cosine_embedding_loss(a, b, target, margin, reduction="none")


FEW = 8  # different numbers: plain PyTorch may have so many right by luck


def agree(
    ours,
    written_out,
    inputs: list[Tensor],
    terms: float = 0.0,
    gradient_terms: float | list[float] = 0.0,
    scalar_terms: float = 0.0,
    factors: list[Tensor | float] | None = None,
) -> None:
    """Value and gradients of ``ours`` against ``written_out`` in float64 by the project's rule; no input is changed.

    A loss of several rows gets a random upstream gradient, so that a row taken for another shows. What is not finite
    (a row without any pair) has no gradient. ``terms``, ``gradient_terms`` (of all or of each), ``scalar_terms``: of
    what size the numbers are whose difference a value, a gradient or a scale's gradient may be, see
    ``assert_close_to_reference``. ``factors``: powers of two that bring the value and each gradient to one size, so
    that a row's error is measured by that row; ``terms`` and the others are sizes after that.
    """
    before = [x.clone() for x in inputs]
    mine = _run(ours, inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was changed"
    compare(mine, written_out, inputs, terms, gradient_terms, scalar_terms, factors)


def compare(
    mine: list[Tensor | None], written_out, inputs, terms=0.0, gradient_terms=0.0, scalar_terms=0.0, factors=None
) -> None:
    """As :func:`agree`, of a value and gradients that are known."""
    plainly, truth = _run(written_out, inputs), _run(written_out, [x.double() for x in inputs])
    repeated = any(_repeated(x) for x in inputs)  # all that comes of equal rows is right or wrong together
    spread = None
    factors = factors or [1.0] * len(truth)
    each = gradient_terms if isinstance(gradient_terms, list) else [gradient_terms] * len(inputs)
    for number, (x, eager, exact, by) in enumerate(zip(mine, plainly, truth, factors, strict=True)):
        if exact is None:
            assert x is None or not x.any()
            continue
        name, factor, size = ("value", 2, terms) if number == 0 else (f"gradient {number}", 3, each[number - 1])
        if number and not x.dim():
            size = max(size, scalar_terms)
            x = x.to(inputs[0].dtype)  # a scale's gradient is summed from those of the embeddings, in their dtype
        if number:
            eager, exact = (torch.where(t.isnan(), 0.0, t) for t in (eager, exact))
        if repeated or exact.float().unique().numel() <= FEW:
            spread = spread or _spread(written_out, inputs)
            eager = torch.where(exact.isfinite(), exact + spread[number], exact)
        # Below its smallest normal number a dtype (float16, here) has one unit in the last place for all, which no
        # relative tolerance knows: what is off by its rounding alone is right.
        half = 0.51 * torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        right = torch.where((x.double() - exact).abs() <= half, exact, x.double())
        # And above its largest it has infinity, which rounding may reach from just below.
        beyond = (exact.abs() > 0.99 * torch.finfo(x.dtype).max) & (x == exact.sign() * torch.inf)
        right = torch.where(beyond, exact, right)
        # All of it at a root mean square near 1, where float16 does not end.
        usual = float(torch.where(exact.isfinite(), exact * by, 0.0).square().mean().sqrt())
        to_one = 2.0 ** -round(math.log2(max(usual, size, 1e-6)))
        by = by * to_one
        assert_close_to_reference((right * by).to(x.dtype), eager * by, exact * by, factor, name, size * to_one)


def _run(function, inputs: list[Tensor]) -> list[Tensor | None]:
    """The value and the gradients of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    weight = upstream(value)
    if not value.requires_grad:
        return [value, *[None] * len(leaves)]
    finite = torch.where(value.isfinite(), value, 0.0)
    gradients = torch.autograd.grad((finite * weight).sum(), leaves, allow_unused=True)
    return [value.detach(), *gradients]


def upstream(value: Tensor) -> Tensor:
    """The gradient that :func:`agree` gives a value."""
    weight = torch.randn(value.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return weight.to(value.device, value.dtype)


def _repeated(x: Tensor) -> bool:
    return x.dim() > 0 and x.stride(0) == 0 and x.shape[0] > 1


def _spread(function, inputs: list[Tensor]) -> list[Tensor | None]:
    """Twice the root mean square error of ``function`` in the inputs' dtype, over inputs within 3 % of these.

    One run of a few numbers is too little to know plain PyTorch's accuracy by, and the root mean square of a few errors
    is as random as an error, hence the factor.
    """
    squares: list[list[Tensor]] = []
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        near = []
        for x in inputs:
            row = x[:1] if _repeated(x) else x
            row = row * (1 + 0.03 * torch.randn(row.shape, generator=random, dtype=torch.float64).to(x.device))
            near.append(row.to(x.dtype).expand(x.shape))
        runs = zip(_run(function, near), _run(function, [x.double() for x in near]), strict=True)
        squares.append([None if y is None else (x.double() - y).nan_to_num(0.0, 0.0, 0.0).square() for x, y in runs])
    return [None if x[0] is None else 2 * torch.stack(x).mean(0).sqrt() for x in zip(*squares, strict=True)]

"""The truth: every operator in plain PyTorch that materialises everything.

Slow and memory-hungry on purpose. Run in float64 it is what tests and benchmarks compare with; ``backend="reference"``
runs it in the inputs' own precision. The signatures are those of :mod:`ffcl_fast.ops` without ``backend``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops


def unavailable(op: str, x: Tensor) -> str | None:
    return None if op in globals() else "the reference has no such operator"


def cache_size(q: Tensor, k: Tensor | None) -> int:
    """Elements a backend wants to keep between forward and backward: none here."""
    return 0


def excluded_pairs(
    rows: int, cols: int, row_ids: Tensor | None, col_ids: Tensor | None, exclude: int, device=None
) -> Tensor | None:
    """(rows, cols) boolean mask of the pairs left out, or None for none."""
    if exclude == ops.EXCLUDE_NONE:
        return None
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(cols, device=device)[None, :]
    if exclude == ops.EXCLUDE_DIAGONAL:
        return i == j
    same = row_ids[:, None] == (row_ids if col_ids is None else col_ids)[None, :]
    if exclude == ops.EXCLUDE_SAME_ID:
        return same
    if exclude == ops.EXCLUDE_SAME_ID_OFF_DIAGONAL:
        return same & (i != j)
    return ~same


def similarity_matrix(q, k, scale, row_ids=None, col_ids=None, exclude=ops.EXCLUDE_NONE) -> Tensor:
    """S = scale q k^T in the accumulator dtype, -inf at excluded pairs; (N, M)."""
    acc = ops.accumulator_dtype(q)
    k = q if k is None else k
    s = (q.to(acc) @ k.to(acc).T) * scale.to(acc)
    mask = excluded_pairs(q.shape[0], k.shape[0], row_ids, col_ids, exclude, q.device)
    return s if mask is None else s.masked_fill(mask, -torch.inf)


def normalize_forward(x, eps, dtype):
    norm = torch.linalg.vector_norm(x, dim=1, dtype=ops.accumulator_dtype(x)).clamp_min(eps)
    return (x / norm[:, None]).to(dtype), norm


def normalize_backward(z, norm, dz, eps, dtype):
    # A row shorter than eps was divided by a constant: no projection.
    inner = (z.to(norm.dtype) * dz).sum(1).mul_(norm > eps)
    return torch.addcmul(dz, z, inner[:, None], value=-1.0).div_(norm[:, None]).to(dtype)


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    s = similarity_matrix(q, k, scale, row_ids, col_ids, exclude)
    col_lse = torch.logsumexp(s, 0) if both and k is not None else s.new_empty(0)
    return torch.logsumexp(s, 1), col_lse, q.new_empty(0, dtype=torch.float32)


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    s = similarity_matrix(q, k, scale, row_ids, col_ids, exclude)
    g = row_grad[:, None] * _softmax(s, row_lse[:, None])
    if k is None:
        g = g + g.T
    elif col_grad.numel():
        g = g + col_grad[None, :] * _softmax(s, col_lse[None, :])
    g = g * scale.to(s.dtype)
    other = q if k is None else k
    dq = (g @ other.to(s.dtype)).to(q.dtype) if need_q else q.new_empty(0, q.shape[1])
    dk = (g.T @ q.to(s.dtype)).to(k.dtype) if need_k and k is not None else q.new_empty(0, q.shape[1])
    return dq, dk


def _softmax(s: Tensor, lse: Tensor) -> Tensor:
    return torch.where(lse == -torch.inf, 0.0, torch.exp(s - lse))


def contrast_state_size(rows, k, positive, unit_q, unit_k, both, save):
    """The normalisers and the slopes, of the rows and perhaps of the columns."""
    return rows * (4 if both else 2)


def contrast_forward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, save
):
    scale = ops.away_from_zero(scale)
    rows = _contrast_rows(q, tail, k, positive, row_ids, order, group, unit_q, unit_k, kind == ops.CONTRAST_MEAN)
    z, z_k, z_positive, row_ids, count, _ = rows
    s = similarity_matrix(z, z_k, scale, row_ids, col_ids, exclude)
    logit = scale * (z.double() * z_positive.double()).sum(1) / count.clamp_min(1)
    empty = z.new_empty(0)
    row_lse, col_lse = torch.logsumexp(s, 1), torch.logsumexp(s, 0) if both else empty
    loss, slope = _contrast_loss((row_lse - logit).to(z.dtype), count, kind)
    col_slope = empty
    if both:
        of_columns, col_slope = _contrast_loss((col_lse - logit).to(z.dtype), count, kind)
        loss = loss + of_columns
    count = count if kind == ops.CONTRAST_MEAN else empty
    return loss, count, torch.cat((row_lse, slope, col_lse, col_slope))


def contrast_backward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, count, state,
    grad, need_q, need_k, need_positive, need_scale,
):  # fmt: skip
    scale = ops.away_from_zero(scale)
    rows = _contrast_rows(q, tail, k, positive, row_ids, order, group, unit_q, unit_k, kind == ops.CONTRAST_MEAN)
    z, z_k, z_positive, row_ids, positives, (q_norm, k_norm, positive_norm) = rows
    row_lse, slope, *of_columns = state.split(z.shape[0])
    col_lse, col_slope = of_columns or (state[:0], state[:0])
    row_grad, col_grad = grad * slope, grad * col_slope if both else col_slope
    cache = q.new_empty(0, dtype=torch.float32)
    dz, dz_k = similarity_backward(
        z, z_k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, True, k is not None
    )
    weight = (-scale * (row_grad + (col_grad if col_grad.numel() else 0)) / positives.clamp_min(1))[:, None]
    weight = torch.where(positives[:, None] > 0, weight, 0.0)
    dz = dz + weight * z_positive
    d_positive = z.new_empty(0, z.shape[1])
    if order is not None:
        dz = dz + _same_class(order, group).to(z.dtype) @ (weight * z)
    elif positive is None:
        dz_k = dz_k + weight * z
    else:
        d_positive = weight * z
    dscale = (z * dz).sum() / scale / (2 if k is None else 1)

    def of_x(dz, z, norm, needed):
        if not needed or not dz.numel():
            return q.new_empty(0, q.shape[1])
        if norm.numel():
            along = (z * dz).sum(1, keepdim=True) * (norm > ops.UNIT_EPS)
            dz = (dz - z * along) / norm
        return dz.to(q.dtype)

    return (
        of_x(dz, z, q_norm, need_q),
        of_x(dz_k, z_k, k_norm, need_k),
        of_x(d_positive, z_positive, positive_norm, need_positive),
        dscale,
    )


def _contrast_rows(q, tail, k, positive, row_ids, order, group, unit_q, unit_k, mean):
    """z, z_k, sums of positives (N, D), row_ids, number of positives (N,), and norms (N, 1) or empty."""
    acc = ops.accumulator_dtype(q)
    norms = []

    def unit(x, wanted):
        x = None if x is None else x.to(acc)
        norms.append(q.new_empty(0, 1, dtype=acc))
        if x is None or not wanted:
            return x
        norms[-1] = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(ops.UNIT_EPS)
        return x / norms[-1]

    z = unit(q if tail is None else torch.cat((q, tail)), unit_q)
    z_k, z_positive = unit(k, unit_k), unit(positive, unit_q)
    count = z.new_ones(z.shape[0])
    if order is not None:
        same = _same_class(order, group)
        z_positive = same.to(z.dtype) @ z
        if mean:  # ids: a class of two has one, every other row its own
            count, own = same.sum(1).to(z.dtype), torch.arange(len(count), device=z.device)
            row_ids = torch.where(count == 1, torch.minimum(own, same.int().argmax(1)), own)
    elif z_positive is None:
        z_positive = z_k
    return z, z_k, z_positive, row_ids, count, norms


def _same_class(order, group):
    """(N, N): whether two rows are different ones of one class."""
    of_row = torch.empty_like(group).scatter_(0, order, group)
    return (of_row[:, None] == of_row).fill_diagonal_(False)


def _contrast_loss(x: Tensor, count: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The loss of x by ``kind``, and its derivative."""
    softplus, slope = F.softplus(x, threshold=50.0), torch.sigmoid(x)
    if kind == ops.CONTRAST_DECOUPLED:
        alone = x == -torch.inf
        return x.masked_fill(alone, 0.0), (~alone).to(x.dtype)
    if kind == ops.CONTRAST_MEAN:
        one, none = count == 1, count == 0
        loss = torch.where(one, softplus, x).masked_fill(none & ~x.isnan(), 0.0)
        return loss, torch.where(one, slope, 1.0).masked_fill(none, 0.0)
    return softplus, slope


def positives_of(x: Tensor, given: Tensor | None, pairing: int) -> Tensor:
    """Each row's entry of ``given``, or where that is None the one of ``x`` that belongs to its positive."""
    if given is not None:
        return given
    row = torch.arange(x.shape[0], device=x.device)
    return x[row ^ 1] if pairing == ops.POSITIVE_INTERLEAVED else x.roll(x.shape[0] // 2, 0)


def positive_odds(q, positive, scale, row_lse, col_lse, pairing, decoupled):
    kind = ops.CONTRAST_DECOUPLED if decoupled else ops.CONTRAST_SOFTPLUS
    logit = scale.double() * (q.double() * positives_of(q, positive, pairing).double()).sum(1)
    x = torch.add(row_lse - logit, logit, alpha=0.0)  # an infinite logit is an overflow: NaN, not a loss of 0
    loss, slope = _contrast_loss(x.to(row_lse.dtype), logit, kind)
    col_slope = col_lse.clone()
    if col_lse.numel():
        of_columns, col_slope = _contrast_loss((col_lse - logit).to(row_lse.dtype), logit, kind)
        loss = loss + of_columns
    return loss, slope, col_slope, logit.to(row_lse.dtype)


def add_positives_(q, positive, scale, grad, slope, col_slope, logit, dq, d_positive, pairing):
    share = grad * (slope + col_slope if col_slope.numel() else slope)
    weight = -scale * share
    inner = slope.new_empty(0)
    if dq.numel():
        along = (q.to(slope.dtype) * dq).sum(1)
        inner = (along / 2 if positive is None else along) - share * logit
        both = weight if positive is not None else weight + positives_of(weight, None, pairing)
        dq.copy_(torch.addcmul(dq.to(slope.dtype), both[:, None], positives_of(q, positive, pairing)))
    if d_positive.numel():
        d_positive.copy_(torch.addcmul(d_positive.to(slope.dtype), weight[:, None], q))
    return inner


def class_sums(x, group, weight, classes):
    acc = ops.accumulator_dtype(x)
    own = x.to(acc) if weight is None else x.to(acc) * weight[:, None]
    counts = own.new_zeros(classes).index_add_(0, group, own.new_ones(x.shape[0]))
    return own.new_zeros(classes, x.shape[1]).index_add_(0, group, own), counts


def _means_of_others(own: Tensor, sums: Tensor, counts: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """What the other rows of each row's class have in ``sums``, over their number, and that number."""
    number = counts[group] - 1
    return (sums[group] - own) / number.clamp_min(1)[:, None], number


def class_odds(q, sums, counts, group, scale, row_lse):
    mean, number = _means_of_others(q.to(sums.dtype), sums, counts, group)
    logit = scale.double() * (q.double() * mean.double()).sum(1)
    x = torch.add(row_lse - logit, logit, alpha=0.0).to(row_lse.dtype)
    return *_contrast_loss(x, number, ops.CONTRAST_MEAN), logit.to(row_lse.dtype)


def add_class_positives(q, sums, taken, counts, group, scale, share, logit, dq):
    own = q.to(sums.dtype)
    inner = (own * dq).sum(1) / 2 - share * logit
    mean, number = _means_of_others(own, sums, counts, group)
    of_others, _ = _means_of_others(share[:, None] * own, taken, counts, group)
    part = torch.where((number < 1)[:, None], 0.0, share[:, None] * mean + of_others)
    return torch.addcmul(dq.to(sums.dtype), part, scale, value=-1.0).to(dq.dtype), inner


def siglip(q, k, scale, bias, positives, need_q, need_k):
    acc = ops.accumulator_dtype(q)
    x = similarity_matrix(q, k, scale) + bias.to(acc)
    z = -torch.ones_like(x)
    if positives:
        z.diagonal().fill_(1.0)
    loss = F.softplus(-z * x).sum()
    dq, dk = (q.new_empty(0, q.shape[1]) for _ in range(2))
    if not (need_q or need_k):
        return loss, dq, dk, loss.new_zeros(())
    g = -z * torch.sigmoid(-z * x)
    gs = g * scale.to(acc)
    if need_q:
        dq = (gs @ k.to(acc)).to(q.dtype)
    if need_k:
        dk = (gs.T @ q.to(acc)).to(k.dtype)
    return loss, dq, dk, g.sum()


# --- goodness --------------------------------------------------------------------------------------------------------


def activation(h: Tensor, relu: bool) -> Tensor:
    """``h`` in the accumulator dtype, after ReLU where ``relu``."""
    a = h.to(ops.accumulator_dtype(h))
    return F.relu(a) if relu else a


def _mask(grad: Tensor, h: Tensor, relu: bool) -> Tensor:
    """The gradient with respect to ``h`` from the one with respect to its activation, in h's dtype."""
    return (torch.where(h <= 0, 0.0, grad) if relu else grad).to(h.dtype)


def goodness_forward(h, mean, relu, normalize, eps):
    a = activation(h, relu)
    squares = a.square()
    goodness = squares.mean(1) if mean else squares.sum(1)
    if not normalize:
        return goodness, h.new_empty(0, h.shape[1])
    return goodness, (a / (squares.mean(1, keepdim=True).sqrt() + eps)).to(h.dtype)


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    a, width = activation(h, relu), h.shape[1]
    da = torch.zeros_like(a)
    if grad_goodness is not None:
        da = da + grad_goodness[:, None] * a * (2 / width if mean else 2)
    if grad_out is not None:
        rms = a.square().mean(1, keepdim=True).sqrt()
        along = (grad_out.to(a.dtype) * a).sum(1, keepdim=True)
        da = da + grad_out / (rms + eps) - torch.where(rms == 0, 0.0, a * along / ((rms + eps).square() * width * rms))
    return _mask(da, h, relu)


def pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2):
    a1, a2 = activation(h1, relu), activation(h2, relu)
    m1 = a1.square().sum(1) + ops.PAIR_COSINE_EPS
    m2 = a2.square().sum(1) + ops.PAIR_COSINE_EPS
    product = m1.sqrt() * m2.sqrt()
    cos = (a1 * a2).sum(1) / product
    positive, negative = target == 1, target == -1
    zero = torch.zeros_like(cos)
    loss = torch.where(positive, 1 - cos, torch.where(negative, (cos - margin).clamp_min(0), zero))
    w = torch.where(positive, -1.0, torch.where(negative & ~(cos <= margin), 1.0, zero))
    coefficients = torch.stack((w / product, w * cos / m1, w * cos / m2), 1)
    d1, d2 = pair_cosine_backward(h1, h2, coefficients, torch.full_like(cos, scale), relu, need_1, need_2)
    return loss, coefficients, d1, d2


def pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2):
    a1, a2 = activation(h1, relu), activation(h2, relu)
    c0, c1, c2 = (coefficients * grad[:, None])[:, :, None].unbind(1)
    d1 = _mask(c0 * a2 - c1 * a1, h1, relu) if need_1 else h1.new_empty(0, h1.shape[1])
    d2 = _mask(c0 * a1 - c2 * a2, h2, relu) if need_2 else h1.new_empty(0, h1.shape[1])
    return d1, d2


def scale_(x, factor):
    x.mul_(factor)


def pool_goodness_forward(h, mean, relu):
    pooled = activation(h, relu).mean(2)
    squares = pooled.square()
    return (squares.mean(1) if mean else squares.sum(1)), pooled


def pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu):
    channels, length = h.shape[1:]
    dp = torch.zeros_like(pooled)
    if grad_goodness is not None:
        dp = dp + grad_goodness[:, None] * pooled * (2 / channels if mean else 2)
    if grad_pooled is not None:
        dp = dp + grad_pooled
    dh = ops.empty_pooled_like(h)
    return dh.copy_(_mask((dp / length)[:, :, None].expand(h.shape), h, relu))


def goodness_many(h, mean, relu):
    return torch.cat([goodness_forward(x, mean, relu, False, 0.0)[0] for x in h])


def goodness_many_backward(h, grad_goodness, mean, relu):
    grads = grad_goodness.split([x.shape[0] for x in h])
    return [goodness_backward(x, None, g, None, mean, relu, 0.0) for x, g in zip(h, grads, strict=True)]


def linear_goodness(x, weight, bias, mean, relu):
    acc = ops.accumulator_dtype(x)
    y = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return goodness_forward(y, mean, relu, False, 0.0)[0]

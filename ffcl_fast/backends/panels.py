"""Plain PyTorch over row panels: right on any device, memory bounded by one panel, no compiled part needed.

Peak workspace is a panel (:func:`panel_elements`) times a handful of buffers whatever N and M are. It is bound by the
matrix product at large D and by the element-wise passes over the panel at small D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..reference import (  # noqa: F401
    add_class_positives,
    add_positives_,
    class_odds,
    class_sums,
    normalize_backward,
    normalize_forward,
    positive_odds,
)
from .panels_similarity import cache_size, siglip, similarity_backward, similarity_forward, tile_of  # noqa: F401


def unavailable(op: str, x: Tensor) -> str | None:
    return None if op in globals() else "not written as row panels"


def panel_elements(x: Tensor) -> int:
    """Elements of a panel: as many as a tile of S has."""
    return tile_of(x.device).elements


# --- goodness: blocks of whole rows, so that no temporary is larger than one block -----------------------------------


def _row_blocks(h: Tensor) -> range:
    return range(0, h.shape[0], _block_rows(h))


def _block_rows(h: Tensor) -> int:
    return max(1, panel_elements(h) // max(1, h[0].numel()))


def goodness_forward(h, mean, relu, normalize, eps):
    goodness = h.new_empty(h.shape[0], dtype=ops.accumulator_dtype(h))
    out = h.new_empty(h.shape if normalize else (0, h.shape[1]))
    for i in _row_blocks(h):
        rows = slice(i, i + _block_rows(h))
        goodness[rows], block = reference.goodness_forward(h[rows], mean, relu, normalize, eps)
        if normalize:
            out[rows] = block
    return goodness, out


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    dh = h.new_empty(h.shape)
    for i in _row_blocks(h):
        rows = slice(i, i + _block_rows(h))
        dh[rows] = reference.goodness_backward(
            h[rows],
            goodness[rows],
            None if grad_goodness is None else grad_goodness[rows],
            None if grad_out is None else grad_out[rows],
            mean,
            relu,
            eps,
        )
    return dh


def pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2):
    acc = ops.accumulator_dtype(h1)
    loss, coefficients = h1.new_empty(h1.shape[0], dtype=acc), h1.new_empty((h1.shape[0], 3), dtype=acc)
    d1 = h1.new_empty(h1.shape if need_1 else (0, h1.shape[1]))
    d2 = h1.new_empty(h1.shape if need_2 else (0, h1.shape[1]))
    for i in _row_blocks(h1):
        rows = slice(i, i + _block_rows(h1))
        loss[rows], coefficients[rows], b1, b2 = reference.pair_cosine_forward(
            h1[rows], h2[rows], target[rows], margin, relu, scale, need_1, need_2
        )
        if need_1:
            d1[rows] = b1
        if need_2:
            d2[rows] = b2
    return loss, coefficients, d1, d2


def pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2):
    d1 = h1.new_empty(h1.shape if need_1 else (0, h1.shape[1]))
    d2 = h1.new_empty(h1.shape if need_2 else (0, h1.shape[1]))
    for i in _row_blocks(h1):
        rows = slice(i, i + _block_rows(h1))
        b1, b2 = reference.pair_cosine_backward(
            h1[rows], h2[rows], coefficients[rows], grad[rows], relu, need_1, need_2
        )
        if need_1:
            d1[rows] = b1
        if need_2:
            d2[rows] = b2
    return d1, d2


def scale_(x, factor):
    x.mul_(factor)


def pool_goodness_forward(h, mean, relu):
    acc = ops.accumulator_dtype(h)
    goodness, pooled = h.new_empty(h.shape[0], dtype=acc), h.new_empty(h.shape[:2], dtype=acc)
    for i in _row_blocks(h):
        rows = slice(i, i + _block_rows(h))
        goodness[rows], pooled[rows] = reference.pool_goodness_forward(h[rows], mean, relu)
    return goodness, pooled


def pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu):
    dh = ops.empty_pooled_like(h)
    for i in _row_blocks(h):
        rows = slice(i, i + _block_rows(h))
        dh[rows] = reference.pool_goodness_backward(
            h[rows],
            pooled[rows],
            None if grad_goodness is None else grad_goodness[rows],
            None if grad_pooled is None else grad_pooled[rows],
            mean,
            relu,
        )
    return dh


def goodness_many(h, mean, relu):
    return torch.cat([goodness_forward(x, mean, relu, False, 0.0)[0] for x in h])


def goodness_many_backward(h, grad_goodness, mean, relu):
    grads = grad_goodness.split([x.shape[0] for x in h])
    return [goodness_backward(x, g, g, None, mean, relu, 0.0) for x, g in zip(h, grads, strict=True)]


def linear_goodness(x, weight, bias, mean, relu, of_activation=reference.goodness_forward):
    """`of_activation` takes the goodness of a block of rows of the activation."""
    goodness = x.new_empty(x.shape[0], dtype=ops.accumulator_dtype(x))
    step = max(1, panel_elements(x) // weight.shape[0])
    if x.device.type == "cpu":  # 16-bit products are rounded twice there, and slower than float32's on most CPUs
        weight, bias = weight.to(goodness.dtype), None if bias is None else bias.to(goodness.dtype)
    for i in range(0, x.shape[0], step):
        rows = slice(i, i + step)
        activation = F.linear(x[rows].to(weight.dtype), weight, bias)
        goodness[rows] = of_activation(activation, mean, relu, False, 0.0)[0]
    return goodness

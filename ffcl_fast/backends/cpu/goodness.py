"""The goodness operators on CPU tensors: csrc/goodness.h behind the schemas of :mod:`ffcl_fast.ops`.

float64 tensors, and every tensor where the compiled part is missing, go through :mod:`ffcl_fast.backends.panels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .. import native, panels


def goodness_forward(h, mean, relu, normalize, eps):
    if not native.usable(h):
        return panels.goodness_forward(h, mean, relu, normalize, eps)
    h = _dense(h)
    goodness = h.new_empty(h.shape[0], dtype=torch.float32)
    out = h.new_empty(h.shape if normalize else (0, h.shape[1]))
    status = native.module.goodness_forward(_rows(h, relu), mean, eps, goodness.data_ptr(), _address(out))
    native.check(status, "goodness")
    return goodness, out


def goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps):
    if not native.usable(h):
        return panels.goodness_backward(h, goodness, grad_goodness, grad_out, mean, relu, eps)
    h, dh = _dense(h), h.new_empty(h.shape)
    status = native.module.goodness_backward(
        _rows(h, relu), mean, eps, goodness.data_ptr(), _address(grad_goodness), _address(grad_out), dh.data_ptr()
    )
    native.check(status, "goodness")
    return dh


def pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2):
    if not native.usable(h1):
        return panels.pair_cosine_forward(h1, h2, target, margin, relu, scale, need_1, need_2)
    rows, dim = h1.shape
    d1, d2 = (h1.new_empty((rows, dim) if need else (0, dim)) for need in (need_1, need_2))
    return *pair_cosine_into(h1, h2, target, margin, relu, scale, d1, d2), d1, d2


def pair_cosine_into(h1, h2, target, margin, relu, scale, d1, d2):
    """Loss and coefficients of ``pair_cosine_forward``; the gradients go into ``d1`` and ``d2``, dense or empty."""
    h1, h2 = _dense(h1), _dense(h2)
    loss = h1.new_empty(h1.shape[0], dtype=torch.float32)
    coefficients = h1.new_empty((h1.shape[0], 3), dtype=torch.float32)
    status = native.module.pair_cosine_forward(
        _rows(h1, relu),
        h2.data_ptr(),
        h2.stride(0),
        target.data_ptr(),
        margin,
        scale,
        loss.data_ptr(),
        coefficients.data_ptr(),
        _address(d1),
        _address(d2),
    )
    native.check(status, "pair_cosine")
    return loss, coefficients


def pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2):
    if not native.usable(h1):
        return panels.pair_cosine_backward(h1, h2, coefficients, grad, relu, need_1, need_2)
    h1, h2 = _dense(h1), _dense(h2)
    rows, dim = h1.shape
    d1, d2 = (h1.new_empty((rows, dim) if need else (0, dim)) for need in (need_1, need_2))
    status = native.module.pair_cosine_backward(
        _rows(h1, relu),
        h2.data_ptr(),
        h2.stride(0),
        coefficients.data_ptr(),
        grad.data_ptr(),
        _address(d1),
        _address(d2),
    )
    native.check(status, "pair_cosine")
    return d1, d2


def scale_(x, factor):
    value = factor.item()
    if value != 1.0:
        x.mul_(value)


def pool_goodness_forward(h, mean, relu):
    if not native.usable(h):
        return panels.pool_goodness_forward(h, mean, relu)
    goodness = h.new_empty(h.shape[0], dtype=torch.float32)
    pooled = h.new_empty(h.shape[:2], dtype=torch.float32)
    status = native.module.pool_goodness_forward(_maps(h, relu), mean, goodness.data_ptr(), pooled.data_ptr())
    native.check(status, "pool_goodness")
    return goodness, pooled


def pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu):
    if not native.usable(h):
        return panels.pool_goodness_backward(h, pooled, grad_goodness, grad_pooled, mean, relu)
    dh = ops.empty_pooled_like(h)
    status = native.module.pool_goodness_backward(
        _maps(h, relu), mean, pooled.data_ptr(), _address(grad_goodness), _address(grad_pooled), dh.data_ptr()
    )
    native.check(status, "pool_goodness")
    return dh


def goodness_many(h, mean, relu):
    return torch.cat([goodness_forward(x, mean, relu, False, 0.0)[0] for x in h])


def goodness_many_backward(h, grad_goodness, mean, relu):
    grads = grad_goodness.split([x.shape[0] for x in h])
    return [goodness_backward(x, g, g, None, mean, relu, 0.0) for x, g in zip(h, grads, strict=True)]


def linear_goodness(x, weight, bias, mean, relu):
    return panels.linear_goodness(x, weight, bias, mean, relu, goodness_forward)


def _address(x: Tensor | None) -> int:
    """Where ``x`` starts, 0 for nothing: None or an empty tensor."""
    return x.data_ptr() if x is not None and x.numel() else 0


def _dense(h: Tensor) -> Tensor:
    return h if h.stride(1) == 1 else h.contiguous()


def _rows(h: Tensor, relu: bool):
    rows, dim = h.shape
    threads = torch.get_num_threads()
    return native.module.Activations(h.data_ptr(), rows, dim, h.stride(0), native.DTYPES[h.dtype], relu, threads)


def _maps(h: Tensor, relu: bool):
    last = h.stride(2) != 1
    threads = torch.get_num_threads()
    return native.module.Maps(h.data_ptr(), *h.shape, h.stride(0), last, native.DTYPES[h.dtype], relu, threads)

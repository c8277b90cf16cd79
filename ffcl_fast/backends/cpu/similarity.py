"""The similarity operators on CPU tensors: csrc/similarity.h behind the schemas of :mod:`ffcl_fast.ops`.

float64 tensors, and every tensor where the compiled part is missing, go through :mod:`ffcl_fast.backends.panels`.
Gradients are accumulated in float32: for 16-bit inputs that is a buffer of twice the gradients' size beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, panels

# Floats of exp(S) that a forward pass keeps for its backward pass: 24 MiB. With the panels' own buffers (at most
# 32 MiB, see csrc/similarity_cpu.cpp) all workspace stays under 64 MB at any N.
CACHE_BUDGET = 6 << 20
CACHE_HEADER = 16


def cache_size(q: Tensor, k: Tensor | None):
    """Floats of ``cache``: the normalisers, and as many tiles of exp(S), padded to 12 x 32, as the budget holds."""
    if not _usable(q):
        return panels.cache_size(q, k)
    rows, cols = q.shape[0], 0 if k is None else k.shape[0]
    panel_cols = rows if k is None else cols
    return CACHE_HEADER + 2 * (rows + cols) + torch.sym_min(CACHE_BUDGET, (rows + 12) * (panel_cols + 32))


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    if not _usable(q):
        return panels.similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save)
    rows, cols = q.shape[0], (q if k is None else k).shape[0]
    row_lse = q.new_empty(rows, dtype=torch.float32)
    col_lse = q.new_empty(cols if both and k is not None else 0, dtype=torch.float32)
    cache = q.new_empty(cache_size(q, k) if save else 0, dtype=torch.float32)
    with _Problem(q, k, scale, row_ids, col_ids, exclude) as problem:
        status = native.module.similarity_forward(
            problem, row_lse.data_ptr(), _address(col_lse), _address(cache), cache.numel()
        )
    native.check(status, "similarity_forward")
    return row_lse, col_lse, cache


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    if not _usable(q):
        return panels.similarity_backward(
            q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
        )
    need_k = need_k and k is not None
    dq = q.new_empty(q.shape if need_q else (0, q.shape[1]), dtype=torch.float32)
    dk = q.new_empty(k.shape if need_k else (0, q.shape[1]), dtype=torch.float32)
    row_grad, col_grad = (g.to(torch.float32).contiguous() for g in (row_grad, col_grad))
    with _Problem(q, k, scale, row_ids, col_ids, exclude) as problem:
        status = native.module.similarity_backward(
            problem,
            row_lse.data_ptr(),
            _address(col_lse),
            row_grad.data_ptr(),
            _address(col_grad),
            _address(cache),
            cache.numel(),
            _address(dq),
            _address(dk),
        )
    native.check(status, "similarity_backward")
    return dq.to(q.dtype), dk.to(q.dtype)


def siglip(q, k, scale, bias, positives, need_grad):
    if not _usable(q):
        return panels.siglip(q, k, scale, bias, positives, need_grad)
    sums = torch.zeros(2, dtype=torch.float64)
    dq = q.new_empty(q.shape if need_grad else (0, q.shape[1]), dtype=torch.float32)
    dk = q.new_empty(k.shape if need_grad else (0, q.shape[1]), dtype=torch.float32)
    with _Problem(q, k, scale, None, None, 0) as problem:
        status = native.module.siglip(
            problem, float(bias), positives, sums.data_ptr(), sums.data_ptr() + 8, _address(dq), _address(dk)
        )
    native.check(status, "siglip")
    loss, dbias = sums.to(torch.float32)
    return loss.clone(), dq.to(q.dtype), dk.to(k.dtype), dbias.clone()


def _usable(q: Tensor) -> bool:
    return native.module is not None and q.device.type == "cpu" and q.dtype in native.DTYPES


def _address(x: Tensor) -> int:
    return x.data_ptr() if x.numel() else 0


class _Problem:
    """ffcl::Similarity of some tensors; a context manager so that copies made for their layout live long enough."""

    def __init__(self, q, k, scale, row_ids, col_ids, exclude):
        self.q, self.k = _unit_stride(q), None if k is None else _unit_stride(k)
        self.ids = [None if ids is None else ids.to(torch.int64).contiguous() for ids in (row_ids, col_ids)]
        self.scale, self.exclude = float(scale), exclude

    def __enter__(self):
        q, k = self.q, self.k
        return native.module.Similarity(
            q=q.data_ptr(),
            k=0 if k is None else k.data_ptr(),
            rows=q.shape[0],
            cols=(q if k is None else k).shape[0],
            dim=q.shape[1],
            q_stride=q.stride(0),
            k_stride=0 if k is None else k.stride(0),
            dtype=native.DTYPES[q.dtype],
            scale=self.scale,
            row_ids=0 if self.ids[0] is None else self.ids[0].data_ptr(),
            col_ids=0 if self.ids[1] is None else self.ids[1].data_ptr(),
            exclude=self.exclude,
            threads=torch.get_num_threads(),
        )

    def __exit__(self, *_):
        return False


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

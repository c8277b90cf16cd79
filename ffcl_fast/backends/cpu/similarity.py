"""The similarity operators on CPU tensors: csrc/similarity.h behind the schemas of :mod:`ffcl_fast.ops`.

float64 tensors, and every tensor where the compiled part is missing, go through :mod:`ffcl_fast.backends.panels`.
Gradients are accumulated in float32: for 16-bit inputs that is a buffer of twice the gradients' size beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, panels

# Floats of exp(S) that a forward pass keeps for its backward pass: 24 MiB, and half as much again between two sets of
# rows up to WIDE. With the panels' own buffers (at most 32 MiB, 20 up to WIDE, see csrc/similarity_engine.h) all
# workspace stays under 64 MB at any N.
CACHE_BUDGET = 6 << 20
WIDE = 2048
CACHE_HEADER = 16


def cache_size(q: Tensor, k: Tensor | None):
    """Floats of ``cache``: the normalisers, and as many tiles of exp(S), padded to whole tiles, as the budget holds."""
    if not native.usable(q):
        return panels.cache_size(q, k)
    return kept_size(q.shape[0], k)


def kept_size(rows, k: Tensor | None):
    """The same of ``rows`` rows."""
    cols = 0 if k is None else k.shape[0]
    panel_cols = rows if k is None else cols
    budget = CACHE_BUDGET if k is None or k.shape[1] > WIDE else CACHE_BUDGET * 3 // 2
    return CACHE_HEADER + 2 * (rows + cols) + torch.sym_min(budget, (rows + 32) * (panel_cols + 32))


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    if not native.usable(q):
        return panels.similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save)
    return Problem(q, k, scale, row_ids, col_ids, exclude).forward(both, save)


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    if not native.usable(q):
        return panels.similarity_backward(
            q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
        )
    problem = Problem(q, k, scale, row_ids, col_ids, exclude)
    dq, dk = problem.backward(row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k and k is not None)
    return dq.to(q.dtype), dk.to(q.dtype)


def siglip(q, k, scale, bias, positives, need_q, need_k):
    if not native.usable(q):
        return panels.siglip(q, k, scale, bias, positives, need_q, need_k)
    loss, dbias = (q.new_empty((), dtype=torch.float32) for _ in range(2))
    dq = q.new_empty(q.shape if need_q else (0, q.shape[1]), dtype=torch.float32)
    dk = q.new_empty(k.shape if need_k else (0, q.shape[1]), dtype=torch.float32)
    problem = Problem(q, k, scale, None, None, 0)
    native.call(
        "siglip",
        problem.arguments,
        float(bias),
        positives,
        loss.data_ptr(),
        dbias.data_ptr(),
        address(dq),
        address(dk),
    )
    return loss, dq.to(q.dtype), dk.to(k.dtype), dbias


class Problem:
    """ffcl::Similarity of some tensors; it keeps the copies alive that their layout asked for."""

    def __init__(self, q, k, scale, row_ids, col_ids, exclude):
        q, k = (None if x is None else unit_stride(x) for x in (q, k))
        row_ids, col_ids = (None if i is None else i.to(torch.int64).contiguous() for i in (row_ids, col_ids))
        self._held = (q, k, row_ids, col_ids)
        self.rows, self.dim = q.shape
        self.cols = self.rows if k is None else k.shape[0]
        self.k, self.like = k, q
        self.arguments = native.module.Similarity(
            q=q.data_ptr(),
            k=address(k),
            rows=self.rows,
            cols=self.cols,
            dim=self.dim,
            q_stride=q.stride(0),
            k_stride=0 if k is None else k.stride(0),
            dtype=native.DTYPES[q.dtype],
            scale=float(scale),
            row_ids=address(row_ids),
            col_ids=address(col_ids),
            exclude=exclude,
            threads=torch.get_num_threads(),
        )

    def forward(self, both: bool, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = self._new(self.rows)
        col_lse = self._new(self.cols if both and self.k is not None else 0)
        cache = self._new(kept_size(self.rows, self.k) if save else 0)
        native.call(
            "similarity_forward", self.arguments, row_lse.data_ptr(), address(col_lse), address(cache), cache.numel()
        )
        return row_lse, col_lse, cache

    def backward(self, row_lse, col_lse, row_grad, col_grad, cache, need_q: bool, need_k: bool):
        """float32 gradients of the rows that the products saw, empty where not needed."""
        dq, dk = self._new(self.rows if need_q else 0, self.dim), self._new(self.cols if need_k else 0, self.dim)
        if not need_q and not need_k:
            return dq, dk
        row_grad, col_grad = (g.to(torch.float32).contiguous() for g in (row_grad, col_grad))
        native.call(
            "similarity_backward",
            self.arguments,
            row_lse.data_ptr(),
            address(col_lse),
            row_grad.data_ptr(),
            address(col_grad),
            address(cache),
            cache.numel(),
            address(dq),
            address(dk),
        )
        return dq, dk

    def _new(self, *shape) -> Tensor:
        return self.like.new_empty(shape, dtype=torch.float32)


def address(x: Tensor | None) -> int:
    return x.data_ptr() if x is not None and x.numel() else 0


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()

"""The contrast operators on CPU tensors: csrc/contrast.h.

Nothing of (N, D) is allocated but the gradients, in float32 as the kernels accumulate them. Where the compiled part is
missing nobody calls these: see :func:`ffcl_fast.backends.fuses`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import ops
from .. import native
from .similarity import address, kept_size, unit_stride

LINE = 16  # floats of a cache line, on which the cache begins


def contrast_state_size(rows, k: Tensor | None, positive: Tensor | None, unit_q, unit_k, both, save):
    """Floats of ffcl::contrast_forward's state: norms, normalisers and slopes, then whole lines of a cache."""
    norms = (rows * (1 if positive is None else 2) if unit_q else 0) + (k.shape[0] if unit_k and k is not None else 0)
    vectors = norms + rows * (4 if both else 2)
    return (vectors + LINE - 1) // LINE * LINE + (kept_size(rows, k) if save else 0)


def contrast_forward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, save
):
    loss = _Loss(q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind)
    out, count = loss.new(loss.rows), loss.new(loss.rows if kind == ops.CONTRAST_MEAN else 0)
    state = loss.new(contrast_state_size(loss.rows, k, positive, unit_q, unit_k, both, save))
    native.call("contrast_forward", loss.native, state.data_ptr(), state.numel(), address(count), out.data_ptr())
    return out, count, state


def contrast_backward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, count, state,
    grad, need_q, need_k, need_positive, need_scale,
):  # fmt: skip
    loss = _Loss(q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind)
    if grad.shape != (loss.rows,):
        raise ValueError(f"grad must have shape ({loss.rows},), got {tuple(grad.shape)}")
    grad = grad.to(torch.float32).contiguous()
    dim = q.shape[1]
    dq = loss.new(loss.rows if need_q or need_scale else 0, dim)
    dk = loss.new(k.shape[0] if need_k and k is not None else 0, dim)
    d_positive = loss.new(loss.rows if need_positive and positive is not None else 0, dim)
    d_scale = loss.new()
    native.call(
        "contrast_backward",
        loss.native,
        state.data_ptr(),
        state.numel(),
        address(count),
        grad.data_ptr(),
        address(dq),
        address(dk),
        address(d_positive),
        d_scale.data_ptr() if need_scale else 0,
    )
    if not need_scale:
        d_scale.zero_()
    if not need_q:
        dq = loss.new(0, dim)
    if q.dtype != torch.float32:
        dq, dk, d_positive = dq.to(q.dtype), dk.to(q.dtype), d_positive.to(q.dtype)
    return dq, dk, d_positive, d_scale


class _Loss:
    """ffcl::ContrastLoss of some tensors; it keeps the copies alive that their layout asked for."""

    def __init__(
        self, q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind
    ):  # fmt: skip
        q, tail, k, positive = (x if x is None else unit_stride(x) for x in (q, tail, k, positive))
        row_ids, col_ids = (i if i is None else i.to(torch.int64).contiguous() for i in (row_ids, col_ids))
        order, group = (i if i is None else i.contiguous() for i in (order, group))
        value = float(scale)
        self._held = (q, tail, k, positive, row_ids, col_ids, order, group)
        self._like = q
        split, dim = q.shape
        self.rows = rows = split if tail is None else split + tail.shape[0]
        _check(q, tail, k, positive, order, group, rows, both, kind)
        self.native = native.module.ContrastLoss(
            q=q.data_ptr(),
            tail=address(tail),
            k=address(k),
            positive=address(positive),
            rows=rows,
            split=split,
            cols=rows if k is None else k.shape[0],
            dim=dim,
            q_stride=q.stride(0),
            tail_stride=0 if tail is None else tail.stride(0),
            k_stride=0 if k is None else k.stride(0),
            positive_stride=0 if positive is None else positive.stride(0),
            dtype=native.DTYPES[q.dtype],
            scale=math.copysign(max(abs(value), ops.SMALLEST_SCALE), value),  # ops.away_from_zero
            row_ids=address(row_ids),
            col_ids=address(col_ids),
            exclude=exclude,
            order=address(order),
            group=address(group),
            unit_q=unit_q,
            unit_k=unit_k,
            eps=ops.UNIT_EPS,
            both=both,
            kind=kind,
            threads=torch.get_num_threads(),
        )

    def new(self, *shape: int) -> Tensor:
        return self._like.new_empty(shape, dtype=torch.float32)


def _check(q, tail, k, positive, order, group, rows: int, both: bool, kind: int) -> None:
    for name, x in (("tail", tail), ("k", k), ("positive", positive)):
        if x is not None and (x.shape[1] != q.shape[1] or x.dtype != q.dtype):
            raise ValueError(f"{name} must be as wide as q and of its dtype: {tuple(x.shape)} {x.dtype}")
    if not q.shape[1]:
        raise ValueError("rows must not be empty")
    if kind == ops.CONTRAST_MEAN and order is None:
        raise ValueError("CONTRAST_MEAN needs classes")
    if both and (k is None or k.shape[0] != rows):
        raise ValueError("both needs as many rows in k as in q")
    if order is not None:
        if k is not None or positive is not None:
            raise ValueError("classes of positives are for k and positive None")
        if group is None or order.shape != (rows,) or group.shape != (rows,):
            raise ValueError(f"order and group must each have {rows} elements")
        if order.dtype != torch.int64 or group.dtype != torch.int64:
            raise TypeError(f"order and group must be int64, got {order.dtype} and {group.dtype}")
        return
    if k is None:
        raise ValueError("each row needs a positive: in its class, in positive or in k")
    if (k if positive is None else positive).shape[0] != rows:
        raise ValueError(f"there must be {rows} positives, one for each row")

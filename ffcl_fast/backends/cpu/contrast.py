"""The contrast operators on CPU tensors: csrc/similarity.h with csrc/rows.h around it.

Nothing of (N, D) is allocated but the gradients, in float32 as the kernels accumulate them. Where the compiled part is
missing nobody calls these: see :func:`ffcl_fast.backends.fuses`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .. import native
from .similarity import Problem, address, unit_stride


def contrast_forward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k, both, kind, save
):
    rows = _Rows(q, tail, k, positive, order, group, unit_q, unit_k)
    if kind == ops.CONTRAST_MEAN and order is None:
        raise ValueError("CONTRAST_MEAN needs classes")
    if both and (k is None or k.shape[0] != rows.count):
        raise ValueError("both needs as many rows in k as in q")
    rows.fill_norms()
    count = rows.new(0)
    if kind == ops.CONTRAST_MEAN:
        row_ids, count = rows.class_ids()
    row_lse, col_lse, cache = rows.problem(scale, row_ids, col_ids, exclude).forward(both, save)
    dot = rows.dots()
    loss, slope, col_slope = rows.new(rows.count), rows.new(rows.count), rows.new(col_lse.numel())
    for add, (lse, out) in enumerate(((row_lse, slope), (col_lse, col_slope))):
        if lse.numel():
            native.call(
                "contrast_losses",
                rows.count,
                lse.data_ptr(),
                dot.data_ptr(),
                address(count),
                float(scale),
                kind,
                bool(add),
                loss.data_ptr(),
                out.data_ptr(),
            )
    return loss, count, row_lse, col_lse, slope, col_slope, cache, rows.norms


def contrast_backward(
    q, tail, k, positive, scale, row_ids, col_ids, exclude, order, group, unit_q, unit_k,
    count, row_lse, col_lse, slope, col_slope, cache, norms, grad, need_q, need_k, need_positive, need_scale,
):  # fmt: skip
    rows = _Rows(q, tail, k, positive, order, group, unit_q, unit_k, norms)
    if count.numel():
        row_ids, _ = rows.class_ids()
    row_grad, col_grad, weight = rows.new(rows.count), rows.new(col_slope.numel()), rows.new(rows.count)
    grad = grad.to(torch.float32).contiguous()
    if grad.shape != (rows.count,):
        raise ValueError(f"grad must have shape ({rows.count},), got {tuple(grad.shape)}")
    native.call(
        "contrast_weights",
        rows.count,
        grad.data_ptr(),
        slope.data_ptr(),
        address(col_slope),
        address(count),
        float(scale),
        row_grad.data_ptr(),
        address(col_grad),
        weight.data_ptr(),
    )
    need_k, need_positive = need_k and k is not None, need_positive and positive is not None
    problem = rows.problem(scale, row_ids, col_ids, exclude)
    dq, dk = problem.backward(row_lse, col_lse, row_grad, col_grad, cache, need_q or need_scale, need_k)
    d_positive = q.new_zeros((rows.count if need_positive else 0, q.shape[1]), dtype=torch.float32)
    rows.add_positives(weight, dq, dk, d_positive)
    inner = rows.finish(rows.z, dq)
    if unit_k:
        rows.finish(rows.z_k, dk)
    if unit_q:
        rows.finish(rows.z_positive, d_positive)
    d_scale = inner.new_zeros(())
    if need_scale:  # in self-similarity q takes the part of both sides of each product
        d_scale = inner.sum() / (scale * 2 if k is None else scale)
    dq = dq if need_q else dq.new_empty((0, dq.shape[1]))
    return dq.to(q.dtype), dk.to(q.dtype), d_positive.to(q.dtype), d_scale.to(torch.float32)


class _Rows:
    """ffcl::Rows of the rows z of q with tail, of k and of positive; None for those that are not there."""

    def __init__(self, q, tail, k, positive, order, group, unit_q: bool, unit_k: bool, norms: Tensor | None = None):
        q, tail, k, positive = (None if x is None else unit_stride(x) for x in (q, tail, k, positive))
        self.count = q.shape[0] + (0 if tail is None else tail.shape[0])
        self._check(q, tail, k, positive, order, group)
        self._q, self._tail, self._k, self._positive, self._order, self._group = q, tail, k, positive, order, group
        self._threads = torch.get_num_threads()
        sizes = ops.norm_sizes(self.count, k, positive, unit_q, unit_k)
        self.norms = self.new(sum(sizes)) if norms is None else norms
        self._q_norm, self._k_norm, self._positive_norm = self.norms.split(sizes)
        self.z = self._native(q, self._q_norm, tail)
        self.z_k = self._native(k, self._k_norm)
        self.z_positive = self._native(positive, self._positive_norm)

    def _check(self, q, tail, k, positive, order, group) -> None:
        for name, x in (("tail", tail), ("k", k), ("positive", positive)):
            if x is not None and (x.shape[1] != q.shape[1] or x.dtype != q.dtype):
                raise ValueError(f"{name} must be as wide as q and of its dtype: {tuple(x.shape)} {x.dtype}")
        if not q.shape[1]:
            raise ValueError("rows must not be empty")
        if order is not None:
            if k is not None or positive is not None:
                raise ValueError("classes of positives are for k and positive None")
            if group is None or order.shape != (self.count,) or group.shape != (self.count,):
                raise ValueError(f"order and group must each have {self.count} elements")
            if order.dtype != torch.int64 or group.dtype != torch.int64:
                raise TypeError(f"order and group must be int64, got {order.dtype} and {group.dtype}")
            return
        if k is None:
            raise ValueError("each row needs a positive: in its class, in positive or in k")
        if (k if positive is None else positive).shape[0] != self.count:
            raise ValueError(f"there must be {self.count} positives, one for each row")

    @staticmethod
    def _native(x: Tensor | None, norm: Tensor, tail: Tensor | None = None):
        if x is None:
            return None
        return native.module.Rows(
            x=x.data_ptr(),
            rows=x.shape[0] + (0 if tail is None else tail.shape[0]),
            dim=x.shape[1],
            stride=x.stride(0),
            dtype=native.DTYPES[x.dtype],
            tail=address(tail),
            split=x.shape[0],
            tail_stride=0 if tail is None else tail.stride(0),
            norm=address(norm),
        )

    def new(self, *shape, dtype=torch.float32) -> Tensor:
        return self._q.new_empty(shape, dtype=dtype)

    def problem(self, scale, row_ids, col_ids, exclude) -> Problem:
        norms = (self._q_norm, self._k_norm)
        return Problem(self._q, self._k, scale, row_ids, col_ids, exclude, self._tail, *norms)

    def fill_norms(self) -> None:
        for z, norm in ((self.z, self._q_norm), (self.z_k, self._k_norm), (self.z_positive, self._positive_norm)):
            if norm.numel():
                native.call("row_norms", z, ops.UNIT_EPS, self._threads, norm.data_ptr())

    def class_ids(self) -> tuple[Tensor, Tensor]:
        ids, count = self.new(self.count, dtype=torch.int64), self.new(self.count)
        native.call("class_ids", self.count, *self._classes(), ids.data_ptr(), count.data_ptr())
        return ids, count

    def dots(self) -> Tensor:
        dot = self.new(self.count, dtype=torch.float64)
        if self._order is not None:
            native.call("class_dots", self.z, *self._classes(), self._threads, dot.data_ptr())
        else:
            native.call("row_dots", self.z, self._positives(), self._threads, dot.data_ptr())
        return dot

    def add_positives(self, weight: Tensor, dq: Tensor, dk: Tensor, d_positive: Tensor) -> None:
        if self._order is not None:
            if dq.numel():
                arguments = (self.z, *self._classes(), weight.data_ptr(), self._threads, dq.data_ptr())
                native.call("add_class_gradient", *arguments)
            return
        for z, grad in ((self._positives(), dq), (self.z, dk if self._positive is None else d_positive)):
            if grad.numel():
                native.call("add_weighted_rows", z, weight.data_ptr(), self._threads, grad.data_ptr())

    def finish(self, z, grad: Tensor) -> Tensor:
        """``grad`` in place from the gradient of z to that of x; returns <z_i, grad_i> before that, (rows,) float64."""
        inner = self.new(grad.shape[0], dtype=torch.float64)
        if grad.numel():
            native.call("finish_gradient", z, ops.UNIT_EPS, self._threads, grad.data_ptr(), inner.data_ptr())
        return inner

    def _classes(self) -> tuple[int, int]:
        self._order, self._group = self._order.contiguous(), self._group.contiguous()
        return self._order.data_ptr(), self._group.data_ptr()

    def _positives(self):
        return self.z_k if self.z_positive is None else self.z_positive

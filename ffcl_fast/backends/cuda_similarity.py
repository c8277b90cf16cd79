"""Normalisers of S = scale q k^T and their gradients on CUDA devices, for float16 and bfloat16.

The gradient goes through panels of G: a kernel writes a panel, the library's matrix product reads it for dq and again
for dk. Workspace: 64 MiB of partial sums at most in the forward pass; one panel and float32 sums of a panel's rows and
of dk (or of dq where k is q) in the backward pass. No atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, native
from .aligned import aligned_rows
from .mixed_products import add_product

PANEL_SIDE = 8192  # 128 MiB of 16-bit numbers
SM80, SM90 = 0, 1  # ffcl::SimilarityWay


def way(x: Tensor) -> int:
    """The kernels that multiply tiles of ``x``: wgmma and TMA on compute capability 9.0, mma elsewhere."""
    return SM90 if cuda.chip(x.device).capability == 90 and native.module.sm90_built() else SM80


class _Problem(NamedTuple):
    """Arguments in the form the kernels want: 16-byte aligned rows, dense ids. k is q for a triangle."""

    q: Tensor
    k: Tensor
    scale: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    exclude: int
    triangle: bool

    def native(self):
        q, k = self.q, self.k
        addresses = (0 if x is None else x.data_ptr() for x in (self.scale, self.row_ids, self.col_ids))
        return native.module.SimilarityCuda(
            q.data_ptr(), k.data_ptr(), q.shape[0], k.shape[0], q.shape[1], q.stride(0), k.stride(0),
            native.DTYPES[q.dtype], *addresses, self.exclude, self.triangle, way(q), *cuda.where(q),
        )  # fmt: skip


def _problem(q, k, scale, row_ids, col_ids, exclude) -> _Problem:
    ids = cuda.dense(row_ids)
    other = ids if k is None or col_ids is None else cuda.dense(col_ids)
    left = aligned_rows(q)
    return _Problem(left, left if k is None else aligned_rows(k), scale.float(), ids, other, exclude, k is None)


def similarity_forward(q, k, scale, row_ids, col_ids, exclude, both, save):
    p = _problem(q, k, scale, row_ids, col_ids, exclude)
    both = both and k is not None
    arguments = p.native()
    row_lse = q.new_empty(q.shape[0], dtype=torch.float32)
    col_lse = q.new_empty(k.shape[0] if both else 0, dtype=torch.float32)
    size = native.module.similarity_workspace_cuda(arguments)
    workspace = q.new_empty(max(0, size), dtype=torch.float32)
    # Of columns that nobody wants the kernels write no rests.
    new = q.new_empty if both or k is None else q.new_zeros
    rests = new(cuda.cache_size(q, k) if save else 0, dtype=torch.float32)
    cuda.run(
        "similarity_forward", arguments, row_lse, col_lse if both else None, rests if save else None, workspace,
        workspace.numel(), q=q, k=p.k,
    )  # fmt: skip
    return row_lse, col_lse, rests


def similarity_backward(
    q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad, cache, need_q, need_k
):
    need_k = need_k and k is not None
    p = _problem(q, k, scale, row_ids, col_ids, exclude)
    if not (need_q or need_k) or 0 in (p.q.shape[0], p.k.shape[0]):
        dq, dk = ((len(x) if need else 0, q.shape[1]) for x, need in ((q, need_q), (p.k, need_k)))
        return q.new_zeros(dq), q.new_zeros(dk)
    gain = 2.0**14 if q.dtype == torch.float16 else 1.0  # keeps small probabilities out of float16's subnormals
    both = k is not None and col_grad.numel() > 0
    sides = [(row_lse, row_grad), (col_lse, col_grad)] if both else [(row_lse, row_grad)]
    (rows_vectors, *others), frame = _vectors(p, sides, cache, gain)
    cols_vectors = rows_vectors if k is None else others[0] if both else None
    arguments = p.native()

    def fill(panel: Tensor, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        cuda.run(
            "similarity_panel", arguments, rows_vectors, cols_vectors, frame, r0, r1, c0, c1, panel, panel.stride(0),
            q=q, k=p.k,
        )  # fmt: skip
        return panel[: r1 - r0, : c1 - c0]

    return _walk(q, k, fill, frame[2], need_q, need_k)


def _vectors(
    p: _Problem, sides: list[tuple[Tensor, Tensor]], cache: Tensor, gain: float
) -> tuple[list[Tensor], Tensor]:
    """What the panels read of (normalisers, their gradient) of rows and maybe of columns: (3, n) each, and the frame.

    ``cache``: what rounding took from the normalisers, and maybe from more after them, or empty. See similarity_cuda.h.
    """
    sides = [(cuda.dense(lse.float()), cuda.dense(grad.float())) for lse, grad in sides]
    cache = cuda.dense(cache.float())
    sizes = [len(x) for x in (p.q, p.k)][: len(sides)]
    if any(x.shape != (n,) for n, side in zip(sizes, sides, strict=True) for x in side) or 0 < len(cache) < sum(sizes):
        given = [tuple(x.shape) for side in sides for x in side]
        raise ValueError(
            f"normalisers and their gradients must be {sizes} long, a cache all of it; got {given}, {len(cache)}"
        )
    vectors = [lse.new_empty(3, len(lse)) for lse, _ in sides]
    ranges, frame = p.scale.new_empty(3 * native.module.VECTOR_RANGES), p.scale.new_empty(3)
    arguments, first = [], 0
    for (lse, grad), to in zip(sides, vectors, strict=True):
        rests = cache.data_ptr() + first * cache.element_size() if len(cache) else 0
        arguments.append((lse.data_ptr(), rests, grad.data_ptr(), len(lse), to.data_ptr()))
        first += len(lse)
    rows, cols = arguments if len(sides) == 2 else (*arguments, (0, 0, 0, 0, 0))
    cuda.run("similarity_vectors", rows, cols, p.scale, gain, ranges, frame, *cuda.where(p.q), q=p.q, k=p.k)
    return vectors, frame


def _walk(q: Tensor, k: Tensor | None, fill, factor: Tensor, need_q: bool, need_k: bool) -> tuple[Tensor, Tensor]:
    """dq = factor G k and dk = factor G^T q panel by panel; without k, G is symmetric and its upper half is enough."""
    other = q if k is None else k
    (rows, width), cols = q.shape, other.shape[0]
    dq, dk = q.new_empty(rows if need_q else 0, width), q.new_empty(cols if need_k else 0, width)
    panel = q.new_empty(min(PANEL_SIDE, rows), -(-min(PANEL_SIDE, cols) // 16) * 16)
    row_sums = q.new_empty(rows if k is None else min(PANEL_SIDE, rows), width, dtype=torch.float32)
    col_sums = row_sums if k is None else q.new_empty(cols if need_k else 0, width, dtype=torch.float32)
    for r0 in range(0, rows, PANEL_SIDE):
        r1 = min(rows, r0 + PANEL_SIDE)
        sums = row_sums[r0:r1] if k is None else row_sums[: r1 - r0]
        for c0 in range(r0 if k is None else 0, cols, PANEL_SIDE):
            c1 = min(cols, c0 + PANEL_SIDE)
            g = fill(panel, r0, r1, c0, c1)
            # With k = q, row 0's panels were the first to write to every row.
            if need_q:
                add_product(sums, g, other[c0:c1], first=c0 == 0)
            if need_k or (k is None and c0 != r0):
                add_product(col_sums[c0:c1], g.T, q[r0:r1], first=r0 == 0)
        if need_q:
            torch.mul(sums, factor, out=dq[r0:r1])
    if need_k:
        torch.mul(col_sums, factor, out=dk)
    return dq, dk

"""What the similarity tests share: the backends under test, random problems, and plain PyTorch to compare with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ffcl_fast import backends, ops, reference

NAMES = ("reference", "panels", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# `terms` of a normaliser: what rounds the exponentials and their sum, 2^-22 of it in float32, is as much of its
# logarithm however near 0 that is. Plain PyTorch is exact for a lone pair.
LSE_TERMS = 2.0**-22 / 2e-6
# (N, M, D): ragged, no multiple of a block, with every 1; M is ignored where k is q.
SHAPES = ((1, 1, 1), (1, 7, 3), (5, 1, 17), (33, 65, 96), (130, 71, 200), (257, 300, 384), (65, 40, 1152))
MODES = {
    "none": ops.EXCLUDE_NONE,
    "diagonal": ops.EXCLUDE_DIAGONAL,
    "same_id": ops.EXCLUDE_SAME_ID,
    "same_id_off_diagonal": ops.EXCLUDE_SAME_ID_OFF_DIAGONAL,
    "different_id": ops.EXCLUDE_DIFFERENT_ID,
}


def device_of(name: str) -> str:
    return "cuda" if name in ("triton", "cuda") else "cpu"


def _problem(name: str) -> str | None:
    """Why the backend called ``name`` cannot be tested here, or None."""
    if name == "cpu":
        native = pytest.importorskip("ffcl_fast.backends.native")
        if not hasattr(native.module, "similarity_forward"):
            return "ffcl_fast._native was not built with the similarity kernels"
    return "no CUDA device" if device_of(name) == "cuda" and not torch.cuda.is_available() else None


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(_problem(name)), reason=f"{name}: {_problem(name)}"))
    for name in NAMES
]


def vectors(n: int, d: int, dtype: torch.dtype = torch.float32, kind: str = "isotropic", device: str = "cpu") -> Tensor:
    """(n, d) random rows: ``isotropic`` or ``cone`` (a common mean), of unit length; ``raw``: lengths about 1.5."""
    x = torch.randn(n, d, dtype=torch.float64)
    if kind == "raw":
        return (x * (1.5 / d**0.5)).to(dtype).to(device)
    if kind == "cone":
        x = x + 2 * torch.randn(d, dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype).to(device)


def problem(
    n: int, m: int, d: int, dtype, mode: int, symmetric: bool, scale: float = 14.0, kind="isotropic", device="cpu"
):
    """Random arguments (q, k, scale, row_ids, col_ids, exclude) of the similarity operators."""
    q = vectors(n, d, dtype, kind, device)
    k = None if symmetric else vectors(m, d, dtype, kind, device)
    with_ids = mode not in (ops.EXCLUDE_NONE, ops.EXCLUDE_DIAGONAL)
    row_ids = torch.randint(0, 5, (n,), device=device) if with_ids else None
    col_ids = torch.randint(0, 5, (m,), device=device) if with_ids and not symmetric else None
    return q, k, torch.tensor(scale, dtype=ops.accumulator_dtype(q), device=device), row_ids, col_ids, mode


def to_float64(args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def eager(q, k, scale, row_ids, col_ids, exclude, row_grad, col_grad):
    """row_lse, col_lse, dq, dk by plain PyTorch under autograd in the inputs' dtype; what anyone would write."""
    q = q.detach().clone().requires_grad_()
    other = q if k is None else k.detach().clone().requires_grad_()
    s = scale.to(q.dtype) * (q @ other.T)
    mask = reference.excluded_pairs(q.shape[0], other.shape[0], row_ids, col_ids, exclude, q.device)
    if mask is not None:
        s = s.masked_fill(mask, -torch.inf)
    row, col = torch.logsumexp(s, 1), torch.logsumexp(s, 0)
    loss = (torch.where(row == -torch.inf, 0.0, row).double() * row_grad).sum()
    if col_grad.numel():
        loss = loss + (torch.where(col == -torch.inf, 0.0, col).double() * col_grad).sum()
    # The rows and columns without a pair have no gradient: autograd gives NaN there.
    loss.backward()
    dk = q.new_empty(0, q.shape[1]) if k is None else other.grad
    return row.detach(), col.detach(), q.grad.nan_to_num(0.0), dk.nan_to_num(0.0)


def parts(args, row_lse, col_lse, row_grad, col_grad) -> tuple[Tensor, Tensor]:
    """``terms`` of each element of dq and dk: what it is the sum of, which may cancel; rounding is relative to that.

    The root of the sum of its squared terms, one for each pair, or the root mean square of the rows' or the columns'
    part, if that is larger. Everything is float64; ``args`` are the operators' first six.
    """
    q, k, scale = args[:3]
    alone, both = k is None, k is not None and col_grad.numel() > 0
    logits = reference.similarity_matrix(*args)

    def gradients(lse, grad):
        return grad * torch.exp(logits - torch.where(lse == -torch.inf, torch.inf, lse))

    of_rows = gradients(row_lse[:, None], row_grad[:, None])
    of_cols = of_rows.T if alone else gradients(col_lse[None, :], col_grad[None, :]) if both else 0.0 * of_rows
    squares = (of_rows.abs() + of_cols.abs()).square()
    sides = (squares, q if alone else k), (squares.T, q)
    sizes = [(scale.abs() * (g @ x.square()).sqrt()).nan_to_num(0.0) for g, x in sides]
    if both:
        for size, shares in ((sizes[0], (of_rows @ k, of_cols @ k)), (sizes[1], (of_rows.T @ q, of_cols.T @ q))):
            size.clamp_(min=max(float((scale * x).square().mean().sqrt()) for x in shares))
    return sizes[0], q.new_empty(0, q.shape[1]) if alone else sizes[1]


def available(name: str, op: str, x: Tensor) -> bool:
    return backends.load(name).unavailable(op, x) is None

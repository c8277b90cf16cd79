"""What the goodness tests share: the backends under test and random activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ffcl_fast.backends import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, D): ragged, no multiple of a vector or a block, with every 1, and rows longer than a block of the sums.
SHAPES = ((1, 1), (1, 3), (7, 1), (5, 31), (33, 96), (4, 1152), (3, 4096), (2, 20011))
ODD_VALUES = (float("nan"), float("inf"))

NATIVE = pytest.mark.skipif(native.module is None, reason=f"no compiled part: {native.problem}")
BACKENDS = ("reference", "panels", pytest.param("cpu", marks=NATIVE))


def activations(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str | torch.device = "cpu"
) -> Tensor:
    """Random activations with a mean, so that sums and cosines are far from zero; drawn on their device."""
    return (scale * (torch.randn(shape, dtype=torch.float64, device=device) + 0.3)).to(dtype)


def direction_terms(h: Tensor, grad_out: Tensor | None, relu: bool, eps: float) -> float:
    """``terms`` of the gradient through a normalised activation: what of ``grad_out`` is orthogonal to the sample,
    the difference of two terms of this size, and next to nothing where a sample has one element."""
    if grad_out is None:
        return 0.0
    a = h.double().clamp(min=0) if relu else h.double()
    size = a.square().mean(1, keepdim=True).sqrt()
    return float(torch.where(size == 0, 0.0, grad_out / (size + eps)).square().mean().sqrt())


def unchanged(args) -> list[tuple[Tensor, Tensor]]:
    """The tensors of ``args`` with copies, for :func:`assert_unchanged`."""
    return [(a, a.clone()) for a in args if isinstance(a, Tensor)]


def assert_unchanged(before: list[tuple[Tensor, Tensor]]) -> None:
    for now, then in before:
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "an input was changed"

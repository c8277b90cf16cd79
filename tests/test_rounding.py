"""16-bit outputs are rounded to nearest, ties to even, as PyTorch converts: the cast must not add a bias."""

from __future__ import annotations

import pytest
import torch

import ffcl_fast.functional as fn

BACKENDS = ("cpu", "panels")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_gradients_are_rounded_to_nearest(dtype, backend):
    """dh = 2 h upstream: products of an element and a number, each of which has one nearest 16-bit number."""
    h = torch.randn(9, 3001).to(dtype).requires_grad_()
    upstream = 1 + torch.rand(9)
    (dh,) = torch.autograd.grad(fn.goodness(h, backend=backend), h, upstream)
    exact = 2.0 * upstream.double()[:, None] * h.detach().double()
    spacing = torch.finfo(dtype).eps * torch.exp2(exact.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor())
    # half a spacing, and what the float32 product before it may be off
    assert bool(((dh.double() - exact).abs() <= 0.5005 * spacing).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_ties_go_to_the_even_number(dtype):
    """Gradients of 1.5 spacings and 2.5 spacings above a power of two: both to the number with 2 spacings."""
    eps = torch.finfo(dtype).eps
    h = torch.ones(2, 40).to(dtype).requires_grad_()
    (dh,) = torch.autograd.grad(fn.goodness(h, backend="cpu"), h, (1 + eps * torch.tensor([1.5, 2.5])) / 2)
    assert torch.equal(dh.double(), torch.full((2, 40), 1 + 2 * eps, dtype=torch.float64))

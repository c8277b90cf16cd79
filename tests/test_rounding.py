"""16-bit outputs are rounded to nearest, ties to even, as PyTorch converts: the cast must not add a bias."""

from __future__ import annotations

import plain
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


def test_the_rule_of_the_other_tests_knows_numbers_below_the_normal_ones():
    """plain.compare, of a float16 gradient near 4e-6, where one unit in the last place is 1.5 % of it."""
    x, weight = torch.randn(40, 129).half(), torch.randn(40, 129, dtype=torch.float64)

    def written_out(x):
        return (x * weight.to(x.dtype)).sum() * 2.0**-15

    value = written_out(x)
    exact = weight * 2.0**-15 * plain.upstream(value.double())
    plain.compare([value, exact.half()], written_out, [x])
    with pytest.raises(AssertionError, match="gradient 1"):
        plain.compare([value, (1.1 * exact).half()], written_out, [x])

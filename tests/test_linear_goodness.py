"""Goodness of a linear layer without its activation: every backend against float64, and the function on top."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import BACKENDS, DTYPES, activations, assert_unchanged, unchanged

from ffcl_fast import functional as ff
from ffcl_fast.backends import panels
from helpers import assert_close_to_reference

_ops = torch.ops.ffcl_fast


def plain(x, weight, bias, mean, relu):
    y = F.linear(x, weight, bias)
    a = torch.relu(y) if relu else y
    return a.square().mean(1) if mean else a.square().sum(1)


def layer(n, k, h, dtype=torch.float32, with_bias=True):
    """Inputs and weights whose products have a size of about one."""
    weight = (activations(h, k) / k**0.5).to(dtype)
    return activations(n, k, dtype=dtype), weight, activations(h, dtype=dtype) if with_bias else None


def gradients(function, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
    out = function(*leaves, *[None] * (len(tensors) - len(leaves)))
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((29, 1, 1), (37, 20, 45), (150, 65, 700), (9, 3, 4096)), ids=str)
@pytest.mark.parametrize("with_bias", (False, True), ids=("weight", "bias"))
def test_linear_goodness(backend, dtype, shape, with_bias):
    for mean, relu in ((False, False), (True, True)):
        arguments = layer(*shape, dtype, with_bias)
        before = unchanged(arguments)
        ours = _ops.linear_goodness(*arguments, mean, relu, backend)
        wide = [None if t is None else t.double() for t in arguments]
        assert ours.dtype == torch.float32
        assert_close_to_reference(ours, plain(*arguments, mean, relu), plain(*wide, mean, relu), name="goodness")
        assert_unchanged(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", (False, True), ids=("weight", "bias"))
def test_gradients_by_panels(dtype, with_bias, monkeypatch):
    monkeypatch.setitem(ff.linear_goodness.__globals__["_PANEL"], "cpu", 700)  # ten rows a panel
    arguments, grad = layer(45, 33, 70, dtype, with_bias), torch.randn(45)
    for kind, relu in (("sum_squares", False), ("mean_squares", True)):
        mean = kind == "mean_squares"
        ours = gradients(lambda *t, kind=kind, relu=relu: ff.linear_goodness(*t, kind, relu=relu), arguments, grad)
        eager = gradients(lambda *t, mean=mean, relu=relu: plain(*t, mean, relu), arguments, grad)
        wide = [None if t is None else t.double() for t in arguments]
        truth = gradients(lambda *t, mean=mean, relu=relu: plain(*t, mean, relu), wide, grad)
        for name, a, b, c in zip(("dx", "dweight", "dbias"), ours, eager, truth, strict=False):
            assert a.dtype == dtype
            assert_close_to_reference(a, b, c, factor=3, name=name)


@pytest.mark.parametrize("relu", (False, True))
def test_gradcheck(relu):
    x, weight, bias = (t.double().requires_grad_() for t in layer(5, 4, 3))
    fixed_x, fixed_bias = x.detach(), bias.detach()
    for function, inputs in (
        (lambda x, w, b: ff.linear_goodness(x, w, b, relu=relu), (x, weight, bias)),
        (lambda x, w: ff.linear_goodness(x, w, fixed_bias, "mean_squares", relu=relu), (x, weight)),
        (lambda w: ff.linear_goodness(fixed_x, w, relu=relu), (weight,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_strides_and_nan(backend):
    x, weight, bias = layer(6, 5, 7)
    for b in (None, bias):
        torch.library.opcheck(_ops.linear_goodness.default, (x, weight, b, True, True, backend))
    expected = _ops.linear_goodness(x, weight, bias, False, True, backend)
    ours = _ops.linear_goodness(x.T.contiguous().T, weight.T.contiguous().T, bias, False, True, backend)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(_ops.linear_goodness(x[4:5], weight, bias, False, True, backend), expected[4:5])
    x[2, 3] = torch.nan
    ours = _ops.linear_goodness(x, weight, bias, False, True, backend)
    assert ours.isnan().nonzero().tolist() == [[2]]


def test_the_activation_is_never_whole(monkeypatch):
    monkeypatch.setattr(panels, "panel_elements", lambda x: 400)
    seen = []
    monkeypatch.setattr(panels.F, "linear", lambda x, *w, run=F.linear: seen.append(x.shape[0]) or run(x, *w))
    _ops.linear_goodness(*layer(45, 3, 40), False, True, "panels")
    assert seen == [10, 10, 10, 10, 5]


def test_autocast():
    x, weight, bias = layer(8, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g = ff.linear_goodness(x, weight.requires_grad_(), bias, relu=True)
    expected = ff.linear_goodness(*(t.detach().bfloat16() for t in (x, weight, bias)), relu=True)
    assert g.dtype == torch.float32 and torch.equal(g.detach(), expected)
    g.sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_bad_arguments():
    x, weight, bias = layer(3, 4, 5)
    for call, error, words in (
        (lambda: ff.linear_goodness(3, weight), TypeError, "x must be a tensor"),
        (lambda: ff.linear_goodness(x[0], weight), ValueError, "x must have 2 dimensions"),
        (lambda: ff.linear_goodness(x, weight[:, :3]), ValueError, "weight must be as wide as x"),
        (lambda: ff.linear_goodness(x, weight.double()), TypeError, "weight must have the dtype of x"),
        (lambda: ff.linear_goodness(x, weight, bias[:4]), ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        (lambda: ff.linear_goodness(x, weight, bias.double()), TypeError, "bias must have the dtype of x"),
        (lambda: ff.linear_goodness(x, weight, bias, "cubes"), ValueError, "kind must be"),
        (lambda: ff.linear_goodness(x, weight, backend="gpu"), ValueError, "backend must be"),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("n, k, width", ((97, 33, 130), (130, 5, 97), (130, 6, 97)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sample_keeps_its_nan(n, k, width, dtype):
    """Gradients of the other samples stay finite: a product must not read past the end of an odd row."""
    x, weight = torch.randn(n, k).to(dtype), torch.randn(width, k).to(dtype)
    x[n // 2, 0] = torch.nan
    x.requires_grad_()
    ff.linear_goodness(x, weight).sum().backward()
    assert (~x.grad.isfinite()).any(1).nonzero().flatten().tolist() == [n // 2]

"""Triton goodness kernels against the float64 reference, under the interpreter: `make test-triton`."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import DTYPES, ODD_VALUES, activations, direction_terms
from guards import guarded, inside_nan  # noqa: F401

from ffcl_fast import GoodnessLoss, backends, functional, ops, reference
from ffcl_fast.backends.triton import config, launch, rows
from helpers import assert_close_to_reference

many = importlib.import_module("ffcl_fast.backends.triton.goodness_many")
OPS = torch.ops.ffcl_fast
EPS = 0.05
pytestmark = pytest.mark.usefixtures("guarded")

# (N, D): in registers, several rows a program; then longer than a block: one program a row, and several.
SHAPES = ((1, 40), (7, 1), (5, 31), (33, 96), (3, 1024), (5, 1300), (2, 3001))


def eager(h, mean, relu):
    """Goodness and normalised activation in plain PyTorch, in h's dtype."""
    a = torch.relu(h) if relu else h
    squares = a.square().mean(1)
    return (squares if mean else a.square().sum(1)), a / (squares.sqrt() + EPS)[:, None]


def eager_pool(h, mean, relu):
    pooled = (torch.relu(h) if relu else h).mean(2)
    return (pooled.square().mean(1) if mean else pooled.square().sum(1)), pooled


def gradient(function, h, options, grads):
    h = h.detach().clone().requires_grad_()
    used = [(o, g.to(o.dtype)) for o, g in zip(function(h, *options), grads, strict=True) if g is not None]
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, h, grads)[0]


def check_goodness(h, mean, relu, strided=True):
    if relu:
        h[:, 0] = 0.5  # no row of zeros, whose norm plain PyTorch cannot differentiate
    x, wide = inside_nan(h) if strided else h, h.double()
    goodness, out = OPS.goodness_forward(x, mean, relu, True, EPS, "triton")
    plain, truth = eager(h, mean, relu), eager(wide, mean, relu)
    assert goodness.dtype == torch.float32 and out.dtype == h.dtype and out.is_contiguous()
    assert_close_to_reference(goodness, plain[0], truth[0], name="goodness")
    assert_close_to_reference(out, plain[1], truth[1], name="out")
    alone, empty = OPS.goodness_forward(x, mean, relu, False, EPS, "triton")
    torch.testing.assert_close(alone, goodness, rtol=1e-6, atol=0)
    assert empty.shape == (0, h.shape[1])
    grad_goodness, grad_out = torch.randn(h.shape[0]), torch.randn(h.shape).to(h.dtype)
    for grads in ((grad_goodness, grad_out), (grad_goodness, None), (None, grad_out)):
        dh = OPS.goodness_backward(x, goodness, *grads, mean, relu, EPS, "triton")
        assert dh.dtype == h.dtype and dh.is_contiguous()
        plain_dh, truth_dh = (gradient(eager, y, (mean, relu), grads) for y in (h, wide))
        terms = direction_terms(h, grads[1], relu, EPS)
        assert_close_to_reference(dh, plain_dh, truth_dh, factor=3, name="dh", terms=terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_goodness(shape, dtype):
    check_goodness(activations(*shape, dtype=dtype), False, False)
    check_goodness(activations(*shape, dtype=dtype), True, True)


@pytest.mark.parametrize("shape", ((3, 2100), (3, 2104)), ids=str)
def test_goodness_of_several_blocks_a_program(monkeypatch, shape):
    monkeypatch.setattr(rows, "MAX_PARTS", 2)
    check_goodness(activations(*shape), False, True, strided=False)


def test_goodness_row_strides():
    base = activations(12, 40)
    for h in (base[:, 3:30], base[:, 8:24], base[::2], base[:1].expand(5, 40), base.T.contiguous().T, base[:, ::2]):
        ours = OPS.goodness_forward(h, False, True, True, EPS, "triton")
        torch.testing.assert_close(ours, OPS.goodness_forward(h.contiguous(), False, True, True, EPS, "triton"))
        grads = torch.randn(h.shape[0]), torch.randn(h.shape)
        ours = OPS.goodness_backward(h, ours[0], *grads, False, True, EPS, "triton")
        dense = reference.goodness_forward(h, False, True, True, EPS)[0]
        torch.testing.assert_close(ours, reference.goodness_backward(h, dense, *grads, False, True, EPS))


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("relu", (False, True), ids=("linear", "relu"))
def test_goodness_not_finite(value, relu):
    for dtype in DTYPES:
        for width, column in ((33, 32), (700, 10), (1100, 1099)):
            h = activations(4, width, dtype=dtype)
            h[2, column] = value
            goodness, out = OPS.goodness_forward(h, False, relu, True, EPS, "triton")
            truth = reference.goodness_forward(h.double(), False, relu, True, EPS)
            assert torch.equal(goodness.isfinite(), truth[0].isfinite())
            assert torch.equal(out.isnan(), truth[1].isnan())
            grads = torch.randn(4), torch.randn(4, width).to(dtype)
            dh = OPS.goodness_backward(h, goodness, *grads, False, relu, EPS, "triton")
            assert dh[[0, 1, 3]].isfinite().all() and not dh[2, column].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros(dtype):
    h = torch.zeros(3, 20, dtype=dtype)
    h[1] = 1
    for relu in (False, True):
        goodness, out = OPS.goodness_forward(h, True, relu, True, 1e-3, "triton")
        assert goodness.tolist() == [0, 1, 0] and not out[[0, 2]].any()
        ones = torch.ones(3, 20, dtype=dtype)
        dh = OPS.goodness_backward(h, goodness, torch.ones(3), ones, True, relu, 1e-3, "triton")
        torch.testing.assert_close(dh[[0, 2]], torch.full((2, 20), 0.0 if relu else 1e3, dtype=dtype))


def test_large_values_do_not_overflow_half_precision():
    h = torch.full((2, 3000), 200.0, dtype=torch.float16)
    goodness, out = OPS.goodness_forward(h, False, False, True, EPS, "triton")
    torch.testing.assert_close(goodness, torch.full((2,), 1.2e8))
    torch.testing.assert_close(out, torch.ones_like(out))


# --- pair cosine -----------------------------------------------------------------------------------------------------


def eager_pair(h1, h2, target, margin, relu):
    h1, h2 = (h.detach().clone().requires_grad_() for h in (h1, h2))
    a1, a2 = (torch.relu(h) if relu else h for h in (h1, h2))
    loss = F.cosine_embedding_loss(a1, a2, target, margin, reduction="none")
    return loss, *torch.autograd.grad(loss.sum(), (h1, h2))


def targets(n):
    return torch.where(torch.rand(n) < 0.5, 1.0, -1.0)


def check_pair(h1, h2, margin, relu):
    target, dtype = targets(h1.shape[0]), h1.dtype
    x1, x2 = inside_nan(h1), inside_nan(h2, 11)
    loss, coefficients, d1, d2 = OPS.pair_cosine_forward(x1, x2, target, margin, relu, 0.5, True, True, "triton")
    truth = eager_pair(h1.double(), h2.double(), target.double(), margin, relu)
    plain = eager_pair(h1.float(), h2.float(), target, margin, relu)
    assert_close_to_reference(loss, plain[0], truth[0], name="loss")
    grad = torch.randn(h1.shape[0])
    separate = OPS.pair_cosine_backward(x1, x2, coefficients, grad, relu, True, True, "triton")
    for i, (fused, other) in enumerate(zip((d1, d2), separate, strict=True)):
        expected = truth[i + 1] * 0.5
        assert_close_to_reference(fused, (plain[i + 1] * 0.5).to(dtype), expected, factor=3, name=f"d{i + 1}")
        expected = truth[i + 1] * grad[:, None].double()
        assert_close_to_reference(other, (plain[i + 1] * grad[:, None]).to(dtype), expected, factor=3, name="later")
    nothing = OPS.pair_cosine_forward(x1, x2, target, margin, relu, 0.5, False, False, "triton")
    torch.testing.assert_close(nothing[:2], (loss, coefficients), rtol=1e-5, atol=1e-9)
    assert nothing[2].shape == nothing[3].shape == (0, h1.shape[1])
    only = OPS.pair_cosine_forward(x1, x2, target, margin, relu, 0.5, False, True, "triton")
    assert torch.equal(only[3], d2) and not only[2].numel()
    only = OPS.pair_cosine_backward(x1, x2, coefficients, grad, relu, True, False, "triton")
    assert torch.equal(only[0], separate[0]) and not only[1].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((5, 31), (33, 96), (3, 512), (5, 700), (2, 1501)), ids=str)
def test_pair_cosine(shape, dtype):
    check_pair(activations(*shape, dtype=dtype), activations(*shape, dtype=dtype), 0.0, False)
    check_pair(activations(*shape, dtype=dtype), activations(*shape, dtype=dtype), 0.2, True)


def test_pair_cosine_of_several_blocks_a_program(monkeypatch):
    monkeypatch.setattr(rows, "MAX_PARTS", 2)
    check_pair(activations(3, 1301), activations(3, 1301), 0.1, True)


@pytest.mark.parametrize("value", ODD_VALUES)
def test_pair_cosine_not_finite(value):
    for dtype in DTYPES:
        for width in (37, 600):
            h1, h2 = activations(4, width, dtype=dtype), activations(4, width, dtype=dtype)
            h2[2, 36] = value
            for label in (1.0, -1.0):
                target = torch.full((4,), label)
                loss, _, d1, d2 = OPS.pair_cosine_forward(h1, h2, target, 0.0, True, 1.0, True, True, "triton")
                assert loss.isfinite().tolist() == [True, True, False, True]
                assert d1[[0, 1, 3]].isfinite().all() and d2[[0, 1, 3]].isfinite().all()
                assert not d2[2, 36].isfinite()


def test_pair_cosine_zeros_margin_and_unknown_targets():
    h1, h2 = activations(4, 9), activations(4, 9)
    h1[0] = 0
    h1[1] = h2[1] = 0
    for label in (1.0, -1.0):
        target = torch.full((4,), label)
        got = OPS.pair_cosine_forward(h1, h2, target, 0.0, False, 1.0, True, True, "triton")
        torch.testing.assert_close((got[0], *got[2:]), eager_pair(h1, h2, target, 0.0, False), rtol=1e-4, atol=1e-6)
    got = OPS.pair_cosine_forward(h1, h2, torch.zeros(4), 0.0, False, 1.0, True, True, "triton")
    assert not any(x.any() for x in got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype):
    for x in (activations(5, 1000, dtype=dtype), activations(9, 6, dtype=dtype).T):
        expected = (x * torch.tensor(-1.7)).clone()
        OPS.scale_(x, torch.tensor(-1.7), "triton")
        assert torch.equal(x, expected)
        OPS.scale_(x, torch.tensor(1.0), "triton")
        assert torch.equal(x, expected)


# --- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("shape", ((6, 1, 1), (3, 5, 7), (5, 33, 49), (2, 70, 65), (2, 3, 300)), ids=str)
def test_pool(shape, last, dtype):
    """Five samples are pooled by a program each, fewer are shared out over channels and positions."""
    n, c, length = shape
    for mean, relu in ((False, False), (True, True)):
        h = activations(n, length, c, dtype=dtype).transpose(1, 2) if last else activations(*shape, dtype=dtype)
        x, wide = inside_nan(h), h.double()
        goodness, pooled = OPS.pool_goodness_forward(x, mean, relu, "triton")
        plain, truth = eager_pool(h, mean, relu), eager_pool(wide, mean, relu)
        assert goodness.dtype == pooled.dtype == torch.float32
        assert_close_to_reference(goodness, plain[0], truth[0], name="goodness")
        assert_close_to_reference(pooled, plain[1], truth[1], name="pooled")
        grad_goodness, grad_pooled = torch.randn(n), torch.randn(n, c)
        for grads in ((grad_goodness, grad_pooled), (grad_goodness, None), (None, grad_pooled)):
            dh = OPS.pool_goodness_backward(x, pooled, *grads, mean, relu, "triton")
            assert dh.dtype == dtype and dh.stride() == ops.empty_pooled_like(h).stride()
            plain_dh, truth_dh = (gradient(eager_pool, y, (mean, relu), grads) for y in (h, wide))
            assert_close_to_reference(dh, plain_dh, truth_dh, factor=3, name="dh")


@pytest.mark.parametrize("value", ODD_VALUES)
def test_pool_not_finite(value):
    for n in (2, 5):
        h = activations(n, 20, 30)
        h[1, 7, 11] = value
        goodness, pooled = OPS.pool_goodness_forward(h, False, True, "triton")
        assert (~pooled.isfinite()).nonzero().tolist() == [[1, 7]]
        assert (~goodness.isfinite()).nonzero().tolist() == [[1]]
        dh = OPS.pool_goodness_backward(h, pooled, torch.ones(n), None, False, True, "triton")
        assert not dh[1, 7, 11].isfinite() and dh[0].isfinite().all()


# --- many layers, and the linear layer -------------------------------------------------------------------------------


def check_many(h, mean, relu):
    x = [inside_nan(y, 3 + i) for i, y in enumerate(h)]
    ours = OPS.goodness_many(x, mean, relu, "triton")
    plain, truth = (torch.cat([eager(y.to(dtype), mean, relu)[0] for y in h]) for dtype in (h[0].dtype, torch.float64))
    assert_close_to_reference(ours, plain, truth, name="goodness")
    grad = torch.randn(ours.shape[0])
    dh = OPS.goodness_many_backward(x, grad, mean, relu, "triton")
    for y, d, g in zip(h, dh, grad.split([y.shape[0] for y in h]), strict=True):
        assert d.dtype == y.dtype and d.shape == y.shape and d.is_contiguous()
        plain, truth = (gradient(eager, z, (mean, relu), (g, None)) for z in (y, y.double()))
        assert_close_to_reference(d, plain, truth, factor=3, name="dh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_layers(dtype):
    shapes = ((5, 31), (17, 8), (3, 700), (1, 1), (9, 96))
    check_many([activations(*s, dtype=dtype) for s in shapes], False, False)
    check_many([activations(*s, dtype=dtype) for s in shapes[:1]], True, True)
    check_many([activations(*s, dtype=dtype) for s in shapes[:4]], True, True)


def test_more_layers_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(many, "MOST", 4)
    check_many([activations(2 + i % 3, 16) for i in range(9)], False, True)


def test_few_long_samples_are_shared_out(monkeypatch):
    monkeypatch.setattr(many, "LONGEST", 1000)
    check_many([activations(1, 1200), activations(1, 30)], True, False)


def test_layerwise_makes_one_launch(monkeypatch):
    """The losses of a list of layers are those of one layer at a time, and take one call of the grouped operators."""
    backend, calls = backends.load("triton"), []
    for name in ("goodness_forward", "goodness_backward", "goodness_many", "goodness_many_backward"):
        run = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, run=run, name=name: calls.append(name) or run(*a))
    pos, neg = ([activations(n, *s).requires_grad_() for s in ((6, 4, 4), (40,))] for n in (3, 5))
    loss = GoodnessLoss("mean_squares", relu=True, backend="triton")
    total, layers = functional.layerwise(loss, pos, neg, weights=[1.0, 0.5], return_layers=True)
    grads = torch.autograd.grad(total, pos + neg)
    assert calls == ["goodness_many", "goodness_many_backward"]
    plain = GoodnessLoss("mean_squares", relu=True, backend="reference")
    each = [plain(p, q) * w for p, q, w in zip(pos, neg, (1.0, 0.5), strict=True)]
    torch.testing.assert_close(layers, [x.detach() for x in each])
    torch.testing.assert_close(grads, torch.autograd.grad(sum(each), pos + neg))


def test_a_table_that_a_graph_may_have_captured_outlives_its_plan():
    arguments = ((5, 64, 64), (3, 32, 32)), (0, 5), 4, torch.device("cpu")
    before = many.plan(*arguments)
    launch.forget_plans()
    after = many.plan(*arguments)
    assert after is not before and after.table is before.table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((19, 1, 1), (37, 20, 45), (16, 64, 16), (50, 130, 7)), ids=str)
def test_linear_goodness(shape, dtype):
    n, k, h = shape
    for mean, relu in ((False, False), (True, True)):
        x, weight = activations(n, k, dtype=dtype), (activations(h, k) / k**0.5).to(dtype)
        for bias in (None, activations(h, dtype=dtype)):
            ours = OPS.linear_goodness(inside_nan(x), inside_nan(weight, 8), bias, mean, relu, "triton")
            plain, truth = (
                eager(F.linear(x.to(d), weight.to(d), None if bias is None else bias.to(d)), mean, relu)[0]
                for d in (dtype, torch.float64)
            )
            assert ours.dtype == torch.float32
            assert_close_to_reference(ours, plain, truth, name="goodness")


def test_linear_goodness_in_chunks_of_rows(monkeypatch):
    x, weight = activations(45, 12), activations(40, 12)
    whole = OPS.linear_goodness(x, weight, None, True, True, "triton")
    monkeypatch.setattr(config, "WORKSPACE", 1)
    assert torch.equal(OPS.linear_goodness(x, weight, None, True, True, "triton"), whole)
    x[3, 5] = torch.nan
    ours = OPS.linear_goodness(x, weight, None, True, True, "triton")
    assert ours.isnan().nonzero().tolist() == [[3]]


def test_a_sum_of_more_slots_than_a_step_takes():
    for partials in (torch.randn(20, 150), torch.randn(150, 20).T):
        out = torch.empty(20)
        rows.add_parts(partials, out, 0.5)
        torch.testing.assert_close(out, partials.sum(1) / 2)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_same_bits_on_every_run():
    h, g, go = activations(3, 2500), torch.randn(3), torch.randn(3, 2500)
    maps = activations(2, 70, 65)

    def once():
        goodness, out = OPS.goodness_forward(h, False, True, True, EPS, "triton")
        yield from (goodness, out, OPS.goodness_backward(h, goodness, g, go, False, True, EPS, "triton"))
        yield from OPS.pair_cosine_forward(h, go, g.sign(), 0.0, True, 1.0, True, True, "triton")
        yield from OPS.pool_goodness_forward(maps, False, True, "triton")
        yield OPS.goodness_many([h, maps[0]], False, True, "triton")
        yield OPS.linear_goodness(maps[0], maps[1], None, False, True, "triton")

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares storage offsets, which guards change
    check, h = torch.library.opcheck, activations(5, 37)
    g = torch.randn(5)
    for normalize in (False, True):
        check(OPS.goodness_forward.default, (h, True, True, normalize, EPS, "triton"))
    check(OPS.goodness_backward.default, (h, g.square(), g, h, True, False, EPS, "triton"))
    pair = OPS.pair_cosine_forward(h, h.flip(0), g.sign(), 0.0, True, 1.0, True, True, "triton")
    check(OPS.pair_cosine_forward.default, (h, h.flip(0), g.sign(), 0.0, True, 1.0, True, False, "triton"))
    check(OPS.pair_cosine_backward.default, (h, h.flip(0), pair[1], g, True, True, True, "triton"))
    check(OPS.scale_.default, (h.clone(), torch.tensor(2.0), "triton"))
    for maps in (activations(2, 3, 9), activations(2, 9, 3).transpose(1, 2)):
        pooled = OPS.pool_goodness_forward(maps, False, False, "triton")[1]
        check(OPS.pool_goodness_forward.default, (maps, False, False, "triton"))
        check(OPS.pool_goodness_backward.default, (maps, pooled, pooled[:, 0].clone(), None, False, True, "triton"))
    check(OPS.goodness_many.default, ([h, h[:3]], True, True, "triton"))
    check(OPS.goodness_many_backward.default, ([h, h[:3]], torch.randn(8), True, True, "triton"))
    check(OPS.linear_goodness.default, (h, h[:2].clone(), g[:2].clone(), True, True, "triton"))


def test_auto_never_means_triton():
    for op in ("goodness_forward", "pair_cosine_forward", "pool_goodness_forward", "goodness_many", "linear_goodness"):
        for device in ("cpu", "cuda"):
            assert backends.choose(op, device, torch.bfloat16)[0] != "triton"
    problem = backends.load("triton").unavailable("goodness_many", torch.zeros(2).double())
    assert "float32, float16 and bfloat16" in problem

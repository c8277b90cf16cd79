"""The Triton goodness kernels on a GPU: the error rule at real sizes, equal bits, CUDA graphs, over 2^31 elements."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import DTYPES, activations
from gpu_cases import OPS, assert_right, check_normalize, three

from ffcl_fast import functional, reference
from helpers import assert_close_to_reference

pytestmark = pytest.mark.gpu
EPS = 1e-4
# Rows in registers, ragged ones, rows walked twice, and rows that several programs share.
SHAPES = ((4099, 96), (517, 1000), (300, 2048), (33, 7001), (301, 16384), (400, 30000), (3, 200704), (1, 1000003))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_goodness(shape, dtype):
    for mean, relu, padding in ((False, False, 0), (True, True, 3), (True, True, 8)):
        h = activations(shape[0], shape[1] + padding, dtype=dtype, device="cuda")[:, : shape[1]]
        assert_right("goodness", three(reference.goodness_forward, (h,), mean, relu, True, EPS))
        goodness = reference.goodness_forward(h, mean, relu, False, EPS)[0]
        grads = torch.randn(shape[0], device="cuda"), torch.randn(shape, device="cuda").to(dtype)
        for used in (grads, (grads[0], None), (None, grads[1])):
            results = three(reference.goodness_backward, (h, goodness, *used), mean, relu, EPS)
            assert_right("its gradient", results, 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_cosine(shape, dtype):
    h1, h2 = (activations(*shape, dtype=dtype, device="cuda") for _ in range(2))
    target = torch.where(torch.rand(shape[0], device="cuda") < 0.5, 1.0, -1.0)
    results = three(reference.pair_cosine_forward, (h1, h2, target), 0.1, True, 0.5, True, True)
    assert_right("pair cosine", results, 3.0)
    coefficients = reference.pair_cosine_forward(h1, h2, target, 0.1, True, 1.0, False, False)[1]
    grad = torch.randn(shape[0], device="cuda")
    results = three(reference.pair_cosine_backward, (h1, h2, coefficients, grad), True, True, True)
    assert_right("its gradient", results, 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("shape", ((64, 64, 3136), (257, 512, 49), (2, 33, 10007), (3000, 5, 7)), ids=str)
def test_pool(shape, last, dtype):
    n, c, length = shape
    h = activations(*((n, length, c) if last else shape), dtype=dtype, device="cuda")
    h = h.transpose(1, 2) if last else h
    assert_right("pool", three(reference.pool_goodness_forward, (h,), True, True))
    pooled = reference.pool_goodness_forward(h, True, True)[1]
    grads = torch.randn(n, device="cuda"), torch.randn(n, c, device="cuda")
    assert_right("its gradient", three(reference.pool_goodness_backward, (h, pooled, *grads), True, True), 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_layers(dtype):
    for rows in (1, 300):
        h = [activations(rows + i, w, dtype=dtype, device="cuda") for i, w in enumerate((50176, 25088, 2000, 128, 37))]
        ours = OPS.goodness_many(h, True, True, "triton")
        truth = reference.goodness_many([x.double() for x in h], True, True)
        assert_close_to_reference(ours, reference.goodness_many(h, True, True), truth, name="goodness")
        grad = torch.randn_like(ours)
        for x, d, g in zip(
            h, OPS.goodness_many_backward(h, grad, True, True, "triton"), grad.split([len(x) for x in h]), strict=True
        ):
            torch.testing.assert_close(d, reference.goodness_backward(x, None, g, None, True, True, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((300, 784, 2000), (1025, 2000, 2000), (33, 100, 70)), ids=str)
def test_linear_goodness(shape, dtype):
    n, k, h = shape
    x, weight = activations(n, k, device="cuda").to(dtype), (activations(h, k, device="cuda") / k**0.5).to(dtype)
    for bias in (None, activations(h, dtype=dtype, device="cuda")):
        ours = OPS.linear_goodness(x, weight, bias, True, True, "triton")
        plain, truth = (
            F.linear(x.to(d), weight.to(d), None if bias is None else bias.to(d)).relu().square().mean(1)
            for d in (dtype, torch.float64)
        )
        assert_close_to_reference(ours, plain, truth, name="goodness")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((65536, 128), (4099, 768), (301, 4096), (33, 7001), (40, 30000)), ids=str)
def test_normalize(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    for out in {dtype, torch.bfloat16}:
        check_normalize(x, torch.randn(shape, device="cuda").to(out))
        check_normalize(x[::2, 8:], torch.randn(shape, device="cuda").to(out)[::2, 8:])


def test_fifty_equal_repeats():
    h, go = (activations(40, 100352, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    g, maps = torch.randn(40, device="cuda"), h.view(40, 32, 3136)

    def once():
        goodness, out = OPS.goodness_forward(h, False, True, True, EPS, "triton")
        yield from (goodness, out, OPS.goodness_backward(h, goodness, g, go, False, True, EPS, "triton"))
        pair = OPS.pair_cosine_forward(h, go, g.sign(), 0.0, True, 1.0, True, True, "triton")
        yield from (*pair, *OPS.pair_cosine_backward(h, go, pair[1], g, True, True, True, "triton"))
        means, pooled = OPS.pool_goodness_forward(maps, False, True, "triton")
        yield from (means, pooled, OPS.pool_goodness_backward(maps, pooled, g, pooled, False, True, "triton"))
        many = OPS.goodness_many([h, go[:3]], False, True, "triton")
        yield from (many, *OPS.goodness_many_backward([h, go[:3]], many, False, True, "triton"))
        yield OPS.linear_goodness(h[:, :784], go[:, :784], None, False, True, "triton")
        z, norm = OPS.normalize_forward(h, 1e-12, h.dtype, "triton")
        yield from (z, norm, OPS.normalize_backward(z, norm, go, 1e-12, h.dtype, "triton"))

    first = list(once())
    for _ in range(49):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_graph_capture_and_replay():
    h = [activations(64, width, device="cuda").requires_grad_() for width in (2000, 2000, 128)]

    def step():
        g, out = functional.goodness_and_normalize(h[0], relu=True, backend="triton")
        loss = sum(x.sum() for x in functional.goodness_many(h, relu=True, backend="triton"))
        return torch.autograd.grad(loss + g.sum() + (out * h[1]).sum(), h)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in h:
            x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def losses(h, relu=True):
    """A scalar of every differentiable goodness of the (N, D) activations h[0] and h[1]."""
    g, out = functional.goodness_and_normalize(h[0], relu=relu, backend="triton")
    target = torch.ones(h[0].shape[0], device=h[0].device)
    pair = functional.pair_cosine(h[0], h[1], target, relu=relu, backend="triton")
    many = functional.goodness_many(list(h), relu=relu, backend="triton")
    return pair + g.float().mean() + (out.float() * out).mean() + sum(x.float().mean() for x in many)


def test_several_streams_at_once():
    sizes = ((999, 777), (40, 100352))
    problems = [[activations(n, d, device="cuda").requires_grad_() for _ in range(2)] for n, d in sizes]
    alone = [torch.autograd.grad(losses(h), h) for h in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        results = []
        for stream, h in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(torch.autograd.grad(losses(h), h))
        torch.cuda.synchronize()
        for expected, result in zip(alone, results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_compile_without_breaks_or_recompiling():
    compiled = torch.compile(losses, fullgraph=True, dynamic=True)
    for n, stance in ((30, "default"), (41, "fail_on_recompile")):
        h = [activations(n, 333, device="cuda").requires_grad_() for _ in range(2)]
        with torch.compiler.set_stance(stance):
            value = compiled(h)
            grads = torch.autograd.grad(value, h)
        torch.testing.assert_close(value, losses(h))
        for a, b in zip(grads, torch.autograd.grad(losses(h), h), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_autocast_keeps_what_it_is_given():
    h = [activations(65, 200, device="cuda").requires_grad_() for _ in range(2)]
    expected = torch.autograd.grad(losses(h), h)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = losses(h)
    assert value.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(value, h), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_more_than_2_31_elements():
    rows, width = 2**20 + 3, 2056
    if torch.cuda.mem_get_info()[0] < 10 * rows * width:
        pytest.skip("less than 22 GB of free GPU memory")
    h = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16)
    h[-1] = 2
    goodness, out = OPS.goodness_forward(h, True, True, True, EPS, "triton")
    assert goodness[:-1].eq(1).all() and goodness[-1] == 4 and out[[0, -1]].eq(1).all()
    dh = OPS.goodness_backward(h, goodness, goodness, None, False, True, EPS, "triton")
    assert dh[0].eq(2).all() and dh[-1].eq(16).all()

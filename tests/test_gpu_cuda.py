"""The CUDA kernels on a GPU: the error rule at real sizes, equal bits, CUDA graphs, indices past 2^31.

Run under ``python -m tools.gpu_check`` and, with small shapes, under compute-sanitizer's memcheck and racecheck
(``-k small``).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import DTYPES, activations, direction_terms
from gpu_cases import DEVICE, OPS, assert_right, both_passes, check_similarity, three
from similarity_cases import problem, to_float64, vectors

from ffcl_fast import backends, functional, ops, reference
from ffcl_fast.backends import cuda_similarity, native
from helpers import assert_close_to_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        native.module is None or not native.module.cuda_built(), reason="built without the CUDA kernels"
    ),
]
EPS = 1e-4
HALVES = (torch.bfloat16, torch.float16)
ROWS = ((4099, 96), (517, 1000), (33, 7001), (301, 16384), (40, 30000), (3, 200704))
# Ragged everywhere; each way of the sums; depths from 64 to 4096.
SHAPES = ((1000, 1300, 64), (777, 515, 128), (513, 1029, 200), (300, 4100, 384), (129, 257, 1152), (260, 500, 4096),
          (1, 70, 64), (70, 1, 9))  # fmt: skip


@pytest.fixture(params=("sm80", "sm90"))
def way(request, monkeypatch):
    """Both kinds of tensor-core kernels, where the device has them."""
    if request.param == "sm90" and cuda_similarity.way(torch.empty(1, 1, device=DEVICE)) != cuda_similarity.SM90:
        pytest.skip("the sm_90a kernels need compute capability 9.0 and a build for it")
    monkeypatch.setattr(cuda_similarity, "way", lambda x: int(request.param == "sm90"))


def compare(function, tensors, *options, factor=2.0):
    assert_right(function.__name__, three(function, tensors, *options, backend="cuda"), factor)


def check_goodness(shape, dtype, padding, mean=True, relu=True):
    rows, width = shape
    h1, h2 = (activations(rows, width + padding, dtype=dtype, device=DEVICE)[:, :width] for _ in range(2))
    compare(reference.goodness_forward, (h1,), mean, relu, True, EPS)
    goodness = reference.goodness_forward(h1, mean, relu, False, EPS)[0]
    grads = torch.randn(rows, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
    for used in (grads, (grads[0], None), (None, grads[1])):
        results = three(reference.goodness_backward, (h1, goodness, *used), mean, relu, EPS, backend="cuda")
        assert_right("goodness_backward", results, 3.0, direction_terms(h1, used[1], relu, EPS))
    target = torch.where(torch.rand(rows, device=DEVICE) < 0.5, 1.0, -1.0)
    coefficients = reference.pair_cosine_forward(h1, h2, target, 0.1, relu, 1.0, False, False)[1]
    for function, tensors, options in (
        (reference.pair_cosine_forward, (h1, h2, target), (0.1, relu, 0.5, True, True)),
        (reference.pair_cosine_forward, (h1, h2, target), (0.1, relu, 0.5, False, False)),
        (reference.pair_cosine_backward, (h1, h2, coefficients, grads[0]), (relu, True, True)),
    ):
        if width > 1:
            compare(function, tensors, *options, factor=3.0)
        elif options[-1]:  # gradients are made
            check_cancelled(three(function, tensors, *options, backend="cuda"), h1, h2)


def check_cancelled(results, h1, h2):
    """Of samples of one element, whose cosine is -1, 0 or 1, and the two terms of its gradient cancel: each a number
    over an element's size."""
    length = torch.minimum(h1.abs(), h2.abs()).double()
    *_, (d1, _, exact1), (d2, _, exact2) = results
    for d, exact in ((d1, exact1), (d2, exact2)):
        rounding = torch.finfo(d.dtype).eps * exact.abs() + torch.finfo(d.dtype).smallest_normal
        assert bool(((d - exact).abs() <= 1e-5 / length + rounding).all())


def check(q, k, scale, row_ids, col_ids, exclude):
    check_similarity(q, k, scale, row_ids, col_ids, exclude, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, dtype):
    for padding in (0, 3, 8):
        check_goodness(shape, dtype, padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_rows(dtype):
    for width in (1, 7, 256, 1032, 2056, 8256):  # a warp or a block a row, whole packs or not
        for padding in (0, 3, 8):
            for mean, relu in ((False, False), (True, True)):
                check_goodness((13, width), dtype, padding, mean, relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("shape", ((64, 64, 3136), (257, 512, 49), (2, 33, 10007), (3000, 5, 7)), ids=str)
def test_pool(shape, last, dtype):
    n, c, length = shape
    h = activations(*((n, length, c) if last else shape), dtype=dtype, device=DEVICE)
    h = h.transpose(1, 2) if last else h
    compare(reference.pool_goodness_forward, (h,), True, True)
    pooled = reference.pool_goodness_forward(h, True, True)[1]
    grads = torch.randn(n, device=DEVICE), torch.randn(n, c, device=DEVICE)
    compare(reference.pool_goodness_backward, (h, pooled, *grads), True, True, factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_layers(dtype):
    h = [activations(300 + i, w, dtype=dtype, device=DEVICE) for i, w in enumerate((50176, 25088, 2000, 128, 37))]
    ours = OPS.goodness_many(h, True, True, "cuda")
    truth = reference.goodness_many([x.double() for x in h], True, True)
    assert_close_to_reference(ours, reference.goodness_many(h, True, True), truth, name="goodness")
    grad = torch.randn_like(ours)
    for x, y in zip(
        OPS.goodness_many_backward(h, grad, True, True, "cuda"),
        reference.goodness_many_backward(h, grad, True, True),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair(shape, dtype, way):
    for exclude in range(5):
        check(*problem(*shape, dtype, exclude, False, device=DEVICE))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n, d", ((1500, 64), (2200, 256), (515, 1000)))
def test_self(n, d, dtype, way):
    for exclude in range(5):
        check(*problem(n, 0, d, dtype, exclude, True, device=DEVICE))


def taken(op, q, *rest):
    """The backend that "auto" stands for, of an operator's first arguments; skips where it never takes these."""
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() != (9, 0) or backends.load("cuda").doubtful(q):
        pytest.skip('"auto" takes the kernels for sm_90a on compute capability 9.0')
    return backends.get("auto", op, q, ops.pairs_of(q, *rest)).__name__.split(".")[-1]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ((8200, 8300, 200), (8195, 8192, 512), (9000, 0, 384)), ids=str)
def test_what_auto_takes_of_both(shape, dtype):
    """These kernels' normalisers, and Triton's gradients from them."""
    for exclude in range(5):
        q, *rest = problem(*shape, dtype, exclude, not shape[1], device=DEVICE)
        ours = "triton" if exclude > ops.EXCLUDE_DIAGONAL else "cuda"
        assert taken("similarity_forward", q, *rest) == ours
        assert taken("similarity_backward", q, *rest) == "triton"
        check_similarity(q, *rest, both=exclude != ops.EXCLUDE_DIAGONAL, backend="auto")


def test_a_large_batch_by_auto():
    """Both passes by these kernels, as it takes them there, on a few rows of many; the same bits again."""
    n, d, scale = 65536 + 24, 512, torch.tensor(20.0, device=DEVICE)
    q, k = (vectors(n, d, torch.bfloat16, device=DEVICE) for _ in range(2))
    for op in ("similarity_forward", "similarity_backward"):
        assert taken(op, q, k, scale, None, None, ops.EXCLUDE_NONE) == "cuda"
    row_lse, col_lse, dq, dk = both_passes(q, k, scale, backend="auto")
    assert all(map(torch.equal, (row_lse, col_lse, dq, dk), both_passes(q, k, scale, backend="auto")))
    rows = torch.tensor([0, 1, n // 2, n - 1], device=DEVICE)
    for x, y, x_lse, y_lse, dx in ((q, k, row_lse, col_lse, dq), (k, q, col_lse, row_lse, dk)):
        s = scale.double() * x[rows].double() @ y.double().T
        torch.testing.assert_close(x_lse[rows].double(), s.logsumexp(1), rtol=1e-6, atol=1e-6)
        g = ((s - x_lse[rows, None]).exp() + (s - y_lse).exp()) / n
        exact = scale.double() * g @ y.double()
        assert float((dx[rows].double() - exact).norm()) <= 4e-3 * float(exact.norm())


@pytest.mark.parametrize("scale", (100.0, 2.0, 300.0, 3000.0))
@pytest.mark.parametrize("kind", ("isotropic", "cone"))
def test_temperatures(scale, kind, way):
    q, k = (vectors(n, 128, torch.bfloat16, kind, DEVICE) for n in (600, 700))
    q[:5] *= -1
    factor = torch.tensor(scale, device=DEVICE)
    check(q, k, factor, None, None, ops.EXCLUDE_NONE)
    check(q, None, factor, None, None, ops.EXCLUDE_DIAGONAL)


@pytest.mark.parametrize("alone", (False, True))
def test_fifty_runs_have_equal_bits(alone, way):
    q, k = vectors(5000, 512, torch.bfloat16, device=DEVICE), vectors(6000, 512, torch.bfloat16, device=DEVICE)
    scale = torch.tensor(20.0, device=DEVICE)
    first = both_passes(q, None if alone else k, scale, backend="cuda")
    for _ in range(50):
        torch.empty(1 << 22, device=DEVICE).fill_(float("nan"))  # what the next buffers are made of
        for a, b in zip(first, both_passes(q, None if alone else k, scale, backend="cuda"), strict=True):
            assert torch.equal(a, b)


def test_graph_capture_and_replay(way):
    q, k = vectors(2000, 128, torch.bfloat16, device=DEVICE), vectors(2500, 128, torch.bfloat16, device=DEVICE)
    scale = torch.tensor(20.0, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_passes(q, k, scale, backend="cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(q, k, scale, backend="cuda")
    q.copy_(vectors(2000, 128, torch.bfloat16, device=DEVICE))
    graph.replay()
    for a, b in zip(captured, both_passes(q, k, scale, backend="cuda"), strict=True):
        assert torch.equal(a, b)


def test_several_streams_at_once(way):
    problems = [(vectors(3000, d, torch.bfloat16, device=DEVICE), vectors(2000, d, torch.bfloat16, device=DEVICE))
                for d in (64, 128, 512)]  # fmt: skip
    scale = torch.tensor(20.0, device=DEVICE)
    alone = [both_passes(q, k, scale, backend="cuda") for q, k in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        results = []
        for stream, (q, k) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(both_passes(q, k, scale, backend="cuda"))
        torch.cuda.synchronize()
        for expected, result in zip(alone, results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def loss_of(image, text):
    """Both families at once."""
    target = torch.ones(image.shape[0], device=image.device)
    return functional.clip(image, text, 20.0, backend="cuda") + functional.pair_cosine(
        image, text, target, backend="cuda"
    )


def test_compile_without_breaks_or_recompiling():
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    for n, stance in ((300, "default"), (417, "fail_on_recompile")):
        leaves = [vectors(n, 192, torch.bfloat16, device=DEVICE).requires_grad_() for _ in range(2)]
        with torch.compiler.set_stance(stance):
            value = compiled(*leaves)
            grads = torch.autograd.grad(value, leaves)
        eager = loss_of(*leaves)
        torch.testing.assert_close(value, eager, rtol=1e-5, atol=1e-6)
        for a, b in zip(grads, torch.autograd.grad(eager, leaves), strict=True):
            # Compiled, the positives are plain PyTorch's; by kernels they are taken from a gradient that was rounded
            # before, so that an element may be off by the rounding of the largest.
            torch.testing.assert_close(a, b, rtol=1e-2, atol=2.0**-8 * float(b.abs().max()))


def test_autocast_multiplies_in_its_dtype():
    image, text = (torch.randn(700, 256, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = functional.clip(F.normalize(image, dim=1), F.normalize(text, dim=1), 20.0, backend="cuda")
    assert value.dtype == torch.float32
    value.backward()
    units = (F.normalize(x.detach().double(), dim=1) for x in (image, text))
    torch.testing.assert_close(value.double(), functional.clip(*units, 20.0, backend="reference"), rtol=2e-3, atol=0)
    assert image.grad.dtype == torch.float32 and bool(image.grad.isfinite().all())


def test_more_than_two_to_the_31_elements(way):
    n, d = (1 << 19) + 256, 4096
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GB of free GPU memory")
    q = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16).mul_(d**-0.5)
    k = vectors(300, d, torch.bfloat16, device=DEVICE)
    row_lse, _, dq, _ = both_passes(q, k, torch.tensor(10.0, device=DEVICE), backend="cuda")
    for i in (0, n // 2, n - 1):
        exact = torch.logsumexp((k.double() @ q[i].double()) * 10.0, 0)
        torch.testing.assert_close(row_lse[i].double(), exact, rtol=1e-5, atol=1e-5)
    assert bool(dq.isfinite().all())


# What compute-sanitizer runs: every kernel once or twice, small.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_goodness(dtype):
    for width in (37, 4000, 60000):
        check_goodness((5, width), dtype, 8)
    for last in (False, True):
        for c, length in ((136, 49), (11, 133)):
            h = activations(2, c, length, dtype=dtype, device=DEVICE)
            h = h.transpose(1, 2).contiguous().transpose(1, 2) if last else h
            compare(reference.pool_goodness_forward, (h,), True, True)


@pytest.mark.parametrize("alone", (False, True))
def test_small_similarity(alone, way):
    for d in (72, 520):
        check(*problem(300, 140, d, torch.bfloat16, ops.EXCLUDE_DIAGONAL, alone, device=DEVICE))


@pytest.mark.parametrize("alone", (False, True))
def test_small_races(alone, way, monkeypatch):
    """What racecheck runs: it stops at the library's 16-bit products, so theirs are made in float64."""

    def add_product(total, a, b, first):
        total.copy_(a.double() @ b.double() + (0.0 if first else total))

    monkeypatch.setattr(cuda_similarity, "add_product", add_product)
    for d, scale in ((72, 10.0), (520, 10.0), (72, 3000.0)):  # the last one's normalisers are computed again
        args = problem(300, 140, d, torch.bfloat16, ops.EXCLUDE_DIAGONAL, alone, scale, device=DEVICE)
        *lse, cache = OPS.similarity_forward(*args, True, True, "cuda")
        exact = reference.similarity_forward(*to_float64(args), True, True)[:2]
        grads = [torch.randn_like(x) for x in lse]
        arguments = [*lse, *grads]
        ours = OPS.similarity_backward(*args, *arguments, cache, True, True, "cuda")
        arguments = [*exact, *(x.double() for x in grads)]
        exact += reference.similarity_backward(*to_float64(args), *arguments, cache[:0].double(), True, True)
        for x, y in zip((*lse, *ours), exact, strict=True):
            assert float((x.double() - y).norm()) <= 1e-2 * float(y.norm())

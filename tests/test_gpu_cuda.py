"""The CUDA kernels on a GPU: the error rule at real sizes, equal bits, CUDA graphs, indices past 2^31.

Run under ``python -m tools.gpu_check`` and, with small shapes, under compute-sanitizer's memcheck and racecheck
(``-k small``).
"""

from __future__ import annotations

import pytest
import torch
from goodness_cases import DTYPES, activations
from similarity_cases import problem, to_float64, vectors

from ffcl_fast import ops, reference
from ffcl_fast.backends import cuda_similarity, native
from helpers import assert_close_to_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        native.module is None or not native.module.cuda_built(), reason="built without the CUDA kernels"
    ),
]
OPS = torch.ops.ffcl_fast
EPS = 1e-4
HALVES = (torch.bfloat16, torch.float16)
ROWS = ((4099, 96), (517, 1000), (33, 7001), (301, 16384), (40, 30000), (3, 200704))
# Ragged everywhere; each way of the sums; depths from 64 to 4096.
SHAPES = ((1000, 1300, 64), (777, 515, 128), (513, 1029, 200), (300, 4100, 384), (129, 257, 1152), (260, 500, 4096),
          (1, 70, 64), (70, 1, 9))  # fmt: skip


@pytest.fixture(params=("sm80", "sm90"))
def way(request, monkeypatch):
    """Both kinds of tensor-core kernels, where the device has them."""
    if request.param == "sm90" and cuda_similarity.way(torch.empty(1, 1, device="cuda")) != cuda_similarity.SM90:
        pytest.skip("the sm_90a kernels need compute capability 9.0 and a build for it")
    monkeypatch.setattr(cuda_similarity, "way", lambda x: int(request.param == "sm90"))


def compare(function, tensors, *options, factor=2.0):
    ours = getattr(OPS, function.__name__)(*tensors, *options, "cuda")
    plain = function(*tensors, *options)
    truth = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in tensors), *options)
    results = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, plain, truth))
    for i, (x, y, z) in enumerate(zip(*results, strict=True)):
        assert_close_to_reference(x, y, z, factor=factor, name=f"{function.__name__}, output {i}")


def check_goodness(shape, dtype, padding):
    rows, width = shape
    h1, h2 = (activations(rows, width + padding, dtype=dtype).cuda()[:, :width] for _ in range(2))
    compare(reference.goodness_forward, (h1,), True, True, True, EPS)
    goodness = reference.goodness_forward(h1, True, True, False, EPS)[0]
    grads = torch.randn(rows, device="cuda"), torch.randn(shape, device="cuda").to(dtype)
    compare(reference.goodness_backward, (h1, goodness, *grads), True, True, EPS, factor=3.0)
    target = torch.where(torch.rand(rows, device="cuda") < 0.5, 1.0, -1.0)
    compare(reference.pair_cosine_forward, (h1, h2, target), 0.1, True, 0.5, True, True, factor=3.0)
    coefficients = reference.pair_cosine_forward(h1, h2, target, 0.1, True, 1.0, False, False)[1]
    compare(reference.pair_cosine_backward, (h1, h2, coefficients, grads[0]), True, True, True, factor=3.0)


def check_similarity(q, k, scale, row_ids, col_ids, exclude):
    head = q, k, scale, row_ids, col_ids, exclude
    ours = OPS.similarity_forward(*head, True, True, "cuda")
    eager = reference.similarity_forward(*head, True, True)
    truth = reference.similarity_forward(*to_float64(head), True, True)
    for name, x, y, z in zip(("row_lse", "col_lse"), ours, eager, truth, strict=False):
        assert_close_to_reference(x, y, z, name=name)
    weights = [torch.randn_like(x) / max(1, x.numel()) for x in truth[:2]]

    def rest(dtype):
        return *(x.to(dtype) for x in (*truth[:2], *weights)), ours[2], True, k is not None

    grads = OPS.similarity_backward(*head, *rest(torch.float32), "cuda")
    plain = reference.similarity_backward(*head, *rest(torch.float32))
    exact = reference.similarity_backward(*to_float64(head), *rest(torch.float64))
    for name, x, y, z in zip(("dq", "dk"), grads, plain, exact, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(shape, dtype):
    for padding in (0, 3, 8):
        check_goodness(shape, dtype, padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("shape", ((64, 64, 3136), (257, 512, 49), (2, 33, 10007), (3000, 5, 7)), ids=str)
def test_pool(shape, last, dtype):
    n, c, length = shape
    h = (activations(n, length, c, dtype=dtype).transpose(1, 2) if last else activations(*shape, dtype=dtype)).cuda()
    compare(reference.pool_goodness_forward, (h,), True, True)
    pooled = reference.pool_goodness_forward(h, True, True)[1]
    grads = torch.randn(n, device="cuda"), torch.randn(n, c, device="cuda")
    compare(reference.pool_goodness_backward, (h, pooled, *grads), True, True, factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_layers(dtype):
    h = [activations(300 + i, w, dtype=dtype).cuda() for i, w in enumerate((50176, 25088, 2000, 128, 37))]
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
        check_similarity(*problem(*shape, dtype, exclude, False, device="cuda"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n, d", ((1500, 64), (2200, 256), (515, 1000)))
def test_self(n, d, dtype, way):
    for exclude in range(5):
        check_similarity(*problem(n, 0, d, dtype, exclude, True, device="cuda"))


@pytest.mark.parametrize("scale", (100.0, 2.0, 300.0, 3000.0))
@pytest.mark.parametrize("kind", ("isotropic", "cone"))
def test_temperatures(scale, kind, way):
    q, k = (vectors(n, 128, torch.bfloat16, kind, "cuda") for n in (600, 700))
    q[:5] *= -1
    factor = torch.tensor(scale, device="cuda")
    check_similarity(q, k, factor, None, None, ops.EXCLUDE_NONE)
    check_similarity(q, None, factor, None, None, ops.EXCLUDE_DIAGONAL)


def both_passes(q, k, scale):
    row_lse, col_lse, cache = OPS.similarity_forward(q, k, scale, None, None, 0, True, True, "cuda")
    u, v = torch.ones_like(row_lse) / q.shape[0], torch.ones_like(col_lse) / q.shape[0]
    gradients = OPS.similarity_backward(
        q, k, scale, None, None, 0, row_lse, col_lse, u, v, cache, True, k is not None, "cuda"
    )
    return row_lse, col_lse, *gradients


@pytest.mark.parametrize("alone", (False, True))
def test_fifty_runs_have_equal_bits(alone, way):
    q, k = vectors(5000, 512, torch.bfloat16, device="cuda"), vectors(6000, 512, torch.bfloat16, device="cuda")
    scale = torch.tensor(20.0, device="cuda")
    first = both_passes(q, None if alone else k, scale)
    for _ in range(50):
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # what the next buffers are made of
        for a, b in zip(first, both_passes(q, None if alone else k, scale), strict=True):
            assert torch.equal(a, b)


def test_graph_capture_and_replay(way):
    q, k = vectors(2000, 128, torch.bfloat16, device="cuda"), vectors(2500, 128, torch.bfloat16, device="cuda")
    scale = torch.tensor(20.0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_passes(q, k, scale)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(q, k, scale)
    q.copy_(vectors(2000, 128, torch.bfloat16, device="cuda"))
    graph.replay()
    for a, b in zip(captured, both_passes(q, k, scale), strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements(way):
    n, d = (1 << 19) + 256, 4096
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GB of free GPU memory")
    q = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).mul_(d**-0.5)
    k = vectors(300, d, torch.bfloat16, device="cuda")
    row_lse, _, dq, _ = both_passes(q, k, torch.tensor(10.0, device="cuda"))
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
            h = activations(2, c, length, dtype=dtype).cuda()
            h = h.transpose(1, 2).contiguous().transpose(1, 2) if last else h
            compare(reference.pool_goodness_forward, (h,), True, True)


@pytest.mark.parametrize("alone", (False, True))
def test_small_similarity(alone, way):
    for d in (72, 520):
        check_similarity(*problem(300, 140, d, torch.bfloat16, ops.EXCLUDE_DIAGONAL, alone, device="cuda"))

"""What only a GPU can show: the error rule at real sizes, equal bits, graphs, streams, compile, autocast, big indices.

Run by ``python -m tools.gpu_check``; skipped where there is no CUDA device.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ffcl_fast import functional, ops, reference
from helpers import assert_close_to_reference

pytestmark = pytest.mark.gpu
OPS = torch.ops.ffcl_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, M, D): ragged everywhere, both gradient paths, each depth of a step, one column, one row.
SHAPES = [
    (1000, 1300, 96),
    (777, 515, 128),
    (513, 1029, 200),
    (300, 4100, 384),
    (129, 257, 1152),
    (1, 70, 64),
    (70, 1, 9),
]
SELF = [(1500, 64), (1029, 128), (2200, 256), (515, 1000)]


def unit(n, d, dtype, cone=0.0):
    """Unit rows; `cone` is the size of a mean added before normalising."""
    x = torch.randn(n, d, device="cuda")
    return F.normalize(x + cone * torch.randn(d, device="cuda"), dim=1).to(dtype)


def ids(n, classes):
    return torch.randint(0, classes, (n,), device="cuda")


def double(x):
    return None if x is None else x.double()


def check(q, k, scale, row_ids=None, col_ids=None, exclude=0, both=True):
    """Forward and gradient of the Triton kernels against float64 by the project's rule."""
    scale = torch.tensor(float(scale), device="cuda")
    head = scale, row_ids, col_ids, exclude
    ours = OPS.similarity_forward(q, k, *head, both, True, "triton")
    truth = reference.similarity_forward(q.double(), double(k), *head, both, True)
    eager = reference.similarity_forward(q, k, *head, both, True)
    for name, x, y, z in zip(("row_lse", "col_lse"), ours[:2], eager[:2], truth[:2], strict=True):
        assert_close_to_reference(x, y, z, name=name)
    weights = [torch.randn_like(x) / max(1, x.numel()) for x in ours[:2]]

    def arguments(dtype):
        return *(x.to(dtype) for x in (*truth[:2], *weights)), ours[2], True, True

    grads = OPS.similarity_backward(q, k, *head, *arguments(torch.float32), "triton")
    exact = reference.similarity_backward(
        q.double(), double(k), scale.double(), row_ids, col_ids, exclude, *arguments(torch.float64)
    )
    plain = reference.similarity_backward(q, k, *head, *arguments(torch.float32))
    for name, x, y, z in zip(("dq", "dk"), grads, plain, exact, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_similarity_pair(n, m, d, dtype):
    q, k = unit(n, d, dtype), unit(m, d, dtype)
    for exclude in range(5):
        check(q, k, 14.3, ids(n, 9), ids(m, 9), exclude, both=exclude % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", SELF)
def test_similarity_self(n, d, dtype):
    q = unit(n, d, dtype)
    for exclude in range(5):
        row_ids = ids(n, 9)
        check(q, None, 14.3, row_ids, row_ids, exclude)


@pytest.mark.parametrize("scale", [100.0, 14.3, 2.0, 300.0, 3000.0])
@pytest.mark.parametrize("cone", [0.0, 3.0])
def test_similarity_temperatures(scale, cone):
    for d in (128, 512):
        q, k = unit(1000, d, torch.bfloat16, cone), unit(1200, d, torch.bfloat16, cone)
        q[:5] *= -1  # rows whose best cosine is far below the others'
        check(q, k, scale)
        check(q, None, scale, exclude=ops.EXCLUDE_DIAGONAL)


def test_float32_is_float32_unless_torch_allows_tf32(monkeypatch):
    q, k = unit(512, 512, torch.float32), unit(512, 512, torch.float32)
    scale = torch.tensor(20.0, device="cuda")
    truth = reference.similarity_forward(q.double(), k.double(), scale, None, None, 0, False, False)[0]

    def error():
        ours = OPS.similarity_forward(q, k, scale, None, None, 0, False, False, "triton")[0]
        return float((ours - truth).abs().max())

    exact = error()
    assert exact < 2e-5
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert exact < error() < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", [True, False])
def test_siglip(positives, dtype):
    for n, m, d in [(777, 1029, 200), (1024, 1024, 768), (300, 70, 64)]:
        q, k = unit(n, d, dtype), unit(m, d, dtype)
        scale, bias = torch.tensor(10.0, device="cuda"), torch.tensor(-10.0, device="cuda")
        ours = OPS.siglip(q, k, scale, bias, positives, True, "triton")
        truth = reference.siglip(q.double(), k.double(), scale.double(), bias.double(), positives, True)
        eager = reference.siglip(q, k, scale, bias, positives, True)
        for name, x, y, z in zip(("loss", "dq", "dk", "dbias"), ours, eager, truth, strict=True):
            assert_close_to_reference(x, y, z, factor=2.0 if name == "loss" else 3.0, name=name)


def both_passes(q, k, scale, exclude=0):
    row_lse, col_lse, cache = OPS.similarity_forward(q, k, scale, None, None, exclude, True, True, "triton")
    u, v = torch.ones_like(row_lse) / q.shape[0], torch.ones_like(col_lse) / q.shape[0]
    return (
        row_lse,
        col_lse,
        *OPS.similarity_backward(q, k, scale, None, None, exclude, row_lse, col_lse, u, v, cache, True, True, "triton"),
    )


@pytest.mark.parametrize("d", [128, 512])
@pytest.mark.parametrize("alone", [False, True])
def test_fifty_runs_have_equal_bits(d, alone):
    q, k = unit(5000, d, torch.bfloat16), None if alone else unit(6000, d, torch.bfloat16)
    scale = torch.tensor(20.0, device="cuda")
    first = both_passes(q, k, scale)
    for _ in range(50):
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # what the next buffers are made of
        for a, b in zip(first, both_passes(q, k, scale), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("d", [128, 512])
def test_graph_capture_and_replay(d):
    q, k = unit(2000, d, torch.bfloat16), unit(2500, d, torch.bfloat16)
    scale = torch.tensor(20.0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both_passes(q, k, scale)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(q, k, scale)
    for factor in (20.0, 5.0):
        q.copy_(unit(2000, d, torch.bfloat16))
        scale.fill_(factor)
        graph.replay()
        for a, b in zip(captured, both_passes(q, k, scale), strict=True):
            assert torch.equal(a, b)


def test_several_streams_at_once():
    problems = [(unit(3000, d, torch.bfloat16), unit(2000, d, torch.bfloat16)) for d in (64, 128, 256, 512)]
    scale = torch.tensor(20.0, device="cuda")
    alone = [both_passes(q, k, scale) for q, k in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(5):
        results = []
        for stream, (q, k) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(both_passes(q, k, scale))
        torch.cuda.synchronize()
        for expected, result in zip(alone, results, strict=True):
            for a, b in zip(expected, result, strict=True):
                assert torch.equal(a, b)


def test_compile_without_breaks_or_recompiling():
    def loss(image, text, scale):
        return functional.clip(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n, stance in ((300, "default"), (417, "fail_on_recompile"), (1200, "fail_on_recompile")):
        leaves = [torch.randn(n, 192, device="cuda", requires_grad=True) for _ in range(2)]
        leaves.append(torch.tensor(20.0, device="cuda", requires_grad=True))
        with torch.compiler.set_stance(stance):
            value = compiled(*leaves)
            grads = torch.autograd.grad(value, leaves)
        eager = loss(*leaves)
        torch.testing.assert_close(value, eager, rtol=1e-5, atol=1e-6)
        for a, b in zip(grads, torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_autocast_multiplies_in_its_dtype():
    image, text = (torch.randn(700, 256, device="cuda", requires_grad=True) for _ in range(2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = functional.clip(F.normalize(image, dim=1), F.normalize(text, dim=1), 20.0, backend="triton")
    assert value.dtype == torch.float32
    value.backward()
    with torch.no_grad():
        exact = functional.clip(
            F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1), 20.0, backend="reference"
        )
    torch.testing.assert_close(value.double(), exact, rtol=2e-3, atol=0)
    assert image.grad.dtype == torch.float32 and bool(image.grad.isfinite().all())


def _sampled_rows(q, k, scale, rows):
    return torch.stack([torch.logsumexp((k.double() @ q[i].double()) * scale, 0) for i in rows])


def test_more_than_two_to_the_31_elements():
    # q has 2^31 + 2^20 elements: the last rows lie past what 32 bits reach.
    d = 4096
    n = (1 << 19) + 256
    q = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).mul_(d**-0.5)
    k = unit(300, d, torch.bfloat16)
    scale = torch.tensor(10.0, device="cuda")
    row_lse, col_lse, dq, dk = both_passes(q, k, scale)
    rows = [0, n // 2, n - 2, n - 1]
    torch.testing.assert_close(row_lse[rows].double(), _sampled_rows(q, k, 10.0, rows), rtol=1e-5, atol=1e-5)
    s = 10.0 * q[-256:].double() @ k.double().T
    g = (s - row_lse[-256:, None].double()).exp() / n + (s - col_lse[None].double()).exp() / n
    exact = 10.0 * g @ k.double()
    assert float((dq[-256:].double() - exact).norm() / exact.norm()) < 1e-2
    assert bool(dk.isfinite().all())


@pytest.mark.parametrize("alone", [True, False])
def test_a_million_rows(alone):
    n, d = 1 << 20, 64
    q = unit(n, d, torch.bfloat16)
    k = None if alone else unit(n, d, torch.bfloat16)
    scale = torch.tensor(10.0, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    exclude = ops.EXCLUDE_DIAGONAL if alone else 0
    row_lse, _, dq, dk = both_passes(q, k, scale, exclude)
    assert torch.cuda.max_memory_allocated() - before < 2 << 30
    rows = [0, 12345, n - 1]
    keys = q if alone else k
    for i in rows:
        s = 10.0 * (keys.double() @ q[i].double())
        if alone:
            s[i] = -torch.inf
        torch.testing.assert_close(row_lse[i].double(), torch.logsumexp(s, 0), rtol=1e-5, atol=1e-5)
    assert bool(dq.isfinite().all()) and bool(dk.isfinite().all())

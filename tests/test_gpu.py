"""What only a GPU can show: the error rule at real sizes, equal bits, graphs, streams, compile, autocast, big indices.

Run by ``python -m tools.gpu_check``; skipped where there is no CUDA device.
"""

from __future__ import annotations

import every_loss
import pytest
import torch
import torch.nn.functional as F
from gpu_cases import DTYPES, OPS, both_passes, check_siglip, check_similarity, ids, unit

from ffcl_fast import functional, ops, reference

pytestmark = pytest.mark.gpu
# (N, M, D): ragged everywhere, both gradient paths, each depth of a step, one column, one row.
SHAPES = [
    (1000, 1300, 96),
    (777, 515, 128),
    (513, 1029, 200),
    (300, 4100, 384),
    (129, 257, 1152),
    (130, 65, 4096),
    (1, 70, 64),
    (70, 1, 9),
]
SELF = [(1500, 64), (1029, 128), (2200, 256), (515, 1000)]
# Whole losses of two views (N, D) and a scale: masks, class sums and positives besides the similarity kernels.
LOSSES = {
    "clip": lambda x, y, scale: functional.clip(x, y, scale, backend="triton"),
    "siglip": lambda x, y, scale: functional.siglip(x, y, scale, -10.0, backend="triton"),
    "nt_xent": lambda x, y, scale: functional.nt_xent(x, y, 1 / scale, backend="triton"),
    "sup_con": lambda x, y, scale: functional.sup_con(
        torch.stack((x, y), 1), torch.arange(x.shape[0], device=x.device) % 10, temperature=1 / scale, backend="triton"
    ),
}


def views(n, d):
    """Leaves for LOSSES."""
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    return *(unit(n, d, torch.bfloat16).requires_grad_() for _ in range(2)), scale


def step(name, leaves):
    value = LOSSES[name](*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def exclusions(index, dtype):
    """Two of the ten (exclusion, both sums or one): all come over the shapes, and each is seconds of compiling."""
    first = 2 * (index + 2 * DTYPES.index(dtype))
    return [((first + i) % 5, (first + i) // 5 % 2 == 0) for i in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_similarity_pair(n, m, d, dtype):
    q, k = unit(n, d, dtype), unit(m, d, dtype)
    for exclude, both in exclusions(SHAPES.index((n, m, d)), dtype):
        check_similarity(q, k, 14.3, ids(n, 9), ids(m, 9), exclude, both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", SELF)
def test_similarity_self(n, d, dtype):
    q = unit(n, d, dtype)
    for exclude, _ in exclusions(SELF.index((n, d)), dtype):
        row_ids = ids(n, 9)
        check_similarity(q, None, 14.3, row_ids, row_ids, exclude)


@pytest.mark.parametrize("d", [96, 512])
def test_similarity_of_rows_inside_others(d):
    """Rows apart, off 16 bytes, of one another's memory, and across: with the copy engine and without it."""
    base = unit(600, d + 16, torch.bfloat16)
    views = base[:300, 8 : d + 8], base[300:, 5 : d + 5], base[::2, :d], base[:1, :d].expand(70, d)
    across = unit(d, 90, torch.bfloat16).T
    for q, k in ((views[0], views[1]), (views[2], views[0]), (views[3], views[2]), (across, across)):
        check_similarity(q, k[:200], 14.3)


@pytest.mark.parametrize("scale", [100.0, 14.3, 2.0, 300.0, 3000.0])
@pytest.mark.parametrize("cone", [0.0, 3.0])
def test_similarity_temperatures(scale, cone):
    for d in (128, 512):
        q, k = unit(1000, d, torch.bfloat16, cone), unit(1200, d, torch.bfloat16, cone)
        q[:5] *= -1  # rows whose best cosine is far below the others'
        check_similarity(q, k, scale)
        check_similarity(q, None, scale, exclude=ops.EXCLUDE_DIAGONAL)


def test_float32_is_float32_unless_torch_allows_tf32():
    q, k = unit(512, 512, torch.float32), unit(512, 512, torch.float32)
    scale = torch.tensor(20.0, device="cuda")
    truth = reference.similarity_forward(q.double(), k.double(), scale, None, None, 0, False, False)[0]

    def error():
        ours = OPS.similarity_forward(q, k, scale, None, None, 0, False, False, "triton")[0]
        return float((ours - truth).abs().max())

    exact = error()
    assert exact < 2e-5
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert exact < error() < 2e-2
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", [True, False])
def test_siglip(positives, dtype):
    for n, m, d in [(777, 1029, 200), (1024, 1024, 768), (300, 70, 64)]:
        check_siglip(unit(n, d, dtype), unit(m, d, dtype), positives)


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


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "clip"])
def test_fifty_steps_have_equal_bits(name):
    leaves = views(3001, 256 if name == "nt_xent" else 128)
    first = step(name, leaves)
    for _ in range(50):
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))
        for a, b in zip(first, step(name, leaves), strict=True):
            assert torch.equal(a, b)


def captured(call):
    """(graph, what ``call`` returned while it was captured)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("name", LOSSES)
def test_graph_of_a_step(name):
    leaves = views(1001, 128)
    graph, results = captured(lambda: step(name, leaves))
    with torch.no_grad():
        for leaf, new in zip(leaves, views(1001, 128), strict=True):
            leaf.copy_(new)
    graph.replay()
    for a, b in zip(results, step(name, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("d", [128, 512])
def test_graph_capture_and_replay(d):
    q, k = unit(2000, d, torch.bfloat16), unit(2500, d, torch.bfloat16)
    scale = torch.tensor(20.0, device="cuda")
    graph, results = captured(lambda: both_passes(q, k, scale))
    for factor in (20.0, 5.0):
        q.copy_(unit(2000, d, torch.bfloat16))
        scale.fill_(factor)
        graph.replay()
        for a, b in zip(results, both_passes(q, k, scale), strict=True):
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


def test_several_streams_with_a_loss_each():
    problems = {name: views(2001, 128) for name in LOSSES}
    alone = {name: step(name, leaves) for name, leaves in problems.items()}
    torch.cuda.synchronize()
    streams = {name: torch.cuda.Stream() for name in problems}
    for _ in range(5):
        results = {}
        for name, leaves in problems.items():
            with torch.cuda.stream(streams[name]):
                results[name] = step(name, leaves)
        torch.cuda.synchronize()
        for name, expected in alone.items():
            for a, b in zip(expected, results[name], strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)  # confirmed kernels, and row panels
@pytest.mark.parametrize("name", every_loss.LOSSES)
def test_a_step_never_waits_for_the_gpu(name, dtype):
    """Nothing is read back in either pass, once everything is compiled: PyTorch raises where something is."""
    leaves = tuple((x.to(dtype) if x.dim() else x).requires_grad_() for x in every_loss.inputs("cuda"))
    expected = every_loss.run(name, leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = every_loss.run(name, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ("clip", "siglip", "sup_con"))
def test_compile_without_breaks_or_recompiling(name):
    def loss(image, text, scale):
        return LOSSES[name](F.normalize(image, dim=1), F.normalize(text, dim=1), scale)

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

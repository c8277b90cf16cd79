"""A launch that fails, for every launch of every CUDA operator; the widths that the tensor-core kernels take."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated, emulated_module, use  # noqa: F401
from goodness_cases import activations
from similarity_cases import problem, vectors
from test_cuda_similarity import HALVES, WAYS, compare

from ffcl_fast import functional, ops
from ffcl_fast.backends import cuda

OPS = torch.ops.ffcl_fast
RESOURCES = "too many resources requested for launch"


def _similarity(symmetric: bool = False):
    return problem(140, 20, 16, torch.bfloat16, ops.EXCLUDE_DIAGONAL, symmetric)


def _similarity_backward():
    head = _similarity()
    row_lse, col_lse, cache = OPS.similarity_forward(*head, True, True, "reference")
    return *head, row_lse, col_lse, row_lse, col_lse, cache, True, True


def _pair():
    return activations(9, 40, dtype=torch.float16), activations(9, 40, dtype=torch.float16)


def _layers():
    return [torch.randn(2, 8) for _ in range(40)]  # of which a launch takes fewer


# operator -> (a pattern of the kernels that exceptions name, a shape that it tells, arguments without the backend)
CALLS = {
    "similarity_forward": ("similarity_forward", (140, 16), lambda: (*_similarity(), True, False)),
    "similarity_backward": ("similarity_(vectors|panel)", (140, 16), _similarity_backward),
    "goodness_forward": ("goodness_forward", (5, 70), lambda: (torch.randn(5, 70), True, True, True, 1e-6)),
    "goodness_backward": (
        "goodness_backward",
        (5, 70),
        lambda: (torch.randn(5, 70), torch.rand(5), torch.randn(5), torch.randn(5, 70), True, True, 1e-6),
    ),
    "goodness_many": ("goodness_many", (2, 8), lambda: (_layers(), False, True)),
    "goodness_many_backward": ("goodness_many_backward", (2, 8), lambda: (_layers(), torch.randn(80), False, True)),
    "pair_cosine_forward": (
        "pair_cosine_forward",
        (9, 40),
        lambda: (*_pair(), torch.ones(9), 0.0, True, 1.0, True, True),
    ),
    "pair_cosine_backward": (
        "pair_cosine_backward",
        (9, 40),
        lambda: (*_pair(), torch.randn(9, 3), torch.randn(9), True, True, True),
    ),
    "scale_": ("scale", (9, 3), lambda: (torch.randn(9, 3), torch.tensor(2.0))),
    "pool_goodness_forward": ("pool_goodness_forward", (2, 8, 49), lambda: (torch.randn(2, 8, 49), True, True)),
    "pool_goodness_backward": (
        "pool_goodness_backward",
        (2, 8, 49),
        lambda: (torch.randn(2, 8, 49), torch.randn(2, 8), torch.randn(2), None, True, True),
    ),
}


def test_no_operator_is_forgotten():
    assert set(CALLS) == cuda._OPERATORS


@pytest.mark.parametrize("name", CALLS)
def test_any_launch_that_fails_is_an_exception(name, emulated):  # noqa: F811
    """The kernel, the shapes and CUDA's reason are told, nothing is launched after it, and the next call works."""
    kernel, shape, arguments = CALLS[name]
    told = rf"CUDA kernel {kernel} failed: {RESOURCES} \(.*: \({', '.join(map(str, shape))}\) torch\.\w+ on cpu"
    emulated.set_sums_workspace(1)  # a launch a row of super-tiles
    try:
        for capability in WAYS.values() if name.startswith("similarity") else (80,):
            use(emulated, capability)
            before = emulated.launches()
            getattr(OPS, name)(*arguments(), "cuda")
            launches = emulated.launches() - before
            assert launches > (1 if name in ("similarity_forward", "goodness_many", "pool_goodness_forward") else 0)
            for good in range(launches):
                given, before = arguments(), emulated.launches()
                emulated.fail_after(good)
                with pytest.raises(RuntimeError, match=told):
                    getattr(OPS, name)(*given, "cuda")
                assert emulated.launches() - before == good + 1
            getattr(OPS, name)(*arguments(), "cuda")
    finally:
        emulated.fail_after(-1)
        emulated.set_sums_workspace(64 << 20)


def test_too_much_shared_memory_is_an_exception(emulated):  # noqa: F811
    """A device whose blocks have less than the kernels need: refused when it is asked for, before any launch of it."""
    use(emulated, 80, shared=48 << 10)
    told = r"similarity_forward failed: invalid argument \(q: \(140, 16\).*k: \(20, 16\)"
    with pytest.raises(RuntimeError, match=told):
        OPS.similarity_forward(*_similarity(), True, False, "cuda")


def test_a_loss_passes_it_on(emulated):  # noqa: F811
    leaves = [vectors(9, 16, torch.bfloat16).requires_grad_() for _ in range(2)]
    try:
        emulated.fail_after(0)
        with pytest.raises(RuntimeError, match="CUDA kernel similarity_forward failed"):
            functional.clip(*leaves, 10.0, backend="cuda")
        loss = functional.clip(*leaves, 10.0, backend="cuda")
        emulated.fail_after(0)
        with pytest.raises(RuntimeError, match="CUDA kernel similarity_vectors failed"):
            loss.backward()
    finally:
        emulated.fail_after(-1)


def test_tensors_of_two_dtypes_never_reach_a_launch(emulated):  # noqa: F811
    x, other = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).half()
    before = emulated.launches()
    for call in (
        lambda: OPS.similarity_forward(x, other, torch.tensor(2.0), None, None, 0, True, False, "cuda"),
        lambda: OPS.goodness_many([x, x, other], False, True, "cuda"),
        lambda: OPS.pair_cosine_forward(x, other, torch.ones(3), 0.0, True, 1.0, True, True, "cuda"),
    ):
        with pytest.raises(ValueError, match=r"refused its arguments \(.*torch.bfloat16 on cpu, .*torch.float16"):
            call()
    assert emulated.launches() == before


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("depth", (64, 4096))
def test_the_narrowest_and_the_widest_embeddings(depth, capability, emulated):  # noqa: F811
    use(emulated, capability)
    for dtype in HALVES if depth == 64 else HALVES[int(torch.randint(2, ())) :][:1]:
        compare(*problem(5, 9, depth, dtype, ops.EXCLUDE_NONE, False))

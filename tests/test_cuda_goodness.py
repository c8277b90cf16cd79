"""The CUDA goodness kernels, compiled for the CPU by tests/emulation/, against the reference; and how they are cut."""

from __future__ import annotations

import pytest
import test_gpu_cuda
import torch
from emulated import emulated, emulated_module, use  # noqa: F401
from goodness_cases import DTYPES, activations, assert_unchanged, direction_terms, unchanged
from guards import guarded, inside_nan  # noqa: F401

from ffcl_fast import functional, reference
from helpers import assert_close_to_reference

OPS = torch.ops.ffcl_fast
EPS = 1e-4


def compare(function, tensors, *options, factor=2.0, terms=0.0):
    """A reference operator and the CUDA one by the project's rule, inputs left alone. ``terms``: of all outputs, or a
    tuple of those of the first ones."""
    before = unchanged(tensors)
    ours = getattr(OPS, function.__name__)(*tensors, *options, "cuda")
    assert_unchanged(before)
    plain = function(*tensors, *options)
    truth = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in tensors), *options)
    results = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, plain, truth))
    for i, (x, y, z) in enumerate(zip(*results, strict=True)):
        size = terms if isinstance(terms, float) else (*terms, *[0.0] * 4)[i]
        assert_close_to_reference(x, y, z, factor=factor, name=f"{function.__name__}, output {i}", terms=size)
    return ours


# A warp a row and a block a row, packs of 16 bytes and single elements, rows longer than the registers.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((9, 1), (11, 37), (5, 96), (3, 2056), (2, 4101), (2, 20000)), ids=str)
def test_goodness(shape, dtype, emulated, guarded):  # noqa: F811
    for mean, relu, pad in ((False, False, 5), (True, True, 8)):
        h = inside_nan(activations(*shape, dtype=dtype), pad)
        goodness, _ = compare(reference.goodness_forward, (h,), mean, relu, True, EPS)
        grads = torch.randn(shape[0]), torch.randn(shape).to(dtype)
        used = grads if relu else (None, grads[1])
        terms = direction_terms(h, grads[1], relu, EPS)
        compare(reference.goodness_backward, (h, goodness, *used), mean, relu, EPS, factor=3.0, terms=terms)


def test_zero_rows_have_no_gradient(emulated):  # noqa: F811
    h = torch.zeros(3, 24)
    goodness, out = OPS.goodness_forward(h, False, False, True, 0.0, "cuda")
    assert not goodness.any() and not out.any()
    dh = OPS.goodness_backward(h, goodness, torch.ones(3), torch.ones(3, 24), False, True, 1.0, "cuda")
    assert not dh.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_layers(dtype, emulated, guarded):  # noqa: F811
    for widths, wide in (((2056, 64, 8, 4104), 8), ((2055, 5, 1, 70), 1)):
        h = [inside_nan(activations(1 + 5 * (i % 2), w, dtype=dtype), 8 * wide) for i, w in enumerate(widths)]
        before = emulated.launches()
        ours = OPS.goodness_many(h, True, True, "cuda")
        assert emulated.launches() == before + 1
        truth = reference.goodness_many([x.double() for x in h], True, True)
        assert_close_to_reference(ours, reference.goodness_many(h, True, True), truth, name="goodness")
        grad = torch.randn_like(ours)
        grads = OPS.goodness_many_backward(h, grad, True, True, "cuda")
        plain = reference.goodness_many_backward(h, grad, True, True)
        exact = reference.goodness_many_backward([x.double() for x in h], grad.double(), True, True)
        for x, y, z in zip(grads, plain, exact, strict=True):
            assert_close_to_reference(x, y, z, factor=3.0, name="gradient")


def test_more_layers_than_a_launch_takes(emulated):  # noqa: F811
    h = [torch.randn(2, 8) for _ in range(emulated.MANY_LAYERS + 1)]
    before = emulated.launches()
    ours = OPS.goodness_many(h, False, False, "cuda")
    assert emulated.launches() == before + 2
    torch.testing.assert_close(ours, reference.goodness_many(h, False, False))


# (capability, processors, shared memory, width, where the pair is): each way the plan has.
PAIRS = (
    (80, 2, 163 << 10, 100, "a warp's share of shared memory"),
    (80, 2, 163 << 10, 4000, "a block's shared memory"),
    (80, 2, 4 << 10, 4000, "partly read twice"),
    (90, 2, 8 << 10, 3000, "a cluster's shared memory"),
    (90, 2, 3 << 10, 6007, "a cluster's, partly read twice"),
    (90, 132, 227 << 10, 9000, "a cluster's, since samples are few"),
)


# A loss is the difference of a cosine and this, or of 1 and a cosine, and activations() are about as far apart as this.
MARGIN = 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability, processors, shared, width, where", PAIRS, ids=[p[4] for p in PAIRS])
def test_pair_cosine(capability, processors, shared, width, where, dtype, emulated, guarded):  # noqa: F811
    use(emulated, capability, processors, shared)
    rows = 9 if width < 1000 else 3
    for relu, pad, needed in ((True, 8, (True, True)), (False, 3, (True, False))):
        h1, h2 = (inside_nan(activations(rows, width, dtype=dtype), pad) for _ in range(2))
        target = torch.where(torch.rand(rows) < 0.5, 1.0, -1.0)
        target[0] = 0.0
        tensors = h1, h2, target
        compare(reference.pair_cosine_forward, tensors, MARGIN, relu, 0.5, *needed, factor=3.0, terms=(MARGIN / 2,))
    coefficients = reference.pair_cosine_forward(h1, h2, target, MARGIN, True, 1.0, False, False)[1]
    grads = coefficients, torch.randn(rows)
    compare(reference.pair_cosine_backward, (h1, h2, *grads), True, True, False, factor=3.0)
    compare(reference.pair_cosine_forward, tensors, MARGIN, True, 0.5, False, False, factor=3.0, terms=(MARGIN / 2,))
    assert (emulated.largest_cluster() > 1) == ("cluster" in where)


def test_code_of_an_older_chip_uses_no_clusters(emulated):  # noqa: F811
    """A Hopper chip that runs sm_80's PTX: that code knows of one block only."""
    h1, h2, target = torch.randn(2, 20000), torch.randn(2, 20000), torch.ones(2)
    for compiled_for in (80, 90):
        emulated.set_device(90, 2, 8 << 10, compiled_for)
        compare(reference.pair_cosine_forward, (h1, h2, target), 0.1, True, 1.0, True, True, factor=3.0)
        assert (emulated.largest_cluster() > 1) == (compiled_for == 90)
    use(emulated, 90)


def test_pair_cosine_visits_memory_once(emulated):  # noqa: F811
    """What is in shared memory is not read again: the inputs may be overwritten by the gradients' own buffers."""
    h1, h2, target = torch.randn(4, 500), torch.randn(4, 500), torch.ones(4)
    expected = reference.pair_cosine_forward(h1, h2, target, 0.0, True, 1.0, True, True)[2:]
    args = emulated.PairRows(h1.data_ptr(), h2.data_ptr(), 4, 500, 500, 500, 0, True, 0, 0)
    loss, coefficients = torch.empty(4), torch.empty(4, 3)
    outputs = (x.data_ptr() for x in (loss, coefficients, h1, h2))
    assert emulated.pair_cosine_forward_cuda(args, target.data_ptr(), 0.0, 1.0, *outputs) == 0
    for ours, truth in zip((h1, h2), expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, emulated):  # noqa: F811
    for n in (1, 777, 4096):
        x = torch.randn(n, 3).to(dtype)
        for factor in (0.37, 1.0):
            ours = x.clone()
            OPS.scale_(ours, torch.tensor(factor), "cuda")
            torch.testing.assert_close(ours, (x.float() * torch.tensor(factor)).to(dtype), rtol=0, atol=0)


# A warp a channel; channels in shared memory (few positions); packs and single elements of channels.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("shape", ((2, 136, 49), (3, 8, 200), (2, 11, 133), (1, 264, 7), (2, 3, 1)), ids=str)
def test_pool(shape, last, dtype, emulated, guarded):  # noqa: F811
    n, c, length = shape
    h = activations(n, length, c, dtype=dtype).transpose(1, 2) if last else activations(*shape, dtype=dtype)
    for relu, pad, processors in ((True, 8, 2), (True, 8, 200), (False, 3, 200)):
        use(emulated, 90, processors)  # of many, few samples are cut further
        view = inside_nan(h, pad)
        compare(reference.pool_goodness_forward, (view,), relu, relu)
        pooled = reference.pool_goodness_forward(view, relu, relu)[1]
        grads = torch.randn(n), (torch.randn(n, c) if relu else None)
        compare(reference.pool_goodness_backward, (view, pooled, *grads), relu, relu, factor=3.0)


@pytest.mark.parametrize("odd", (float("nan"), float("inf")), ids=str)
def test_odd_values_pass(odd, emulated):  # noqa: F811
    h = torch.randn(3, 40)
    h[1, 7] = odd
    for relu in (False, True):
        ours = OPS.goodness_forward(h, False, relu, False, EPS, "cuda")[0]
        torch.testing.assert_close(ours, reference.goodness_forward(h, False, relu, False, EPS)[0], equal_nan=True)
        maps = h.view(3, 8, 5)
        for x, y in zip(
            OPS.pool_goodness_forward(maps, False, relu, "cuda"),
            reference.pool_goodness_forward(maps, False, relu),
            strict=True,
        ):
            torch.testing.assert_close(x, y, equal_nan=True)


def test_autograd_over_the_kernels(emulated):  # noqa: F811
    h1, h2 = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    target = torch.tensor([1.0, -1, 1, -1, 1])
    results = []
    for backend in ("cuda", "reference"):
        loss = functional.pair_cosine(h1, h2, target, backend=backend) + functional.goodness(h1, backend=backend).mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, (h1, h2))))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_memcheck_is_to_run_is_right(dtype, emulated):  # noqa: F811
    test_gpu_cuda.test_small_goodness(dtype)


def test_refused_arguments_name_kernel_and_shapes(emulated):  # noqa: F811
    from ffcl_fast.backends import cuda

    h = torch.randn(3, 8)
    bad = emulated.GoodnessRows(h.data_ptr(), 3, 0, 8, 0, False, False, 0.0, 0, 0)
    with pytest.raises(ValueError, match=r"goodness_forward refused its arguments \(h: \(3, 8\) torch.float32"):
        cuda.run("goodness_forward", bad, torch.empty(3), None, h=h)

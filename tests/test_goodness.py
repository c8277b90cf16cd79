"""Goodness, normalisation and pooling: every backend against float64, and the functions on top."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from goodness_cases import (
    BACKENDS,
    DTYPES,
    NATIVE,
    ODD_VALUES,
    SHAPES,
    activations,
    assert_unchanged,
    direction_terms,
    unchanged,
)

from ffcl_fast import functional as ff
from ffcl_fast import ops, reference
from ffcl_fast.backends import native
from helpers import assert_close_to_reference

_ops = torch.ops.ffcl_fast
EPS = 0.05  # large enough that a row of one element keeps a gradient: 1 - |a| / (|a| + eps) is all of it


def plain(h, mean, relu, eps=EPS):
    """Goodness and normalised activation in plain PyTorch, in h's dtype."""
    a = torch.relu(h) if relu else h
    squares = a.square().mean(1)
    return (squares if mean else a.square().sum(1)), a / (squares.sqrt() + eps)[:, None]


def plain_pool(h, mean, relu):
    pooled = (torch.relu(h) if relu else h).mean(2)
    return (pooled.square().mean(1) if mean else pooled.square().sum(1)), pooled


def plain_gradient(function, h, options, grads):
    """Gradient by autograd; a gradient that is None counts as zero."""
    h = h.detach().clone().requires_grad_()
    outputs = function(h, *options)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, h, grads)[0]


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mean", "relu"), ((False, False), (True, True)), ids=("sum-linear", "mean-relu"))
def test_goodness_operator(backend, dtype, shape, mean, relu):
    h = activations(*shape, dtype=dtype)
    if relu:
        h[:, 0] = 0.5  # no row of zeros, whose norm plain PyTorch cannot differentiate
    wide = h.double()
    before = unchanged((h,))
    goodness, out = _ops.goodness_forward(h, mean, relu, True, EPS, backend)
    eager, truth = plain(h, mean, relu), plain(wide, mean, relu)
    assert goodness.dtype == torch.float32 and out.dtype == dtype and out.is_contiguous()
    assert_close_to_reference(goodness, eager[0], truth[0], name="goodness")
    assert_close_to_reference(out, eager[1], truth[1], name="out")
    alone, empty = _ops.goodness_forward(h, mean, relu, False, EPS, backend)
    assert torch.equal(alone, goodness) and empty.shape == (0, shape[1])

    grad_goodness, grad_out = torch.randn(shape[0]), torch.randn(shape).to(dtype)
    for grads in ((grad_goodness, grad_out), (grad_goodness, None), (None, grad_out)):
        dh = _ops.goodness_backward(h, goodness, *grads, mean, relu, EPS, backend)
        assert dh.dtype == dtype and dh.is_contiguous()
        eager_dh = plain_gradient(plain, h, (mean, relu), grads)
        truth_dh = plain_gradient(plain, wide, (mean, relu), grads)
        terms = direction_terms(h, grads[1], relu, EPS)
        assert_close_to_reference(dh, eager_dh, truth_dh, factor=3, name="dh", terms=terms)
    assert_unchanged(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 1, 1), (3, 5, 7), (2, 33, 49), (2, 700, 65), (3, 64, 300)), ids=str)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
@pytest.mark.parametrize("relu", (False, True), ids=("linear", "relu"))
def test_pool_operator(backend, dtype, shape, last, relu):
    n, c, length = shape
    mean = relu
    h = activations(n, length, c, dtype=dtype).transpose(1, 2) if last else activations(*shape, dtype=dtype)
    wide = h.double()
    before = unchanged((h,))
    goodness, pooled = _ops.pool_goodness_forward(h, mean, relu, backend)
    eager, truth = plain_pool(h, mean, relu), plain_pool(wide, mean, relu)
    assert goodness.dtype == pooled.dtype == torch.float32
    assert_close_to_reference(goodness, eager[0], truth[0], name="goodness")
    assert_close_to_reference(pooled, eager[1], truth[1], name="pooled")
    grad_goodness, grad_pooled = torch.randn(n), torch.randn(n, c)
    for grads in ((grad_goodness, grad_pooled), (grad_goodness, None), (None, grad_pooled)):
        dh = _ops.pool_goodness_backward(h, pooled, *grads, mean, relu, backend)
        assert dh.dtype == dtype and dh.stride() == ops.empty_pooled_like(h).stride()
        eager_dh = plain_gradient(plain_pool, h, (mean, relu), grads)
        truth_dh = plain_gradient(plain_pool, wide, (mean, relu), grads)
        assert_close_to_reference(dh, eager_dh, truth_dh, factor=3, name="dh")
    assert_unchanged(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_strides(backend):
    """Rows of a wider tensor, every other row, and one row for all, give what their copies give."""
    base = activations(12, 40)
    for h in (base[:, 3:30], base[::2], base[:1].expand(5, 40), base.T.contiguous().T):
        goodness, out = _ops.goodness_forward(h, False, True, True, EPS, backend)
        dense = _ops.goodness_forward(h.contiguous(), False, True, True, EPS, backend)
        torch.testing.assert_close((goodness, out), dense)
        grads = torch.randn(h.shape[0]), torch.randn(h.shape)
        dh = _ops.goodness_backward(h, goodness, *grads, False, True, EPS, backend)
        dense = _ops.goodness_backward(h.contiguous(), goodness, *grads, False, True, EPS, backend)
        torch.testing.assert_close(dh, dense)
    maps = activations(6, 4, 9)
    for h in (maps[::2], maps.transpose(1, 2)[1:4]):
        torch.testing.assert_close(
            _ops.pool_goodness_forward(h, True, False, backend),
            _ops.pool_goodness_forward(h.contiguous(), True, False, backend),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("relu", (False, True), ids=("linear", "relu"))
def test_not_finite(backend, value, relu):
    """A NaN or an infinity shows in its own row, and in no other; ReLU does not turn a NaN into a zero."""
    for dtype in DTYPES:
        for column in (0, 10, 32):  # in a vector, and in what is left over
            h = activations(4, 33, dtype=dtype)
            h[2, column] = value
            goodness, out = _ops.goodness_forward(h, False, relu, True, EPS, backend)
            truth = reference.goodness_forward(h.double(), False, relu, True, EPS)
            assert torch.equal(goodness.isfinite(), truth[0].isfinite())
            assert torch.equal(out.isnan(), truth[1].isnan())
            assert goodness.isfinite().tolist() == [True, True, False, True]
            grads = torch.randn(4), torch.randn(4, 33).to(dtype)
            dh = _ops.goodness_backward(h, goodness, *grads, False, relu, EPS, backend)
            assert dh[[0, 1, 3]].isfinite().all() and not dh[2, column].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros(backend, dtype):
    """They stay zeros, and get 1 / eps times the gradient (nothing through ReLU) as the formula says."""
    h = torch.zeros(3, 20, dtype=dtype)
    h[1] = 1
    for relu in (False, True):
        goodness, out = _ops.goodness_forward(h, True, relu, True, 1e-3, backend)
        assert goodness.tolist() == [0, 1, 0] and not out[[0, 2]].any()
        grad_out = torch.ones(3, 20, dtype=dtype)
        dh = _ops.goodness_backward(h, goodness, torch.ones(3), grad_out, True, relu, 1e-3, backend)
        expected = 0.0 if relu else 1e3
        torch.testing.assert_close(dh[[0, 2]], torch.full((2, 20), expected, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_values_do_not_overflow_half_precision(backend):
    h = torch.full((2, 3000), 200.0, dtype=torch.float16)  # the sum of squares is 1.2e8, float16 ends at 65504
    goodness, out = _ops.goodness_forward(h, False, False, True, EPS, backend)
    torch.testing.assert_close(goodness, torch.full((2,), 1.2e8))
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    check = torch.library.opcheck
    h = activations(5, 37)
    goodness, out = _ops.goodness_forward(h, True, True, True, EPS, backend)
    for normalize in (False, True):
        check(_ops.goodness_forward.default, (h, True, True, normalize, EPS, backend))
    for grad_out in (None, out):
        check(_ops.goodness_backward.default, (h, goodness, goodness, grad_out, True, False, EPS, backend))
    for maps in (activations(2, 3, 9), activations(2, 9, 3).transpose(1, 2)):
        goodness, pooled = _ops.pool_goodness_forward(maps, False, False, backend)
        check(_ops.pool_goodness_forward.default, (maps, False, False, backend))
        check(_ops.pool_goodness_backward.default, (maps, pooled, goodness, None, False, True, backend))
    check(_ops.scale_.default, (h.clone(), torch.tensor(2.0), backend))


@NATIVE
def test_the_number_of_threads_does_not_change_a_bit():
    h, grads = activations(300, 515), (torch.randn(300), torch.randn(300, 515))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            goodness, out = _ops.goodness_forward(h, False, True, True, EPS, "cpu")
            results.append((goodness, out, _ops.goodness_backward(h, goodness, *grads, False, True, EPS, "cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@NATIVE
@pytest.mark.long
@pytest.mark.parametrize("isa", ("portable", "avx2", "avx512"))
def test_every_instruction_set(isa, monkeypatch):
    """The operator tests again, in a process of their own: the instruction set is chosen once."""
    monkeypatch.setenv("FFCL_ISA", isa)
    probe = subprocess.run(
        [sys.executable, "-c", "import ffcl_fast._native as n; print(n.isa())"], capture_output=True, text=True
    )
    if "this processor has" in probe.stderr or isa not in _built_isas():
        pytest.skip(f"neither this processor nor this build is sure to have {isa}")
    assert probe.stdout.strip() == isa, probe.stderr
    if isa == native.module.isa():
        return  # what this process runs, so that the operator tests above have shown it
    here = Path(__file__).parent
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small sizes on several threads mostly wait for each other
    select = "cpu and (operator or not_finite or zeros or strides)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select]
        + [str(here / "test_goodness.py"), str(here / "test_pair_cosine.py")],
        capture_output=True,
        text=True,
        cwd=here.parent,
    )
    assert run.returncode == 0, run.stdout[-3000:]


def _built_isas():
    return native.module.build_info()["isas"]


# --- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("NCHW", "NHWC"))
@pytest.mark.parametrize("relu", (False, True))
def test_functions_on_feature_maps(layout, relu):
    h = activations(4, 6, 5, 3).to(memory_format=layout).requires_grad_()
    a = torch.relu(h) if relu else h
    close = torch.testing.assert_close
    close(ff.goodness(h, relu=relu), a.square().flatten(1).sum(1))
    close(ff.goodness(h, "mean_squares", relu=relu), a.square().flatten(1).mean(1))
    close(ff.goodness(h, "mean_squares", relu=relu, over="channels"), a.square().mean(1))
    close(ff.goodness(h, relu=relu, over="channels"), a.square().sum(1))
    close(ff.goodness(h, "mean_squares", relu=relu, groups=3), a.reshape(4, 3, -1).square().mean(2))
    close(ff.pool_goodness(h, relu=relu)[0], a.mean((2, 3)).square().sum(1))
    close(ff.pool_goodness(h, "mean_squares", relu=relu)[0], a.mean((2, 3)).square().mean(1))
    close(ff.pool_goodness(h, relu=relu)[1], a.mean((2, 3)))
    rms = a.square().mean((1, 2, 3), keepdim=True).sqrt()
    out = ff.goodness_normalize(h, relu=relu)
    close(out, a / (rms + 1e-6))
    assert out.is_contiguous(memory_format=layout)
    g, again = ff.goodness_and_normalize(h, "mean_squares", relu=relu)
    close(g, a.square().mean((1, 2, 3)))
    assert torch.equal(again, out)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum() + g.sum() + ff.pool_goodness(h, relu=relu)[0].sum(), h)[0]
    theirs = (a / (rms + 1e-6) * weight).sum() + a.square().mean((1, 2, 3)).sum() + a.mean((2, 3)).square().sum()
    close(ours, torch.autograd.grad(theirs, h)[0])
    assert ours.is_contiguous(memory_format=layout)


def test_any_number_of_dimensions_and_any_order():
    for h in (
        activations(3, 4),
        activations(3, 4, 5),
        activations(3, 2, 3, 4, 5),
        activations(5, 4, 3).permute(2, 0, 1),
    ):
        torch.testing.assert_close(ff.goodness(h), h.flatten(1).square().sum(1))
        rms = h.flatten(1).square().mean(1).sqrt()  # of four elements it may be small enough for the 1e-6 to show
        torch.testing.assert_close(ff.goodness_normalize(h).flatten(1).square().mean(1), (rms / (rms + 1e-6)).square())
        if h.dim() > 2:
            torch.testing.assert_close(ff.pool_goodness(h)[1], h.flatten(2).mean(2))
    h = activations(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    assert ff.goodness_normalize(h).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("relu", (False, True))
def test_gradcheck(relu):
    h = (activations(3, 4, 2, 2, dtype=torch.float64) + 0.1).requires_grad_()
    for function in (
        lambda h: ff.goodness(h, relu=relu),
        lambda h: ff.goodness(h, "mean_squares", relu=relu, groups=2),
        lambda h: ff.goodness(h, relu=relu, over="channels"),
        lambda h: ff.goodness_normalize(h, 1e-3, relu=relu),
        lambda h: ff.goodness_and_normalize(h, relu=relu),
        lambda h: ff.pool_goodness(h, "mean_squares", relu=relu),
    ):
        assert torch.autograd.gradcheck(function, h)
        assert torch.autograd.gradcheck(function, h.detach().to(memory_format=torch.channels_last).requires_grad_())


def test_autocast_and_mixed_use():
    x, weight = torch.randn(8, 16), torch.randn(32, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g, out = ff.goodness_and_normalize(torch.nn.functional.linear(x, weight), relu=True)
    assert g.dtype == torch.float32 and out.dtype == torch.bfloat16
    g.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("h_shape", ((4, 16), (4, 6, 5)), ids=str)
def test_compiled_once_for_all_batch_sizes(h_shape):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(h):
        g, out = ff.goodness_and_normalize(h, relu=True)
        total = g.sum() + (out * h).sum() + ff.goodness(h, "mean_squares").sum()
        return total + ff.pool_goodness(h)[0].sum() if h.dim() > 2 else total

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (4, 9, 33):
        h = activations(rows, *h_shape[1:]).requires_grad_()
        expected = torch.autograd.grad(function(h), h)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(h), h)[0], expected)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "a new batch size was compiled anew"


def test_bad_arguments():
    h = torch.randn(3, 4)
    for call, error, words in (
        (lambda: ff.goodness([1.0]), TypeError, "h must be a tensor; got list"),
        (lambda: ff.goodness(torch.ones(3, 4, dtype=torch.int64)), TypeError, "h must be float16"),
        (lambda: ff.goodness(torch.randn(3)), ValueError, r"h must have a batch .* got \(3,\)"),
        (lambda: ff.goodness(torch.randn(0, 4)), ValueError, r"h must not be empty; got \(0, 4\)"),
        (lambda: ff.goodness(torch.randn(4, 0)), ValueError, "h must not be empty"),
        (lambda: ff.goodness(h, "cubes"), ValueError, "kind must be one of 'sum_squares', 'mean_squares'; got 'cubes'"),
        (lambda: ff.goodness(h, over="time"), ValueError, "over must be"),
        (lambda: ff.goodness(h, groups=3), ValueError, "groups must divide h's 4 channels"),
        (lambda: ff.goodness(h, groups=0), ValueError, "groups"),
        (lambda: ff.goodness(h, groups="2"), TypeError, "groups must be a whole number; got str"),
        (lambda: ff.goodness(h.to_sparse()), TypeError, r"h must be a dense tensor .*, got torch.sparse_coo"),
        (lambda: ff.goodness(h.to_mkldnn()), TypeError, "h must be a dense tensor"),
        (lambda: ff.goodness(h, groups=2, over="channels"), ValueError, "groups"),
        (lambda: ff.goodness(h, backend="gpu"), ValueError, "backend must be one of"),
        (lambda: ff.goodness_normalize(h, 0.0), ValueError, "eps must be positive; got 0.0"),
        (lambda: ff.goodness_normalize(h, "x"), TypeError, "eps must be a number; got str"),
        (lambda: ff.goodness_normalize(h, backend="gpu"), ValueError, "backend"),
        (lambda: ff.pool_goodness(h), ValueError, r"h must have .* 2 more dimensions; got \(3, 4\)"),
        (lambda: ff.pool_goodness(h[:, :, None], backend="gpu"), ValueError, "backend"),
    ):
        with pytest.raises(error, match=words):
            call()

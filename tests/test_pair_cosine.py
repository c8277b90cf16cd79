"""Pair cosine: every backend against float64, the function against torch's loss, and each way a gradient is used."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from goodness_cases import BACKENDS, DTYPES, NATIVE, ODD_VALUES, SHAPES, activations, assert_unchanged, unchanged

from ffcl_fast import PairCosineLoss, functional, reference
from ffcl_fast.functional import pair_cosine
from ffcl_fast.functional.pair_cosine import pair_cosine_gradient
from helpers import assert_close_to_reference

_ops = torch.ops.ffcl_fast
THEIRS = F.cosine_embedding_loss


def targets(n: int) -> torch.Tensor:
    return torch.where(torch.rand(n) < 0.5, 1.0, -1.0)


def pair(*shape: int, dtype=torch.float32, grad: bool = False):
    """Two activations with cosines on both sides of 0.2, and targets."""
    h1, h2 = activations(*shape, dtype=dtype), activations(*shape, dtype=dtype)
    return h1.requires_grad_(grad), h2.requires_grad_(grad), targets(shape[0])


def plain(h1, h2, target, margin, relu):
    """Loss of each pair and both gradients of their sum, by torch's own loss in the inputs' dtype."""
    h1, h2 = (h.detach().clone().requires_grad_() for h in (h1, h2))
    a1, a2 = (torch.relu(h) if relu else h for h in (h1, h2))
    loss = THEIRS(a1, a2, target, margin, reduction="none")
    return loss, *torch.autograd.grad(loss.sum(), (h1, h2))


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("margin", "relu"), ((0.0, False), (0.2, True)), ids=("linear", "relu"))
def test_pair_cosine_operator(backend, dtype, shape, margin, relu):
    h1, h2, target = pair(*shape, dtype=dtype)
    if relu:  # two elements that ReLU keeps: the cosine of rows that share only one is 1, its gradient all rounding
        h1[:, :2], h2[:, :2] = h1[:, :2].abs() + 0.1, h2[:, :2].abs() + 0.1
    before = unchanged((h1, h2, target))
    loss, coefficients, d1, d2 = _ops.pair_cosine_forward(h1, h2, target, margin, relu, 0.5, True, True, backend)
    assert loss.dtype == coefficients.dtype == torch.float32 and coefficients.shape == (shape[0], 3)
    assert d1.dtype == d2.dtype == dtype and d1.is_contiguous() and d2.is_contiguous()
    truth = plain(h1.double(), h2.double(), target.double(), margin, relu)
    # Plain PyTorch in 16 bits loses its 1e-12 and may overflow: the error allowed is float32's, rounded once.
    eager = plain(h1.float(), h2.float(), target, margin, relu)
    if shape[1] == 1:  # the cosine is -1, 0 or 1: next to nothing is left of 1 - cos
        assert (loss - truth[0]).abs().max() < 1e-6
    else:
        # 1 - cos is as good as the rounding of 1, however small it is: judged beside 1
        assert_close_to_reference(loss + 1, eager[0] + 1, truth[0] + 1, name="loss")
    grad = torch.randn(shape[0])
    separate = _ops.pair_cosine_backward(h1, h2, coefficients, grad, relu, True, True, backend)
    for i, (fused, other) in enumerate(zip((d1, d2), separate, strict=True)):
        if shape[1] == 1:  # likewise of the gradient: two terms of 1 / |h| cancel, but for what 1e-12 adds to a norm
            length = torch.minimum(h1.abs(), h2.abs()).double()
            for d, factor, error in ((fused, 0.5, 1e-6), (other, grad[:, None].double(), 1e-5)):
                expected = truth[i + 1] * factor
                rounding = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal
                assert ((d - expected).abs() <= error / length + rounding).all()
            continue
        name = f"d{i + 1}"
        assert_close_to_reference(fused, (eager[i + 1] * 0.5).to(dtype), truth[i + 1] * 0.5, factor=3, name=name)
        expected = truth[i + 1] * grad[:, None].double()
        assert_close_to_reference(other, (eager[i + 1] * grad[:, None]).to(dtype), expected, factor=3, name=name)
    assert_unchanged(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need", ((False, False), (True, False), (False, True)))
def test_only_what_is_asked_for(backend, need):
    h1, h2, target = pair(6, 50)
    everything = _ops.pair_cosine_forward(h1, h2, target, 0.0, False, 1.0, True, True, backend)
    some = _ops.pair_cosine_forward(h1, h2, target, 0.0, False, 1.0, *need, backend)
    later = _ops.pair_cosine_backward(h1, h2, everything[1], torch.ones(6), False, *need, backend)
    assert torch.equal(some[0], everything[0]) and torch.equal(some[1], everything[1])
    for i in (0, 1):
        for got in (some[2 + i], later[i]):
            assert torch.equal(got, everything[2 + i]) if need[i] else got.shape == (0, 50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_strides(backend):
    base = activations(12, 80)
    for h1, h2 in ((base[:, 3:30], base[:, 40:67]), (base[::2], base[1::2]), (base[:1].expand(5, 80), base[:5])):
        target = targets(h1.shape[0])
        got = _ops.pair_cosine_forward(h1, h2, target, 0.0, True, 1.0, True, True, backend)
        dense = h1.contiguous(), h2.contiguous()
        torch.testing.assert_close(got, _ops.pair_cosine_forward(*dense, target, 0.0, True, 1.0, True, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", ODD_VALUES)
def test_not_finite(backend, value):
    for dtype in DTYPES:
        h1, h2, _ = pair(4, 37, dtype=dtype)
        h2[2, 36] = value
        for label in (1.0, -1.0):
            target = torch.full((4,), label)
            loss, _, d1, d2 = _ops.pair_cosine_forward(h1, h2, target, 0.0, True, 1.0, True, True, backend)
            assert loss.isfinite().tolist() == [True, True, False, True]
            assert d1[[0, 1, 3]].isfinite().all() and d2[[0, 1, 3]].isfinite().all()
            assert not d2[2, 36].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_the_margin(backend):
    """Zero activations have cosine 0, and torch's gradient: none where that equals the margin."""
    h1, h2, _ = pair(4, 9)
    h1[0] = 0
    h1[1] = h2[1] = 0
    for label in (1.0, -1.0):
        target = torch.full((4,), label)
        got = _ops.pair_cosine_forward(h1, h2, target, 0.0, False, 1.0, True, True, backend)
        torch.testing.assert_close((got[0], *got[2:]), plain(h1, h2, target, 0.0, False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    h1, h2, target = pair(5, 37)
    for need in ((True, True), (False, True), (False, False)):
        args = (h1, h2, target, 0.1, True, 0.2, *need, backend)
        torch.library.opcheck(_ops.pair_cosine_forward.default, args)
        coefficients = _ops.pair_cosine_forward(*args)[1]
        args = (h1, h2, coefficients, target, False, *need, backend)
        torch.library.opcheck(_ops.pair_cosine_backward.default, args)


@NATIVE
def test_the_number_of_threads_does_not_change_a_bit():
    h1, h2, target = pair(300, 515)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_ops.pair_cosine_forward(h1, h2, target, 0.0, True, 0.1, True, True, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- the function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((1, 5), (6, 12), (5, 4, 3, 7), (3, 64, 14, 14)), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("margin", (0.0, 0.3, -0.5))
def test_agrees_with_torch_to_1e_6(shape, reduction, margin):
    h1, h2, target = pair(*shape, grad=True)
    ours = pair_cosine(h1, h2, target, margin, reduction)
    theirs = THEIRS(h1.flatten(1), h2.flatten(1), target, margin, reduction=reduction)
    upstream = torch.ones_like(theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    share = 1 / len(h1) if reduction == "mean" else 1.0
    found, wanted = (torch.autograd.grad(loss, (h1, h2), upstream) for loss in (ours, theirs))
    for a, b, h, other in zip(found, wanted, (h1, h2), (h2, h1), strict=True):
        # Of nearly parallel rows a gradient is the difference of two terms of this size.
        unit, length = torch.nn.functional.normalize(other.detach().flatten(1)), h.detach().flatten(1).norm(dim=1)
        terms = share * (unit.abs().amax(1) / length).max()
        assert (a - b).abs().max() <= 1e-6 * max(b.abs().max(), terms) + 1e-12


@pytest.mark.parametrize("first", ("NCHW", "NHWC"))
@pytest.mark.parametrize("second", ("NCHW", "NHWC"))
def test_memory_formats(first, second):
    formats = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    h1, h2, target = pair(4, 6, 5, 3)
    expected = plain(h1.flatten(1), h2.flatten(1), target, 0.0, False)
    h1 = h1.to(memory_format=formats[first]).requires_grad_()
    h2 = h2.to(memory_format=formats[second]).requires_grad_()
    loss = pair_cosine(h1, h2, target, reduction="none")
    torch.testing.assert_close(loss, expected[0])
    grads = torch.autograd.grad(loss.sum(), (h1, h2))
    for grad, truth in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(grad.flatten(1), truth)
    assert grads[0].is_contiguous(memory_format=formats[first])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("weight", (1.0, 0.25))
def test_every_use_of_the_gradient(dtype, reduction, weight):
    """Upstream 1 and not 1, twice with retain_graph, one input only, and the loss used twice."""
    h1, h2, target = pair(6, 40, dtype=dtype, grad=True)

    def loss():
        return pair_cosine(h1, h2, target, 0.1, reduction, weight=weight)

    truth = plain(h1.double(), h2.double(), target.double(), 0.1, False)
    assert loss().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [weight * (d / 6 if reduction == "mean" else d) for d in truth[1:]]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]

    def check(grads, factor, which=(0, 1)):
        for i, grad in zip(which, grads, strict=True):
            assert grad.dtype == dtype
            error = (grad.double() - factor * expected[i]).norm() / (factor * expected[i]).norm()
            assert error < tolerance, f"d{i + 1}: relative error {error:.2e}"

    check(torch.autograd.grad(loss(), (h1, h2)), 1)
    check(torch.autograd.grad(loss() * 3, (h1, h2)), 3)
    check(torch.autograd.grad(loss(), h1), 1, (0,))
    check(torch.autograd.grad(loss(), h2), 1, (1,))
    value = loss()
    check(torch.autograd.grad(value + 2 * value, (h1, h2)), 3)
    value = loss()
    first = torch.autograd.grad(value, (h1, h2), retain_graph=True)
    kept = [g.clone() for g in first]
    check(torch.autograd.grad(value * 5, (h1, h2), retain_graph=True), 5)
    check(torch.autograd.grad(value * -2, (h1, h2)), -2)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True)), "a later pass changed an earlier gradient"
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, (h1, h2))
    h1.grad = h2.grad = None
    for _ in range(2):
        loss().backward()
    check((h1.grad, h2.grad), 2)
    detached = pair_cosine(h1, h2.detach(), target, 0.1, reduction, weight=weight)
    check(torch.autograd.grad(detached, h1), 1, (0,))
    with torch.no_grad():
        assert not loss().requires_grad and torch.allclose(loss(), value)


def test_the_same_tensor_twice():
    h, _, target = pair(5, 20, grad=True)
    ours = torch.autograd.grad(pair_cosine(h, 2 * h, target, -2.0), h)[0]
    theirs = torch.autograd.grad(THEIRS(h, 2 * h, target, -2.0), h)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_float16_gradients_survive_a_loss_scale():
    """The scale is applied before rounding: gradients near 1e-9 would be zeros in float16 otherwise."""
    h1, h2, target = pair(4, 3000, dtype=torch.float16)
    h1 = (100 * h1).requires_grad_()
    (grad,) = torch.autograd.grad(pair_cosine(h1, h2, target) * 2.0**16, h1)
    truth = plain(h1.double(), h2.double(), target.double(), 0.0, False)[1] / 4 * 2.0**16
    assert (grad.double() - truth).norm() < 2e-3 * truth.norm()


def test_autocast_mixes_dtypes():
    h1, h2, target = pair(4, 30)
    h1 = h1.requires_grad_()
    h2 = h2.bfloat16().requires_grad_()
    grads = torch.autograd.grad(pair_cosine(h1, h2, target), (h1, h2))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pair_cosine(torch.nn.functional.linear(h1, torch.randn(8, 30)), torch.randn(4, 8), target)
    assert loss.dtype == torch.float32


def test_gradcheck():
    h1, h2, target = pair(4, 6, dtype=torch.float64, grad=True)
    for reduction in ("mean", "none"):
        for relu in (False, True):
            assert torch.autograd.gradcheck(
                lambda a, b, reduction=reduction, relu=relu: pair_cosine(a, b, target, 0.05, reduction, relu=relu),
                (h1, h2),
            )


@pytest.mark.parametrize("target_dtype", (torch.int64, torch.int8, torch.float64, torch.bfloat16), ids=str)
def test_target_dtypes(target_dtype):
    h1, h2, target = pair(6, 9)
    torch.testing.assert_close(pair_cosine(h1, h2, target.to(target_dtype)), pair_cosine(h1, h2, target))


@pytest.mark.parametrize("shape", ((4, 16), (4, 6, 5, 3)), ids=str)
def test_compiled_once_for_all_batch_sizes(shape):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(h1, h2, target):
        return pair_cosine(h1, h2, target, 0.1, relu=True) * 2 + pair_cosine(h1, h2, target, reduction="none").sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows in (4, 9, 33):
        h1, h2, target = pair(rows, *shape[1:], grad=True)
        expected = torch.autograd.grad(function(h1, h2, target), (h1, h2))
        torch.testing.assert_close(torch.autograd.grad(compiled(h1, h2, target), (h1, h2)), expected)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "a new batch size was compiled anew"


def test_module():
    h1, h2, target = pair(6, 3, 4)
    loss = PairCosineLoss(0.2, "sum", relu=True)
    torch.testing.assert_close(loss(h1, h2, target), pair_cosine(h1, h2, target, 0.2, "sum", relu=True))
    original = torch.nn.CosineEmbeddingLoss()
    torch.testing.assert_close(PairCosineLoss()(h1, h2, target), original(h1.flatten(1), h2.flatten(1), target))
    assert "margin=0.2" in repr(loss)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none'; got 'max'"):
        PairCosineLoss(reduction="max")
    with pytest.raises(ValueError, match="backend must be one of"):
        PairCosineLoss(backend="gpu")


def test_bad_arguments():
    h1, h2, target = pair(4, 5)
    wrong = target.clone()
    wrong[2] = 0
    for args, options, error, words in (
        ((h1, h2[:, :4], target), {}, ValueError, r"h1 and h2 must have the same shape; got \(4, 5\) and \(4, 4\)"),
        ((h1, h2, target[:3]), {}, ValueError, r"target must have shape \(4,\)"),
        ((h1, h2, target[:, None]), {}, ValueError, "target must have shape"),
        ((h1, h2, wrong), {}, ValueError, r"target must hold only 1 .* got 0"),
        ((h1, h2, [1, 1, 1, 1]), {}, TypeError, "target must be a tensor; got list"),
        ((h1, h2, target.to(torch.complex64)), {}, TypeError, "target must be real"),
        ((h1[:0], h2[:0], target[:0]), {}, ValueError, "h1 must not be empty"),
        ((h1[:, 0], h2[:, 0], target), {}, ValueError, "h1 must have a batch"),
        ((h1, h2.int(), target), {}, TypeError, "h2 must be float16"),
        ((h1, h2.to("meta"), target), {}, ValueError, "same device; got cpu and meta"),
        ((h1, h2, target.to("meta")), {}, ValueError, "target must be on h1's device"),
        ((h1, h2, target), {"reduction": "max"}, ValueError, "reduction must be one of"),
        ((h1, h2, target), {"margin": "0"}, TypeError, "margin must be a number; got str"),
        ((h1, h2, target), {"weight": None}, TypeError, "weight must be a number"),
        ((h1, h2, target), {"backend": "gpu"}, ValueError, "backend must be one of"),
    ):
        with pytest.raises(error, match=words):
            pair_cosine(*args, **options)


def test_reference_has_the_formula_of_the_contract():
    h1, h2, target = pair(9, 11, dtype=torch.float64)
    loss, coefficients, _, _ = reference.pair_cosine_forward(h1, h2, target, 0.1, False, 1.0, False, False)
    n1, n2 = ((h.square().sum(1) + 1e-12).sqrt() for h in (h1, h2))
    cos = (h1 * h2).sum(1) / (n1 * n2)
    w = torch.where(target == 1, -1.0, torch.where(cos > 0.1, 1.0, 0.0))
    torch.testing.assert_close(coefficients, torch.stack((w / (n1 * n2), w * cos / n1**2, w * cos / n2**2), 1))
    torch.testing.assert_close(loss, THEIRS(h1, h2, target, 0.1, reduction="none"))
    assert functional.pair_cosine is pair_cosine


# --- both halves of one tensor, for local training -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("relu", (False, True))
@pytest.mark.parametrize("shape", ((2, 7), (6, 3, 4, 5)), ids=str)
def test_the_gradient_of_halves_is_autograds(dtype, relu, shape):
    for last in (False, len(shape) == 4):
        h = activations(*shape, dtype=dtype)
        h.flatten(1)[:, :2] = h.flatten(1)[:, :2].abs() + 0.1  # kept by ReLU: a cosine of 1 has a gradient of rounding
        h = h.to(memory_format=torch.channels_last) if last else h
        target = targets(shape[0] // 2)
        leaf = h.clone().requires_grad_()
        expected = pair_cosine(*leaf.chunk(2), target, 0.1, relu=relu)
        expected.backward()
        for backend in ("auto", "panels"):
            loss, gradient = pair_cosine_gradient(h.requires_grad_(), target, 0.1, relu=relu, backend=backend)
            assert gradient.dtype == dtype and gradient.stride() == h.stride() and not gradient.requires_grad
            tolerance = {"rtol": 0.02, "atol": 2e-3} if dtype in (torch.float16, torch.bfloat16) else {}
            torch.testing.assert_close(gradient, leaf.grad, **tolerance)
            torch.testing.assert_close(loss, expected.detach())


def test_halves_that_cannot_be_are_named():
    for h, target, problem in (
        (torch.rand(3, 4), torch.ones(2), "h must hold pairs, an even number of rows; got 3"),
        (torch.rand(4, 4), torch.ones(3), "target must have shape"),
        (torch.rand(4, 4), torch.zeros(2), "target must hold only 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            pair_cosine_gradient(h, target)
    with pytest.raises(TypeError, match="h must be a tensor; got list"):
        pair_cosine_gradient([1.0], torch.ones(1))


def test_a_margin_that_is_no_number_is_refused_when_built():
    for margin in ("a", None, True):
        with pytest.raises(TypeError, match="margin must be a number; got"):
            PairCosineLoss(margin=margin)

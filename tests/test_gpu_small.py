"""Every Triton kernel on small, ragged tensors that end where their memory does: what memcheck can watch in a minute.

Run by ``python -m tools.gpu_check``, under compute-sanitizer as well; tests/interpreter/small.py runs it on a CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import activations
from gpu_cases import (
    DEVICE,
    DTYPES,
    OPS,
    assert_right,
    check_normalize,
    check_siglip,
    check_similarity,
    ids,
    three,
    unit,
)
from positives_cases import check_class_positives, check_positives

from ffcl_fast import ops, reference
from helpers import assert_close_to_reference

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MANY = 3000 if DEVICE == "cuda" else 100  # rows: the interpreter takes minutes for thousands


def shifted(x):
    """x one element off any alignment, so that loads are narrow and no descriptor serves."""
    buffer = x.new_empty(x.numel() + 1)
    return buffer[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "n, m, d, dtype, exclude, aligned",
    [
        (70, 45, 64, BF16, ops.EXCLUDE_SAME_ID_OFF_DIAGONAL, True),  # gradients in registers
        (45, 70, 41, FP16, ops.EXCLUDE_DIAGONAL, False),
        (130, 40, 136, BF16, ops.EXCLUDE_NONE, True),  # in panels
        (33, 65, 137, FP16, ops.EXCLUDE_SAME_ID, False),
        (35, 20, 72, FP32, ops.EXCLUDE_DIFFERENT_ID, True),
        (1, 1, 1, BF16, ops.EXCLUDE_NONE, False),
    ],
    ids=str,
)
def test_similarity_pair(n, m, d, dtype, exclude, aligned):
    q, k = unit(n, d, dtype), unit(m, d, dtype)
    if not aligned:
        q, k = shifted(q), shifted(k)
    check_similarity(q, k, 14.3, ids(n, 5), ids(m, 5), exclude)


@pytest.mark.parametrize(
    "n, d, dtype, exclude",
    [
        (70, 64, BF16, ops.EXCLUDE_DIAGONAL),
        (133, 136, BF16, ops.EXCLUDE_DIFFERENT_ID),
        (40, 24, FP32, ops.EXCLUDE_DIAGONAL),
    ],
    ids=str,
)
def test_similarity_self(n, d, dtype, exclude):
    row_ids = ids(n, 5)
    check_similarity(unit(n, d, dtype), None, 14.3, row_ids, row_ids, exclude)


def test_similarity_rescue():
    q, k = unit(70, 64, BF16), unit(45, 64, BF16)
    check_similarity(q, k, 3000.0)  # past every offset: online from the start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip(dtype):
    check_siglip(unit(37, 72, dtype), unit(53, 72, dtype), True)


# Several rows a program, rows walked twice, and rows that programs share; the interpreter's blocks are shorter.
@pytest.mark.parametrize("shape", [(33, 96), (5, 31), (3, 7001), (2, 30000)], ids=str)
def test_goodness(shape):
    for dtype in (FP32, BF16):
        h = activations(*shape, dtype=dtype, device=DEVICE)
        assert_right("goodness", three(reference.goodness_forward, (h,), True, True, True, 1e-4))
        goodness = reference.goodness_forward(h, True, True, False, 1e-4)[0]
        grads = torch.randn(shape[0], device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
        assert_right("its gradient", three(reference.goodness_backward, (h, goodness, *grads), True, True, 1e-4), 3.0)


@pytest.mark.parametrize("shape", [(33, 96), (5, 31), (3, 7001), (2, 30000)], ids=str)
def test_pair_cosine(shape):
    h1, h2 = (activations(*shape, dtype=BF16, device=DEVICE) for _ in range(2))
    target = torch.where(torch.rand(shape[0], device=DEVICE) < 0.5, 1.0, -1.0)
    options = 0.1, True, 0.5, True, True
    loss, coefficients, d1, d2 = OPS.pair_cosine_forward(h1, h2, target, *options, "triton")
    truth = reference.pair_cosine_forward(h1.double(), h2.double(), target.double(), *options)
    plain = reference.pair_cosine_forward(h1.float(), h2.float(), target, *options)
    for i, x in enumerate((loss, coefficients, d1, d2)):
        assert_close_to_reference(x, plain[i].to(x.dtype), truth[i], factor=3.0, name=f"output {i}")
    grad = torch.randn(shape[0], device=DEVICE)
    later = three(reference.pair_cosine_backward, (h1, h2, coefficients, grad), True, True, True)
    assert_right("its gradient", later, 3.0)
    scaled = d1 * torch.tensor(-1.5)
    OPS.scale_(d1, torch.tensor(-1.5, device=DEVICE), "triton")
    assert torch.equal(d1, scaled)


@pytest.mark.parametrize("last", [False, True], ids=["NCL", "NLC"])
@pytest.mark.parametrize("shape", [(2, 33, 107), (40, 5, 7)], ids=str)
def test_pool(shape, last):
    n, c, length = shape
    h = activations(*((n, length, c) if last else shape), dtype=BF16, device=DEVICE)
    h = h.transpose(1, 2) if last else h
    assert_right("pool", three(reference.pool_goodness_forward, (h,), True, True))
    pooled = reference.pool_goodness_forward(h, True, True)[1]
    grads = torch.randn(n, device=DEVICE), torch.randn(n, c, device=DEVICE)
    assert_right("its gradient", three(reference.pool_goodness_backward, (h, pooled, *grads), True, True), 3.0)


def test_many_layers():
    h = [activations(5 + i, w, dtype=BF16, device=DEVICE) for i, w in enumerate((700, 128, 37))]
    ours = OPS.goodness_many(h, True, True, "triton")
    truth = reference.goodness_many([x.double() for x in h], True, True)
    assert_close_to_reference(ours, reference.goodness_many(h, True, True), truth, name="goodness")
    grad = torch.randn_like(ours)
    exact = reference.goodness_many_backward([x.double() for x in h], grad.double(), True, True)
    plain = reference.goodness_many_backward(h, grad, True, True)
    for ours, x, y in zip(OPS.goodness_many_backward(h, grad, True, True, "triton"), plain, exact, strict=True):
        assert_close_to_reference(ours, x, y, factor=3.0, name="its gradient")


@pytest.mark.parametrize("shape", [(33, 96), (5, 31), (3, 4096)], ids=str)
def test_normalize(shape):
    for dtype in (FP32, BF16):
        check_normalize(torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape, device=DEVICE).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_goodness(dtype):
    n, k, h = 33, 100, 70
    x, weight, bias = (activations(*size, device=DEVICE) for size in ((n, k), (h, k), (h,)))
    x, weight, bias = (t.to(dtype) for t in (x, weight / 10, bias))
    ours = OPS.linear_goodness(x, weight, bias, True, True, "triton")
    plain, truth = (F.linear(x.to(d), weight.to(d), bias.to(d)).relu().square().mean(1) for d in (dtype, torch.float64))
    assert_close_to_reference(ours, plain, truth, name="goodness")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(34, 96), (6, 31), (4, 4096), (MANY, 512)], ids=str)
def test_positives(shape, dtype):
    for pairing in (ops.POSITIVE_GIVEN, ops.POSITIVE_STACKED, ops.POSITIVE_INTERLEAVED):
        positive = None if pairing else unit(*shape, dtype)
        check_positives(unit(*shape, dtype), positive, pairing, both=not pairing, decoupled=shape[0] == 6)
    check_positives(shifted(unit(*shape, dtype)), unit(*shape, dtype), ops.POSITIVE_GIVEN, False, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(34, 96), (6, 31), (4, 4096), (MANY, 512)], ids=str)
def test_class_positives(shape, dtype):
    for classes in (1, 10, shape[0]):
        group = torch.randint(classes, shape[:1], device=DEVICE)
        check_class_positives(unit(*shape, dtype), group, classes)
    check_class_positives(shifted(unit(*shape, dtype)), group, classes)

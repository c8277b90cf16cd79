"""The similarity operators of every backend against the float64 reference, and their registration against opcheck."""

from __future__ import annotations

import pytest
import torch
from similarity_cases import (
    BACKENDS,
    DTYPES,
    LSE_TERMS,
    MODES,
    SHAPES,
    device_of,
    eager,
    parts,
    problem,
    to_float64,
    vectors,
)

from ffcl_fast import ops, reference
from helpers import assert_close_to_reference

_ops = torch.ops.ffcl_fast


def _compare(backend, args, need=(True, True), both=True, save=True):
    """Forward and backward of one problem against the reference in float64 and plain PyTorch in the same dtype."""
    q, k = args[:2]
    symmetric = k is None
    both = both and not symmetric
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    row, col, cache = _ops.similarity_forward(*args, both, save, backend)
    truth_row, truth_col, _ = reference.similarity_forward(*to_float64(args), both, False)
    row_grad = torch.randn(row.shape[0], dtype=row.dtype, device=row.device)
    col_grad = torch.randn(col.shape[0], dtype=row.dtype, device=row.device)
    dq, dk = _ops.similarity_backward(*args, row, col, row_grad, col_grad, cache, *need, backend)
    truth_dq, truth_dk = reference.similarity_backward(
        *to_float64(args), truth_row, truth_col, row_grad.double(), col_grad.double(), None, *need
    )
    terms = parts(to_float64(args), truth_row, truth_col, row_grad.double(), col_grad.double())
    eager_row, eager_col, eager_dq, eager_dk = eager(*args, row_grad, col_grad)
    assert row.dtype == ops.accumulator_dtype(q) and dq.dtype == q.dtype
    assert_close_to_reference(row, eager_row, truth_row, name="row_lse", terms=LSE_TERMS)
    if both:
        assert_close_to_reference(col, eager_col, truth_col, name="col_lse", terms=LSE_TERMS)
    else:
        assert not col.numel()
    if need[0]:
        assert_close_to_reference(dq, eager_dq, truth_dq, factor=3, name="dq", terms=terms[0])
    else:
        assert dq.shape == (0, q.shape[1])
    if need[1] and not symmetric:
        assert_close_to_reference(dk, eager_dk, truth_dk, factor=3, name="dk", terms=terms[1])
    else:
        assert dk.shape == (0, q.shape[1])
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was changed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", (False, True), ids=("q-k", "q-q"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity(backend, dtype, symmetric, shape):
    _compare(backend, problem(*shape, dtype, ops.EXCLUDE_NONE, symmetric, device=device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", (False, True), ids=("q-k", "q-q"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", ((1, 1, 3), (40, 40, 17), (150, 333, 32)), ids=str)
def test_exclusions(backend, symmetric, mode, shape):
    _compare(backend, problem(*shape, torch.float32, MODES[mode], symmetric, device=device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", (False, True), ids=("q-k", "q-q"))
@pytest.mark.parametrize("kind", ("isotropic", "cone", "raw"))
@pytest.mark.parametrize("scale", (-5.0, 2.0, 64.0, 100.0, 300.0))
def test_scales(backend, symmetric, kind, scale):
    _compare(backend, problem(70, 90, 40, torch.float32, ops.EXCLUDE_NONE, symmetric, scale, kind, device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("isotropic", "raw"))
@pytest.mark.parametrize("shape", ((1024, 1024, 64), (700, 5000, 24)), ids=str)
def test_many_tiles(backend, kind, shape):
    for symmetric in (False, True):
        if not symmetric or shape[0] == shape[1]:
            mode = ops.EXCLUDE_DIAGONAL
            _compare(backend, problem(*shape, torch.float32, mode, symmetric, 20.0, kind, device_of(backend)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", (False, True))
@pytest.mark.parametrize("need", ((True, False), (False, True), (True, True)), ids=("dq", "dk", "dq-dk"))
@pytest.mark.parametrize("both", (False, True))
def test_only_what_is_asked_for(backend, save, need, both):
    _compare(backend, problem(60, 50, 20, torch.float32, ops.EXCLUDE_NONE, False, device=device_of(backend)),
             need, both, save)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_whose_best_cosine_is_far_below_the_others(backend):
    """Temperature 0.01: one offset for all rows would lose row 0, all of whose logits are 200 below the largest."""
    device = device_of(backend)
    axis = torch.zeros(40, 16)
    axis[:, 0] = 1.0
    q, k = axis.clone(), axis + 0.01 * torch.randn(40, 16)
    k = torch.nn.functional.normalize(k, dim=1)
    q[0, 0] = -1.0
    args = (q.to(device), k.to(device), torch.tensor(100.0, device=device), None, None, ops.EXCLUDE_NONE)
    _compare(backend, args)
    _compare(backend, (args[1], args[0], *args[2:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_excluded(backend):
    device = device_of(backend)
    q, k = vectors(9, 8, device=device), vectors(6, 8, device=device)
    row_ids, col_ids = torch.tensor([1] * 4 + [2] * 5, device=device), torch.ones(6, dtype=torch.int64, device=device)
    args = (q, k, torch.tensor(3.0, device=device), row_ids, col_ids, ops.EXCLUDE_SAME_ID)
    row, col, cache = _ops.similarity_forward(*args, True, True, backend)
    assert (row[:4] == -torch.inf).all() and row[4:].isfinite().all() and col.isfinite().all()
    _compare(backend, args)
    args = (*args[:4], torch.ones_like(row_ids)[:6], ops.EXCLUDE_DIFFERENT_ID)
    assert _ops.similarity_forward(*args, True, True, backend)[0][4:].eq(-torch.inf).all()
    _compare(backend, args)
    lonely = (q[:1], None, args[2], None, None, ops.EXCLUDE_DIAGONAL)
    row, col, cache = _ops.similarity_forward(*lonely, True, True, backend)
    assert row.tolist() == [-torch.inf]
    dq, _ = _ops.similarity_backward(*lonely, row, col, torch.ones_like(row), col, cache, True, True, backend)
    assert not dq.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Transposed, strided, expanded and sliced inputs give what their contiguous copies give."""
    device = device_of(backend)
    wide = vectors(64, 48, device=device)
    for x in (vectors(24, 64, device=device).T, wide[::2], wide[:, ::2], wide[3:, 5:20], wide[:1].expand(8, 48)):
        for symmetric in (False, True):
            y = None if symmetric else vectors(31, x.shape[1], device=device).T.contiguous().T
            rest = (torch.tensor(7.0, device=device), None, None, ops.EXCLUDE_NONE)
            dense = (x.contiguous(), None if y is None else y.contiguous(), *rest)
            _compare(backend, (x, y, *rest))
            row = _ops.similarity_forward(x, y, *rest, False, False, backend)[0]
            torch.testing.assert_close(row, _ops.similarity_forward(*dense, False, False, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_not_finite(backend, value):
    device = device_of(backend)
    for symmetric in (False, True):
        q, k, *rest = problem(50, 45, 12, torch.float32, ops.EXCLUDE_NONE, symmetric, device=device)
        q[7, 3] = value
        row, col, _ = _ops.similarity_forward(q, k, *rest, True, False, backend)
        assert not row[7].isfinite()
        if value != value:  # an infinity times a negative number leaves other rows and columns finite, rightly
            assert not (row if symmetric else col).isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits(backend):
    args = problem(300, 500, 48, torch.float32, ops.EXCLUDE_NONE, False, device=device_of(backend))

    def once():
        row, col, cache = _ops.similarity_forward(*args, True, True, backend)
        return row, col, *_ops.similarity_backward(*args, row, col, row, col, cache, True, True, backend)

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", (True, False))
@pytest.mark.parametrize("shape", ((1, 1, 1), (7, 7, 3), (130, 130, 96), (60, 91, 200)), ids=str)
def test_siglip(backend, dtype, positives, shape):
    n, m, d = shape
    if positives and n != m:
        n = m
    device = device_of(backend)
    q, k = vectors(n, d, dtype, device=device), vectors(m, d, dtype, device=device)
    scale, bias = torch.tensor(10.0, device=device), torch.tensor(-4.0, device=device)
    loss, dq, dk, dbias = _ops.siglip(q, k, scale, bias, positives, True, True, backend)
    truth = reference.siglip(*to_float64((q, k, scale, bias)), positives, True, True)
    alone = _ops.siglip(q, k, scale, bias, positives, False, False, backend)
    torch.testing.assert_close(alone[0], loss)
    assert alone[1].shape == alone[2].shape == (0, d) and alone[3].shape == ()
    for need in ((True, False), (False, True)):
        part = _ops.siglip(q, k, scale, bias, positives, *need, backend)
        assert all(map(torch.equal, part, (loss, dq if need[0] else dq[:0], dk if need[1] else dk[:0], dbias)))

    a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
    bias.requires_grad_()
    labels = -torch.ones(n, m, dtype=dtype, device=device)
    if positives:
        labels.diagonal().fill_(1)
    plain = -torch.nn.functional.logsigmoid(labels * (scale.to(dtype) * (a @ b.T) + bias.to(dtype))).sum()
    plain.backward()
    assert_close_to_reference(loss, plain, truth[0], name="loss")
    assert_close_to_reference(dq, a.grad, truth[1], factor=3, name="dq")
    assert_close_to_reference(dk, b.grad, truth[2], factor=3, name="dk")
    assert_close_to_reference(dbias, bias.grad, truth[3], factor=3, name="dbias")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", (False, True), ids=("q-k", "q-q"))
@pytest.mark.parametrize("mode", ("none", "same_id"))
@pytest.mark.parametrize("save", (False, True))
def test_opcheck_similarity(backend, symmetric, mode, save):
    args = problem(12, 9, 5, torch.float32, MODES[mode], symmetric, device=device_of(backend))
    # What a backend writes into its cache, and how much of it, is its own affair: values are compared without one.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils = utils if save else (*utils, "test_aot_dispatch_dynamic")
    torch.library.opcheck(_ops.similarity_forward.default, (*args, True, save, backend), test_utils=utils)
    row, col, cache = _ops.similarity_forward(*args, True, save, backend)
    torch.library.opcheck(
        _ops.similarity_backward.default, (*args, row, col, row, col, cache, True, not symmetric, backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("need", ((False, False), (True, False), (False, True), (True, True)), ids=str)
def test_opcheck_siglip(backend, need):
    q, k, scale, *_ = problem(12, 12, 5, torch.float32, ops.EXCLUDE_NONE, False, device=device_of(backend))
    torch.library.opcheck(_ops.siglip.default, (q, k, scale, scale.neg(), True, *need, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_touch_the_operators(backend):
    device = device_of(backend)
    args = problem(20, 30, 16, torch.float32, ops.EXCLUDE_NONE, False, device=device)
    expected = _ops.similarity_forward(*args, True, False, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        row, col, _ = _ops.similarity_forward(*args, True, False, backend)
    assert torch.equal(row, expected[0]) and torch.equal(col, expected[1])

"""The differentiable functions: gradients, learnable scale, options, validation, autocast, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import BACKENDS, LSE_TERMS, device_of, vectors
from torch._dynamo.testing import CompileCounter

import ffcl_fast.functional as fn
from ffcl_fast import reference
from helpers import assert_close_to_reference

CHECKABLE = ("reference", "panels")  # float64 on the CPU
EXCLUDES = (None, "diagonal", "same_id", "same_id_off_diagonal", "different_id")


def _ids(exclude, n, device="cpu"):
    return torch.arange(n, device=device) % 3 if exclude not in (None, "diagonal") else None


@pytest.mark.parametrize("backend", CHECKABLE)
@pytest.mark.parametrize("exclude", EXCLUDES)
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
def test_gradcheck_similarity_lse(backend, exclude, symmetric, normalize):
    q = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def primitive(q, k, scale):
        row, col = fn.similarity_lse(
            q,
            None if symmetric else k,
            scale,
            normalize=normalize,
            row_ids=_ids(exclude, 6),
            col_ids=None if symmetric else _ids(exclude, 5),
            exclude=exclude,
            backend=backend,
        )
        return row if symmetric else torch.cat((row, col))

    inputs = (q, scale) if symmetric else (q, k, scale)
    f = (lambda q, scale: primitive(q, None, scale)) if symmetric else primitive
    assert torch.autograd.gradcheck(f, inputs)


BANK = F.normalize(torch.randn(5, 4), dim=1)
LOSSES = {
    "info_nce": lambda x, y, z, s, b: fn.info_nce(x, y, temperature=1 / s, backend=b),
    "info_nce negatives": lambda x, y, z, s, b: fn.info_nce(x, y, z, temperature=1 / s, backend=b),
    "info_nce ids": lambda x, y, z, s, b: fn.info_nce(x, y, temperature=1 / s, ids=_ids("", 6), backend=b),
    "info_nce negative ids": lambda x, y, z, s, b: fn.info_nce(
        x, y, z, 1 / s, ids=_ids("", 6), negative_ids=_ids("", 5), backend=b
    ),
    "info_nce decoupled": lambda x, y, z, s, b: fn.info_nce(x, y, temperature=1 / s, decoupled=True, backend=b),
    "info_nce paired": lambda x, y, z, s, b: fn.info_nce(
        x, y, torch.stack((z[:1] * x, z[1:2] * y, x - y), 1), 1 / s, "mean", "paired", backend=b
    ),
    "nt_xent": lambda x, y, z, s, b: fn.nt_xent(x, y, 1 / s, backend=b),
    "nt_xent ids": lambda x, y, z, s, b: fn.nt_xent(x, y, 1 / s, ids=_ids("", 6), backend=b),
    "nt_xent decoupled": lambda x, y, z, s, b: fn.nt_xent(x, y, 1 / s, decoupled=True, reduction="sum", backend=b),
    "nt_xent bank": lambda x, y, z, s, b: fn.nt_xent(x, y, 1 / s, BANK.to(x), backend=b),
    "sup_con": lambda x, y, z, s, b: fn.sup_con(torch.stack((x, y), 1), _ids("", 6), temperature=1 / s, backend=b),
    "sup_con lonely": lambda x, y, z, s, b: fn.sup_con(
        torch.stack((x, y), 1), torch.tensor([0, 1, 1, 2, 3, 4]), temperature=1 / s, backend=b
    ),
    "sup_con one": lambda x, y, z, s, b: fn.sup_con(
        torch.stack((x, y), 1), torch.tensor([0, 1, 1, 2, 3, 4]), None, 1 / s, "one", backend=b
    ),
    "sup_con simclr": lambda x, y, z, s, b: fn.sup_con(torch.stack((x, y), 1), temperature=1 / s, backend=b),
    "sup_con mask": lambda x, y, z, s, b: fn.sup_con(
        torch.stack((x, y, x * y), 1), None, torch.eye(6) + torch.eye(6).roll(1, 0), 1 / s, backend=b
    ),
    "clip": lambda x, y, z, s, b: fn.clip(x, y, s, backend=b),
    "clip ids": lambda x, y, z, s, b: fn.clip(x, y, s, ids=_ids("", 6), backend=b),
    "clip with itself": lambda x, y, z, s, b: fn.clip(x, x, s, backend=b),
    "siglip": lambda x, y, z, s, b: fn.siglip(x, y, s, z[0, 0], backend=b),
    "siglip negatives": lambda x, y, z, s, b: fn.siglip(x, z, s, z[0, 0], negative_only=True, backend=b),
}


@pytest.mark.parametrize("backend", CHECKABLE)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_losses(backend, loss):
    x, y = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: LOSSES[loss](*a, backend), (x, y, z, scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_losses_against_float64(backend, loss, dtype):
    """Value and gradients near those of float64, at the input dtype's own precision."""
    device = device_of(backend)
    if device != "cpu" and "ids" in loss:
        pytest.skip("the ids of this case are CPU tensors")
    inputs = [vectors(n, 4, dtype, device=device) for n in (6, 6, 5)] + [torch.tensor(1.7, device=device)]
    results = []
    for double in (False, True):
        leaves = [(x.double() if double else x.clone()).requires_grad_() for x in inputs]
        value = LOSSES[loss](*leaves, "reference" if double else backend)
        assert value.dtype == (torch.float64 if double else torch.float32)
        value.backward()
        results.append([value.detach()] + [x.grad for x in leaves if x.grad is not None])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).norm() <= tolerance * max(float(truth.norm()), 0.3), (ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exclude", EXCLUDES)
@pytest.mark.parametrize("shape", ((1, 1, 1), (40, 23, 17), (70, 70, 96)), ids=str)
def test_similarity_lse(backend, exclude, shape):
    n, m, d = shape
    device = device_of(backend)
    q, k = (vectors(r, d, kind="raw", device=device).requires_grad_() for r in (n, m))
    row_ids, col_ids = _ids(exclude, n, device), _ids(exclude, m, device)
    row, col = fn.similarity_lse(q, k, 6.0, row_ids=row_ids, col_ids=col_ids, exclude=exclude, backend=backend)
    mode = fn.similarity.EXCLUDE[exclude]
    s64 = reference.similarity_matrix(
        q.detach().double(), k.detach().double(), torch.tensor(6.0, device=device).double(), row_ids, col_ids, mode
    )
    s32 = reference.similarity_matrix(q.detach(), k.detach(), torch.tensor(6.0, device=device), row_ids, col_ids, mode)
    assert_close_to_reference(row, s32.logsumexp(1), s64.logsumexp(1), name="row_lse", terms=LSE_TERMS)
    assert_close_to_reference(col, s32.logsumexp(0), s64.logsumexp(0), name="col_lse", terms=LSE_TERMS)
    alone, nothing = fn.similarity_lse(
        q, k, 6.0, row_ids=row_ids, col_ids=col_ids, exclude=exclude, both=False, backend=backend
    )
    assert nothing is None
    torch.testing.assert_close(alone, row)
    finite = row.isfinite()
    if finite.any():
        row[finite].sum().backward()
        assert q.grad.isfinite().all() and k.grad.isfinite().all()


def test_self_similarity_is_recognised():
    q = vectors(20, 8)
    row, col = fn.similarity_lse(q, None, 3.0)
    assert col is row
    again, _ = fn.similarity_lse(q, q, 3.0)
    assert torch.equal(again, row)
    other, other_col = fn.similarity_lse(q, q.clone(), 3.0)
    torch.testing.assert_close(other, row)
    torch.testing.assert_close(other_col, row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_of_zero(backend):
    """dscale = <q, dq> / scale is 0 / 0 there; the gradient still has to be right."""
    device = device_of(backend)
    q, k = vectors(30, 8, device=device), vectors(30, 8, device=device)
    gradients = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        scale = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        fn.clip(q.to(dtype), k.to(dtype), scale, backend=name).backward()
        gradients.append(scale.grad)
    s = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    logits, labels = s * q.double() @ k.double().T, torch.arange(30, device=device)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient.double(), s.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_scale(backend):
    device = device_of(backend)
    q, k = vectors(30, 8, device=device), vectors(20, 8, device=device)
    row, col = fn.similarity_lse(q, k, -7.0, backend=backend)
    torch.testing.assert_close(row, (-7 * q @ k.T).logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(col, (-7 * q @ k.T).logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_requested_gradients(backend):
    device = device_of(backend)
    for wanted in range(8):
        leaves = [vectors(12, 6, device=device), vectors(12, 6, device=device), torch.tensor(4.0, device=device)]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(wanted >> i & 1))
        for loss in (fn.clip(*leaves, backend=backend), fn.similarity_lse(*leaves, backend=backend)[0].sum()):
            assert loss.requires_grad == bool(wanted)
            if wanted:
                loss.backward()
        assert [x.grad is not None for x in leaves] == [x.requires_grad for x in leaves]


def test_second_derivative_is_refused():
    q = vectors(8, 4).requires_grad_()
    for loss in (
        fn.nt_xent(q, q.flip(0)),
        fn.clip(q, q, 3.0),
        fn.siglip(q, q, 3.0),
        fn.sup_con(q[:, None], q[:, 0] > 0),
        fn.goodness(q).sum(),
        fn.goodness_normalize(q, relu=True).sum(),
        fn.pool_goodness(q[:, :, None])[0].sum(),
        fn.goodness_many([q, q[:3]])[0].sum(),
        fn.linear_goodness(q, torch.ones(3, 4)).sum(),
        fn.pair_cosine(q, q.flip(0), torch.ones(8)),
        fn.pair_cosine(q, q.flip(0), torch.ones(8), reduction="none").sum(),
    ):
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate"):
            (gradient.sum() + q.sum()).backward()


def test_backward_twice():
    q, k = vectors(9, 4).requires_grad_(), vectors(9, 4)
    loss = fn.siglip(q, k, 5.0, -5.0) + fn.clip(q, k, 5.0)
    loss.backward(retain_graph=True)
    once = q.grad.clone()
    loss.backward()
    torch.testing.assert_close(q.grad, 2 * once)


def test_false_negatives_and_decoupling():
    """Against the similarity matrix, written out."""
    x, y = vectors(30, 8, torch.float64), vectors(30, 8, torch.float64)
    ids = torch.randint(0, 10, (30,))
    same = ids[:, None] == ids[None, :]
    s = 5 * x @ y.T
    positive = s.diagonal()
    for decoupled in (False, True):
        normaliser = s.masked_fill(same, -torch.inf).exp().sum(1) + (0 if decoupled else positive.exp())
        expected = normaliser.log() - positive
        got = fn.info_nce(x, y, None, 0.2, "none", ids=ids, decoupled=decoupled)
        torch.testing.assert_close(got, expected)
    z = torch.cat((x, y))
    s, twice = 5 * z @ z.T, ids.repeat(2)
    positive = s.diagonal(30).repeat(2)
    normaliser = s.masked_fill(twice[:, None] == twice[None, :], -torch.inf).exp().sum(1) + positive.exp()
    torch.testing.assert_close(fn.nt_xent(x, y, 0.2, ids=ids, reduction="none"), normaliser.log() - positive)
    assert fn.nt_xent(x[:1], y[:1], decoupled=True) == 0  # no negatives at all


def test_rows_without_a_positive():
    """They contribute 0 and are left out of the mean; without any positive the loss and its gradient are 0."""
    features = vectors(12, 8)[:, None].requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    s = (features.squeeze(1) @ features.squeeze(1).T).detach().double() / 0.07
    s = s.fill_diagonal_(-torch.inf).log_softmax(1)
    same = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    rows = [-s[i][same[i]].mean() for i in range(5)]
    loss = fn.sup_con(features, labels)
    torch.testing.assert_close(loss.double(), torch.stack(rows).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert features.grad.isfinite().all() and features.grad.any()
    features.grad = None
    for arguments in ({"labels": torch.arange(12)}, {}, {"mask": torch.eye(12)}):
        loss = fn.sup_con(features, **arguments)
        loss.backward()
        assert loss == 0 and not features.grad.any()


@pytest.mark.parametrize(
    "dtype", (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
)
def test_labels_of_any_integer_type(dtype):
    features, labels = vectors(20, 6)[:, None], torch.randint(0, 2, (20,))
    torch.testing.assert_close(fn.sup_con(features, labels.to(dtype)), fn.sup_con(features, labels))
    torch.testing.assert_close(fn.sup_con(features, labels.to(dtype)[:, None]), fn.sup_con(features, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("loss", ("info_nce", "nt_xent", "sup_con", "sup_con simclr", "clip", "siglip"))
def test_not_finite(backend, value, loss):
    device = device_of(backend)
    x, y, z = (vectors(6, 4, device=device) for _ in range(3))
    for t in (x, y):
        kept, t[2, 1] = t[2, 1].clone(), value
        assert LOSSES[loss](x, y, z, 5.0, backend).isnan()
        t[2, 1] = kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_and_one_dimension(backend):
    device = device_of(backend)
    one = [vectors(1, 5, device=device).requires_grad_() for _ in range(2)]
    for loss in (
        fn.info_nce(*one, backend=backend), fn.nt_xent(*one, backend=backend), fn.clip(*one, 9.0, backend=backend)
    ):  # fmt: skip
        assert loss == 0
        loss.backward()
        assert not any(x.grad.any() for x in one)
    narrow = [torch.randn(9, 1, device=device, requires_grad=True) for _ in range(2)]
    fn.info_nce(*narrow, backend=backend).backward()  # a direction in one dimension has no gradient
    assert all(x.grad.abs().max() <= 1e-5 / x.abs().min() for x in narrow)


def test_inputs_are_not_changed():
    x, y, z, ids = vectors(10, 4), vectors(10, 4), vectors(7, 4), torch.arange(10) % 4
    before = [t.clone() for t in (x, y, z, ids)]
    for f in (
        lambda: fn.info_nce(x.requires_grad_(), y, z),
        lambda: fn.nt_xent(x, y, ids=ids),
        lambda: fn.sup_con(x[:, None], ids),
        lambda: fn.clip(x, y, 4.0),
        lambda: fn.siglip(x, y, 4.0, -4.0),
    ):
        f().backward()
        assert all(torch.equal(a, b) for a, b in zip((x, y, z, ids), before, strict=True))


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    "error,names,call",
    (
        (ValueError, "query", lambda: fn.info_nce(torch.randn(3), X)),
        (ValueError, "query", lambda: fn.info_nce(torch.randn(0, 3), torch.randn(0, 3))),
        (ValueError, "positive_key", lambda: fn.info_nce(X, torch.randn(5, 3))),
        (ValueError, "positive_key", lambda: fn.info_nce(X, torch.randn(4, 2))),
        (TypeError, "positive_key", lambda: fn.info_nce(X, X.double())),
        (TypeError, "query", lambda: fn.info_nce(X.int(), X)),
        (TypeError, "query", lambda: fn.info_nce([1.0], X)),
        (TypeError, "query", lambda: fn.info_nce(X.to_sparse(), X)),
        (TypeError, "text_features", lambda: fn.clip(X, X.to_mkldnn(), 1.0)),
        (ValueError, "negative_keys", lambda: fn.info_nce(X, X, torch.randn(5, 4))),
        (ValueError, "negative_keys", lambda: fn.info_nce(X, X, torch.randn(0, 3))),
        (ValueError, "negative_keys", lambda: fn.info_nce(X, X, X, negative_mode="paired")),
        (RuntimeError, "backend='cuda'", lambda: fn.info_nce(X, X, X[:, None], 0.1, "mean", "paired", backend="cuda")),
        (ValueError, "reduction", lambda: fn.info_nce(X, X, reduction="max")),
        (ValueError, "negative_mode", lambda: fn.info_nce(X, X, negative_mode="x")),
        (ValueError, "temperature", lambda: fn.info_nce(X, X, temperature=0.0)),
        (ValueError, "temperature", lambda: fn.info_nce(X, X, temperature=torch.ones(2))),
        (TypeError, "temperature", lambda: fn.info_nce(X, X, temperature="0.1")),
        (ValueError, "ids", lambda: fn.info_nce(X, X, ids=torch.arange(3))),
        (TypeError, "ids", lambda: fn.info_nce(X, X, ids=torch.rand(4))),
        (ValueError, "negative_ids", lambda: fn.info_nce(X, X, X, ids=torch.arange(4))),
        (ValueError, "ids", lambda: fn.info_nce(X, X, X[:, None], negative_mode="paired", ids=torch.arange(4))),
        (ValueError, "out1", lambda: fn.nt_xent(X, X[:2])),
        (ValueError, "negatives", lambda: fn.nt_xent(X, X, negatives=torch.randn(4, 2))),
        (ValueError, "features", lambda: fn.sup_con(X)),
        (ValueError, "features", lambda: fn.sup_con(torch.randn(0, 2, 3))),
        (ValueError, "labels", lambda: fn.sup_con(X[:, None], torch.arange(3))),
        (TypeError, "labels", lambda: fn.sup_con(X[:, None], torch.rand(4))),
        (TypeError, "mask", lambda: fn.sup_con(X[:, None], mask=[[1]])),
        (TypeError, "mask", lambda: fn.sup_con(X[:, None], mask=torch.eye(4, dtype=torch.complex64))),
        (ValueError, "mask", lambda: fn.sup_con(X[:, None], mask=torch.ones(3, 4))),
        (ValueError, "labels and mask", lambda: fn.sup_con(X[:, None], torch.arange(4), torch.ones(4, 4))),
        (ValueError, "contrast_mode", lambda: fn.sup_con(X[:, None], contrast_mode="two")),
        (ValueError, "base_temperature", lambda: fn.sup_con(X[:, None], base_temperature=0)),
        (ValueError, "text_features", lambda: fn.clip(X, X[:2], 1.0)),
        (ValueError, "logit_scale", lambda: fn.clip(X, X, torch.ones(2))),
        (ValueError, "logit_scale", lambda: fn.clip(X, X, float("nan"))),
        (TypeError, "logit_bias", lambda: fn.siglip(X, X, 1.0, torch.tensor(1))),
        (ValueError, "text_features", lambda: fn.siglip(X, X[:2], 1.0)),
        (ValueError, "backend", lambda: fn.clip(X, X, 1.0, backend="gpu")),
        (ValueError, "exclude", lambda: fn.similarity_lse(X, X, 1.0, exclude="self")),
        (ValueError, "row_ids", lambda: fn.similarity_lse(X, None, 1.0, exclude="same_id")),
        (ValueError, "row_ids", lambda: fn.similarity_lse(X, None, 1.0, row_ids=torch.arange(4))),
        (ValueError, "col_ids", lambda: fn.similarity_lse(X, None, 1.0, col_ids=torch.arange(4))),
        (TypeError, "k must", lambda: fn.similarity_lse(X, X.half(), 1.0)),
    ),
)
def test_errors(error, names, call):
    with pytest.raises(error, match=names):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ("info_nce", "nt_xent", "sup_con", "clip", "siglip"))
def test_autocast(backend, loss):
    """Products in autocast's dtype on what autocast would cast, everything else in float32."""
    device = device_of(backend)
    x, y, z = (vectors(6, 4, device=device).requires_grad_() for _ in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = LOSSES[loss](x, y, z, 5.0, backend)
    expected = LOSSES[loss](x.bfloat16(), y.bfloat16(), z, 5.0, backend)
    exact = LOSSES[loss](x, y, z, 5.0, backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0.02)
    (gradient,) = torch.autograd.grad(got, x)
    (truth,) = torch.autograd.grad(exact, x)
    assert gradient.dtype == torch.float32 and (gradient - truth).norm() <= 0.05 * truth.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_compile(loss):
    """One graph, the same results, and no recompilation for every batch size; a backend is opaque to the compiler."""
    backend, device = "auto", "cpu"
    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x, y, z, scale):
        return LOSSES[loss](x, y, z, scale, backend)

    fixed = any(word in loss for word in ("ids", "mask", "lonely", "one", "sup_con")) and "simclr" not in loss
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n in (6,) if fixed else (6, 9, 17, 33):
        inputs = [vectors(m, 4, device=device) for m in (n, n, 5 if fixed else n + 2)]
        inputs.append(torch.tensor(3.0, device=device))
        results = []
        for g in (compiled, f):
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = g(*leaves)
            value.backward()
            results.append([value.detach()] + [x.grad for x in leaves if x.grad is not None])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for 4 batch sizes"


@pytest.mark.parametrize("loss", ("nt_xent", "info_nce", "sup_con", "clip", "siglip", "similarity_lse", "goodness"))
def test_compile_rows_that_data_select(loss):
    """As many rows as a mask holds: torch.compile does not know the number, and must not be asked."""
    calls = {
        "nt_xent": lambda x, y: fn.nt_xent(x, y),
        "info_nce": lambda x, y: fn.info_nce(x, y),
        "sup_con": lambda x, y: fn.sup_con(F.normalize(torch.stack((x, y), 1), dim=2)),
        "clip": lambda x, y: fn.clip(x, y, 3.0),
        "siglip": lambda x, y: fn.siglip(x, y, 3.0, -3.0),
        "similarity_lse": lambda x, y: fn.similarity_lse(x, y, 3.0)[0].sum(),
        "goodness": lambda x, y: fn.goodness(x).sum(),
    }

    def f(views, mask):
        return calls[loss](*views[:, mask])

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for n in (9, 20):
            views, mask = vectors(2 * n, 4).view(2, n, 4).requires_grad_(), torch.arange(n) % 3 > 0
            results = [torch.autograd.grad(value, views)[0] for value in (g(views, mask) for g in (compiled, f))]
            torch.testing.assert_close(*results)
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            compiled(views, torch.zeros(20, dtype=torch.bool))


def test_compile_labels_of_any_batch():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fn.sup_con, fullgraph=True, backend=counter)
    for n in (6, 9, 12, 17, 33):
        features, labels = vectors(2 * n, 4).view(n, 2, 4), torch.arange(n) % 4
        torch.testing.assert_close(compiled(features, labels), fn.sup_con(features, labels))
    assert counter.frame_count <= 2


@pytest.mark.compiler
@pytest.mark.long
@pytest.mark.parametrize("loss", ("nt_xent", "sup_con", "clip", "siglip"))
def test_compile_with_inductor(loss, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not of other sources
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: LOSSES[loss](*a, "auto"), fullgraph=True)
    inputs = [vectors(6, 4), vectors(6, 4), vectors(5, 4), torch.tensor(3.0)]
    results = []
    for g in (compiled, lambda *a: LOSSES[loss](*a, "auto")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = g(*leaves)
        value.backward()
        results.append([value.detach()] + [x.grad for x in leaves if x.grad is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

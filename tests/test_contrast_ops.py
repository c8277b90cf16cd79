"""The contrast operators of the CPU backend against the reference in float64, and their registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from similarity_cases import BACKENDS, DTYPES, to_float64

from ffcl_fast import backends, ops, reference
from ffcl_fast.backends import native
from ffcl_fast.functional import clip, info_nce, nt_xent, sup_con
from ffcl_fast.functional import contrast as contrast_module
from helpers import assert_close_to_reference

_ops = torch.ops.ffcl_fast
CPU = [p for p in BACKENDS if p.values == ("cpu",)]
SHAPES = ((1, 1), (2, 3), (5, 17), (40, 33), (131, 96), (200, 130))


def rows(n: int, d: int, dtype=torch.float32) -> torch.Tensor:
    """Rows of lengths from about 1e-3 to 1e3."""
    return (torch.randn(n, d) * torch.logspace(-3, 3, n)[torch.randperm(n), None]).to(dtype)


def views(n: int, d: int, dtype, decoupled: bool):
    """NT-Xent's call: two views, rows of one sample being each other's positives."""
    ids = torch.arange(n)
    order = torch.arange(2 * n).view(2, n).T.reshape(-1)
    kind = ops.CONTRAST_DECOUPLED if decoupled else ops.CONTRAST_SOFTPLUS
    return (
        rows(n, d, dtype), rows(n, d, dtype), None, None, torch.tensor(7.0), ids.repeat(2), None, ops.EXCLUDE_SAME_ID,
        order, ids.repeat_interleave(2), True, True, False, kind,
    )  # fmt: skip


def classes(n: int, d: int, dtype, number: int):
    """SupCon's call: rows of unit length in ``number`` classes."""
    group, order = torch.randint(0, number, (n,)).sort()
    z = F.normalize(torch.randn(n, d), dim=1).to(dtype)
    options = (None, None, ops.EXCLUDE_SAME_ID, order, group, False, False, False, ops.CONTRAST_MEAN)
    return z, None, None, None, torch.tensor(9.0), *options


def keys(n: int, d: int, dtype, both: bool, unit: bool):
    """CLIP's and InfoNCE's call: the positive of row i is key i."""
    q, k = rows(n, d, dtype), rows(n, d, dtype)
    if not unit:
        q, k = (F.normalize(x.float(), dim=1).to(dtype) for x in (q, k))
    options = (ops.EXCLUDE_DIAGONAL, None, None, unit, unit, both, ops.CONTRAST_SOFTPLUS)
    return q, None, k, None, torch.tensor(11.0), None, None, *options


def queue(n: int, d: int, dtype, unit_k: bool):
    """InfoNCE's call with negatives of its own."""
    k = rows(2 * n + 3, d, dtype) if unit_k else F.normalize(torch.randn(2 * n + 3, d), dim=1).to(dtype)
    options = (ops.EXCLUDE_NONE, None, None, True, unit_k, False, ops.CONTRAST_SOFTPLUS)
    return rows(n, d, dtype), None, k, rows(n, d, dtype), torch.tensor(5.0), None, None, *options


CALLS = {
    "views": lambda n, d, t: views(n, d, t, False),
    "views-decoupled": lambda n, d, t: views(n, d, t, True),
    "classes": lambda n, d, t: classes(n, d, t, max(1, n // 5)),
    "pairs": lambda n, d, t: classes(n, d, t, max(1, n // 2)),
    "one-class": lambda n, d, t: classes(n, d, t, 1),
    "keys": lambda n, d, t: keys(n, d, t, False, True),
    "keys-both": lambda n, d, t: keys(n, d, t, True, False),
    "queue": lambda n, d, t: queue(n, d, t, True),
    "bank": lambda n, d, t: queue(n, d, t, False),
}


def run(module, args, grad, need=(True,) * 4, save=True):
    loss, count, state = module.contrast_forward(*args, save)
    gradients = module.contrast_backward(*args, count, state, grad, *need)
    return loss, count, gradients


def sizes(args, grad):
    """Root mean squares of what dq, dk and dpositive are the differences of: the pull of a row's positive, which the
    negatives' push and the part along the row nearly cancel where there are few dimensions or keys are alike."""
    q, tail, k, positive, scale = args[:5]
    if args[13] == ops.CONTRAST_MEAN:
        return [0.0] * 3
    state = reference.contrast_forward(*args, False)[2]
    pull = scale * grad.abs() * sum(state.split(len(grad))[1::2])  # slopes by the rows' and the columns' normalisers
    whole = (q if tail is None else torch.cat((q, tail)), k if positive is None else None, positive)
    return [
        0.0 if x is None else float((pull / (x.norm(dim=1) if unit else 1)).square().mean().div(x.shape[1]).sqrt())
        for x, unit in zip(whole, (args[10], args[11], args[10]), strict=True)
    ]


def compare(args, need=(True,) * 4, save=True):
    from ffcl_fast.backends import cpu

    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    n = args[0].shape[0] + (0 if args[1] is None else args[1].shape[0])
    grad = torch.randn(n)
    loss, count, gradients = run(cpu, args, grad, need, save)
    truth, true_count, true_gradients = run(reference, to_float64(args), grad.double(), need)
    plain, _, plain_gradients = run(
        reference, [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args], grad, need
    )
    assert torch.equal(count.double(), true_count.double())
    # The kernel divides rows before it multiplies them and keeps float32 in between whatever the inputs' dtype.
    assert_close_to_reference(loss, plain, truth, name="loss")
    terms = sizes(to_float64(args), grad.double())
    for name, ours, eager, exact, size in zip(
        ("dq", "dk", "dpositive"), gradients, plain_gradients, true_gradients, terms, strict=False
    ):
        assert ours.shape == exact.shape and ours.dtype == args[0].dtype
        if exact.numel():
            assert_close_to_reference(ours, eager.to(ours.dtype), exact, factor=3, name=name, terms=size)
    if need[3]:
        # A sum over pairs that may cancel: its size is that of what is summed.
        size = (
            (args[0].double()[: len(true_gradients[0])] * true_gradients[0][: args[0].shape[0]]).sum(1).abs().sum()
            / args[4]
            if need[0]
            else 0
        )
        error = (gradients[3].double() - true_gradients[3]).abs()
        limit = 1e-5 * max(true_gradients[3].abs(), torch.as_tensor(size), torch.tensor(float(n)))
        if args[0].dtype == torch.bfloat16 and native.module and native.module.isa().endswith(("_bf16", "amx")):
            limit += 2.0**-8 * grad.norm()  # of the softmax, rounded to bfloat16 pair by pair
        assert error <= limit, "dscale"
    after = [a for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was changed"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(backend, call, shape):
    compare(CALLS[call](*shape, torch.float32))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("number", (1, 3))
def test_classes_longer_than_a_task(backend, number):
    """A thread takes 32768 elements at a time, 81 of these rows, and the whole of a class that starts among them."""
    compare(classes(90, 400, torch.float32, number))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_short_floats(backend, call, dtype):
    compare(CALLS[call](70, 40, dtype))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "need", ((True, False, False, False), (False, True, True, False), (False, False, False, True)), ids=str
)
def test_only_what_is_asked_for(backend, call, need):
    compare(CALLS[call](50, 20, torch.float32), need, save=False)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("call", CALLS)
def test_layouts(backend, call):
    """Strided rows, sliced columns and transposed tensors, two views of different strides."""
    args = CALLS[call](60, 24, torch.float32)
    layouts = (
        lambda x: torch.stack((x, x), 1)[:, 0],
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
        lambda x: x.T.contiguous().T,
    )
    changed = [layouts[i % 3](a) if torch.is_tensor(a) and a.dim() == 2 else a for i, a in enumerate(args)]
    compare(changed)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("call", CALLS)
def test_same_bits_on_any_number_of_threads(backend, call):
    from ffcl_fast.backends import cpu

    args = CALLS[call](200, 130, torch.float32)
    grad = torch.randn(args[0].shape[0] + (0 if args[1] is None else args[1].shape[0]))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss, count, gradients = run(cpu, args, grad)
        found.append((loss, count, *gradients))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", (*CPU, "reference"))
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(backend, call):
    args = CALLS[call](6, 5, torch.float32)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_ops.contrast_forward.default, (*args, False, backend), test_utils=utils)
    loss, count, state = _ops.contrast_forward(*args, False, backend)
    arguments = (*args, count, state, torch.ones_like(loss), True, True, True, True, backend)
    torch.library.opcheck(_ops.contrast_backward.default, arguments, test_utils=utils)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("call", CALLS)
def test_not_finite(backend, call, value):
    args = CALLS[call](9, 6, torch.float32)
    args[0][4, 2] = value
    assert not _ops.contrast_forward(*args, False, backend)[0].sum().isfinite()


@pytest.mark.parametrize("backend", CPU)
def test_a_zero_row_is_divided_by_the_smallest_norm(backend):
    out0, out1 = torch.randn(2, 8, 5).unbind()
    out0[3] = 0
    out1[5] = 1e-14
    found = [x.clone().requires_grad_() for x in (out0, out1)]
    truth = [x.double().requires_grad_() for x in (out0, out1)]
    nt_xent(*found).backward()
    nt_xent(*truth).backward()
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU)
def test_bad_calls(backend):
    q = torch.randn(4, 3)
    rest = (None, None, 0, None, None, False, False, False, 0, False, backend)
    with pytest.raises(ValueError, match="positive"):
        _ops.contrast_forward(q, None, None, None, torch.tensor(1.0), *rest)
    with pytest.raises(ValueError, match="4 positives"):
        _ops.contrast_forward(q, None, q[:3], None, torch.tensor(1.0), *rest)


@pytest.mark.parametrize("backend", CPU)
def test_both_ways_to_a_loss_agree(backend, monkeypatch):
    """The contrast operators and the path of the other backends are two writings of one loss."""
    out0, out1, bank = rows(37, 24), rows(37, 24), rows(50, 24)
    labels = torch.randint(0, 9, (37,))
    features = F.normalize(torch.stack((out0, out1), 1), dim=-1)
    losses = {
        "nt_xent": lambda a, b: nt_xent(a, b, reduction="none"),
        "info_nce": lambda a, b: info_nce(a, b, reduction="none"),
        "queue": lambda a, b: info_nce(a, b, bank, reduction="none"),
        "sup_con": lambda a, b: sup_con(F.normalize(torch.stack((a, b), 1), dim=-1), labels),
        "sim_clr": lambda a, b: sup_con(F.normalize(torch.stack((a, b), 1), dim=-1)),
    }
    assert contrast_module.fused(backend, features)
    fused = {name: loss(out0, out1) for name, loss in losses.items()}
    monkeypatch.setattr(backends, "fuses", lambda *_: False)
    for name, loss in losses.items():
        torch.testing.assert_close(fused[name], loss(out0, out1), rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("backend", CPU)
def test_negatives_may_be_written_to_before_the_backward_pass(backend):
    query, key = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    queue = torch.randn(20, 5)
    info_nce(query, key, queue.clone()).backward()
    expected, query.grad = query.grad, None
    loss = info_nce(query, key, queue)
    queue[:6] = key
    loss.backward()
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_has_no_gradient_may_change_or_come_from_inference_mode(backend, dtype):
    query, bank = torch.randn(6, 5, dtype=dtype).requires_grad_(), torch.randn(11, 5, dtype=dtype)
    with torch.inference_mode():
        teacher = torch.randn(6, 5, dtype=dtype)
    losses = (lambda q, k: info_nce(q, k), lambda q, k: info_nce(q, k, bank), nt_xent, lambda q, k: nt_xent(k, q))
    for loss in losses:
        expected = torch.autograd.grad(loss(query, teacher.clone()), query)
        torch.testing.assert_close(torch.autograd.grad(loss(query, teacher), query), expected, rtol=0, atol=0)
        key = teacher.clone()
        value = loss(query, key)
        key.mul_(2)
        torch.testing.assert_close(torch.autograd.grad(value, query), expected, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(loss(query, teacher.clone()), value, rtol=0, atol=0)


@pytest.mark.parametrize("backend", CPU)
def test_wrong_arguments_of_the_operators(backend):
    q, k, scale = torch.randn(4, 3), torch.randn(9, 3), torch.tensor(1.0)
    order = torch.arange(4)

    def forward(q=q, tail=None, k=None, order=None, group=None, both=False, kind=0):
        options = (scale, None, None, 0, order, group, False, False, both, kind, False, backend)
        return _ops.contrast_forward(q, tail, k, None, *options)

    for problem in (
        dict(tail=torch.randn(4, 2), order=order, group=order),
        dict(k=q.double()),
        dict(k=k, both=True),
        dict(k=q, kind=ops.CONTRAST_MEAN),
        dict(q=q[:, :0], k=q[:, :0]),
    ):
        with pytest.raises(ValueError):
            forward(**problem)
    with pytest.raises(TypeError, match="int64"):
        forward(order=order.int(), group=order.int())


@pytest.mark.parametrize("backend", CPU)
def test_the_scale_may_be_changed_before_the_backward_pass(backend):
    q, k = (F.normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    scale = torch.tensor(5.0, requires_grad=True)
    (expected,) = torch.autograd.grad(clip(q, k, scale), scale)
    loss = clip(q, k, scale)
    with torch.no_grad():
        scale.clamp_(max=4.0)
    torch.testing.assert_close(torch.autograd.grad(loss, scale)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", CPU)
def test_sums_over_thousands_of_rows_round_as_little_as_plain_pytorch(backend):
    """A key's gradient is one sum over all queries."""
    unit = [F.normalize(torch.randn(2701, 40), dim=1) for _ in range(3)]

    def gradient(loss, dtype):
        q, positive, k = (x.to(dtype).requires_grad_() for x in unit)
        return torch.autograd.grad(loss(q, positive, k), k)[0]

    def plain(q, positive, k):
        q, positive, k = (F.normalize(x, dim=1) for x in (q, positive, k))
        logits = torch.cat(((q * positive).sum(1, keepdim=True), q @ k.T), 1) * 5.0
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    ours = gradient(lambda *x: info_nce(*x, temperature=0.2), torch.float32)
    assert_close_to_reference(ours, gradient(plain, torch.float32), gradient(plain, torch.float64), factor=2)

"""The operators on a contrast's positives against float64: shared by the interpreter's and the GPU's tests."""

from __future__ import annotations

import torch

from ffcl_fast import reference
from helpers import assert_close_to_reference

OPS = torch.ops.ffcl_fast


def _size_of_logits(q, positive, scale):
    """Root mean square, over rows, of what a sum of products with these absolute values and random signs comes to. A
    logit may be far smaller, and the references add in float64 whatever the dtype, so that nothing else tells it."""
    return float(scale * (q.double() * positive.double()).square().sum(1).mean().sqrt())


def check_positives(q, positive, pairing, both, decoupled, backend="triton"):
    """Losses, derivatives and gradients by a backend's kernels, by the project's rule."""
    n, d = q.shape
    scale = torch.tensor(14.3, device=q.device)
    lse = [3 * torch.randn(m, device=q.device) for m in (n, n if both else 0)]

    def odds(call, cast, *backend):
        tensors = (None if x is None else cast(x) for x in (q, positive, scale, *lse))
        return call(*tensors, pairing, decoupled, *backend)

    ours = odds(OPS.positive_odds, torch.clone, backend)
    plain, truth = (odds(reference.positive_odds, cast) for cast in (torch.clone, torch.Tensor.double))
    size = _size_of_logits(q, reference.positives_of(q, positive, pairing), scale)
    for name, x, y, z in zip(("loss", "slope", "col_slope", "logit"), ours, plain, truth, strict=True):
        assert_close_to_reference(x, y, z, name=name, terms=size if name == "logit" else 0.0)

    grad = torch.randn(n, device=q.device)
    gradients = [torch.randn(rows, d, device=q.device).to(q.dtype) for rows in (n, 0 if pairing else n)]

    def add(call, cast, *backend):
        changed = [cast(x) for x in gradients]
        tensors = (None if x is None else cast(x) for x in (q, positive, scale, grad, *ours[1:]))
        return call(*tensors, *changed, pairing, *backend), *changed

    found = add(OPS.add_positives_, torch.clone, backend)
    plain, truth = (add(reference.add_positives_, cast) for cast in (torch.clone, torch.Tensor.double))
    # inner is the difference of two terms.
    terms = float((grad * ours[1] * ours[3]).square().mean().sqrt())
    for name, x, y, z in zip(("inner", "dq", "d_positive"), found, plain, truth, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=terms if name == "inner" else 0.0)


def check_class_positives(q, group, classes, backend="triton"):
    """The same of SupCon's positives; and sums of classes to the last bit of float32 that 62-bit integers can show."""
    n, d = q.shape
    scale = torch.tensor(14.3, device=q.device)
    row_lse, share = 3 * torch.randn(n, device=q.device), torch.randn(n, device=q.device)

    for weight in (None, share):
        sums, counts = OPS.class_sums(q, group, weight, classes, backend)
        own = q.float() if weight is None else q.float() * weight[:, None]
        exact = own.double().new_zeros(classes, d).index_add_(0, group, own.double())
        lost = n * float(own.abs().max()) * 2.0 ** (n.bit_length() - 62)
        assert bool(((sums.double() - exact).abs() <= exact.abs() * 2.0**-24 + lost + 2.0**-149).all())
        assert torch.equal(counts, torch.bincount(group, minlength=classes).float())
        strided = [None if x is None else x.repeat_interleave(2)[::2] for x in (group, weight)]
        assert torch.equal(sums, OPS.class_sums(q, *strided, classes, backend)[0])
    taken, (sums, counts) = sums, OPS.class_sums(q, group, None, classes, backend)

    def odds(call, cast, *backend):
        return call(cast(q), cast(sums), cast(counts), group, cast(scale), cast(row_lse), *backend)

    ours = odds(OPS.class_odds, torch.clone, backend)
    plain, truth = (odds(reference.class_odds, cast) for cast in (torch.clone, torch.Tensor.double))
    size = _size_of_logits(q, (sums[group] - q) / (counts[group, None] - 1).clamp(min=1), scale)
    for name, x, y, z in zip(("loss", "slope", "logit"), ours, plain, truth, strict=True):
        assert_close_to_reference(x, y, z, name=name, terms=size if name == "logit" else 0.0)

    dq = torch.randn(n, d, device=q.device).to(q.dtype)

    def add(call, cast, *backend):
        tensors = (cast(x) for x in (scale, share, ours[2], dq))
        return call(cast(q), cast(sums), cast(taken), cast(counts), group, *tensors, *backend)

    found = add(OPS.add_class_positives, torch.clone, backend)
    plain, truth = (add(reference.add_class_positives, cast) for cast in (torch.clone, torch.Tensor.double))
    terms = float((share * ours[2]).square().mean().sqrt())
    for name, x, y, z in zip(("dq", "inner"), found, plain, truth, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=terms if name == "inner" else 0.0)

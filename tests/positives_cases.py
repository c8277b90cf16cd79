"""The operators on a contrast's positives against float64: shared by the interpreter's and the GPU's tests."""

from __future__ import annotations

import torch

from ffcl_fast import reference
from helpers import assert_close_to_reference

OPS = torch.ops.ffcl_fast


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
    for name, x, y, z in zip(("loss", "slope", "col_slope", "logit"), ours, plain, truth, strict=True):
        assert_close_to_reference(x, y, z, name=name)

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

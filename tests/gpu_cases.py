"""What the GPU tests share: inputs on the device and the error rule over an operator's results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from similarity_cases import parts, to_float64

from ffcl_fast import reference
from helpers import assert_close_to_reference

OPS = torch.ops.ffcl_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU: under Triton's interpreter


def unit(n, d, dtype, cone=0.0):
    """Unit rows; `cone` is the size of a mean added before normalising."""
    x = torch.randn(n, d, device=DEVICE)
    return F.normalize(x + cone * torch.randn(d, device=DEVICE), dim=1).to(dtype)


def ids(n, classes):
    return torch.randint(0, classes, (n,), device=DEVICE)


def double(x):
    return None if x is None else x.double()


def check_similarity(q, k, scale, row_ids=None, col_ids=None, exclude=0, both=True, backend="triton"):
    """Forward and gradient of a backend's kernels against float64 by the project's rule."""
    scale = torch.tensor(float(scale), device=DEVICE)
    head = scale, row_ids, col_ids, exclude
    ours = OPS.similarity_forward(q, k, *head, both, True, backend)
    truth = reference.similarity_forward(q.double(), double(k), *head, both, True)
    eager = reference.similarity_forward(q, k, *head, both, True)
    for name, x, y, z in zip(("row_lse", "col_lse"), ours[:2], eager[:2], truth[:2], strict=True):
        assert_close_to_reference(x, y, z, name=name)
    weights = [torch.randn_like(x) / max(1, x.numel()) for x in ours[:2]]

    def arguments(lse, dtype):
        return *(x.to(dtype) for x in (*lse[:2], *weights)), lse[2], True, True

    # A backend's cache belongs to its own normalisers.
    grads = OPS.similarity_backward(q, k, *head, *arguments(ours, torch.float32), backend)
    exact = reference.similarity_backward(
        q.double(), double(k), scale.double(), row_ids, col_ids, exclude, *arguments(truth, torch.float64)
    )
    plain = reference.similarity_backward(q, k, *head, *arguments(truth, torch.float32))
    terms = parts(to_float64((q, k, *head)), *truth[:2], *(x.double() for x in weights))
    for name, x, y, z, size in zip(("dq", "dk"), grads, plain, exact, terms, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=size)


def check_siglip(q, k, positives):
    scale, bias = torch.tensor(10.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)
    ours = OPS.siglip(q, k, scale, bias, positives, True, True, "triton")
    truth = reference.siglip(q.double(), k.double(), scale.double(), bias.double(), positives, True, True)
    eager = reference.siglip(q, k, scale, bias, positives, True, True)
    for name, x, y, z in zip(("loss", "dq", "dk", "dbias"), ours, eager, truth, strict=True):
        assert_close_to_reference(x, y, z, factor=2.0 if name == "loss" else 3.0, name=name)


def check_normalize(x, dz, eps=1e-12):
    """Unit rows, their norms and their gradient by the Triton kernels; dz has the dtype of the unit rows."""
    z, norm = OPS.normalize_forward(x, eps, dz.dtype, "triton")
    plain = reference.normalize_forward(x, eps, dz.dtype)
    truth = reference.normalize_forward(x.double(), eps, torch.float64)
    assert_right("unit rows", zip((z, norm), plain, truth, strict=True))
    dx = OPS.normalize_backward(z, norm, dz, eps, x.dtype, "triton")
    plain = reference.normalize_backward(z, norm, dz, eps, x.dtype)
    truth = reference.normalize_backward(z.double(), norm.double(), dz.double(), eps, torch.float64)
    # dz and its projection cancel where a row has few elements, wholly where it has one.
    terms = float((dz.double() / norm.double()[:, None]).square().mean().sqrt())
    assert_close_to_reference(dx, plain, truth, factor=3.0, name="their gradient", terms=terms)


def both_passes(q, k, scale, exclude=0, backend="triton"):
    head = q, k, scale, None, None, exclude
    row_lse, col_lse, cache = OPS.similarity_forward(*head, True, True, backend)
    u, v = torch.ones_like(row_lse) / q.shape[0], torch.ones_like(col_lse) / q.shape[0]
    gradients = OPS.similarity_backward(*head, row_lse, col_lse, u, v, cache, True, True, backend)
    return row_lse, col_lse, *gradients


def three(function, tensors, *options, backend="triton"):
    """(ours, plain PyTorch in the same dtype, float64) of a reference operator and a backend's one."""
    name = function.__name__
    ours = getattr(OPS, name)(*tensors, *options, backend)
    plain = function(*tensors, *options)
    truth = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in tensors), *options)
    return zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, plain, truth)), strict=True)


def assert_right(name, results, factor=2.0):
    for i, (ours, plain, truth) in enumerate(results):
        assert_close_to_reference(ours, plain, truth, factor=factor, name=f"{name}, output {i}")

"""What the GPU tests share: inputs on the device and the error rule over an operator's results."""

from __future__ import annotations

import math

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


LIBRARY_ROWS = 4096


def by_library(x):
    """Whether to compare with the library's own products, see library_similarity."""
    return x.is_cuda and x.dtype != torch.float32


def _library_matrix(q, k, scale, row_ids=None, col_ids=None, exclude=0):
    """S with -inf at excluded pairs.

    Rows of zeros are added: a small product of wide rows would be cut along D, whose shorter sums lose less.
    """
    n, m = q.shape[0], k.shape[0]
    q, k = (F.pad(x, (0, 0, 0, max(0, LIBRARY_ROWS - x.shape[0]))) for x in (q, k))
    s = torch.mm(q, k.T, out_dtype=torch.float32)[:n, :m] * scale.float()
    mask = reference.excluded_pairs(n, m, row_ids, col_ids, exclude, q.device)
    return s if mask is None else s.masked_fill(mask, -torch.inf)


def _library_products(g, q, k, scale):
    """scale G k and scale G^T q, with G rounded to the dtype of q after a power of two has put its largest element
    where that dtype loses none of the small ones: near 2^14 in float16, 1 in bfloat16."""
    target = 14 if q.dtype == torch.float16 else 0
    largest = float(g.abs().max())
    gain = 2.0 ** (target - math.ceil(math.log2(largest))) if largest > 0 else 1.0
    rounded = (g * gain).to(q.dtype)
    unit = scale.float() / gain
    return [
        (torch.mm(a.contiguous(), x.contiguous(), out_dtype=torch.float32) * unit).to(q.dtype)
        for a, x in ((rounded, k), (rounded.T, q))
    ]


def library_similarity(q, k, scale, row_ids, col_ids, exclude, both):
    """row_lse, col_lse as plain PyTorch gets them of 16-bit rows on a GPU: float32 logits by the library's product.

    ``reference`` in float32 is no measure for those: it multiplies in float32, which nobody with 16-bit rows does.
    Tensor cores truncate as they accumulate (on Hopper by about half a unit in the last place of float32 in a step 16
    deep, so that the library's own product of float16 rows of 1000 is 5e-6 too small), and the gradients of the pairs
    are rounded to 16 bits before the second product. Whoever uses tensor cores has both errors, the library first.
    """
    s = _library_matrix(q, q if k is None else k, scale, row_ids, col_ids, exclude)
    return torch.logsumexp(s, 1), torch.logsumexp(s, 0) if both and k is not None else s.new_empty(0)


def library_gradients(q, k, scale, row_ids, col_ids, exclude, row_lse, col_lse, row_grad, col_grad):
    """dq, dk by the library's products of rounded gradients of the pairs, see library_similarity."""
    s = _library_matrix(q, q if k is None else k, scale, row_ids, col_ids, exclude)

    def softmax(lse):
        return torch.where(lse == -torch.inf, 0.0, torch.exp(s - lse))

    g = row_grad[:, None] * softmax(row_lse[:, None])
    if k is None:
        return _library_products(g + g.T, q, q, scale)[0], q.new_empty(0, q.shape[1])
    if col_grad.numel():
        g = g + col_grad[None, :] * softmax(col_lse[None, :])
    return _library_products(g, q, k, scale)


def library_siglip(q, k, scale, bias, positives):
    """loss, dq, dk, dbias of SigLIP by the library's products, see library_similarity."""
    x = _library_matrix(q, k, scale) + bias.float()
    z = -torch.ones_like(x)
    if positives:
        z.diagonal().fill_(1.0)
    g = -z * torch.sigmoid(-z * x)
    return F.softplus(-z * x).sum(), *_library_products(g, q, k, scale), g.sum()


def check_similarity(q, k, scale, row_ids=None, col_ids=None, exclude=0, both=True, backend="triton"):
    """Forward and gradient of a backend's kernels against float64 by the project's rule."""
    scale = torch.tensor(float(scale), device=DEVICE)
    head = scale, row_ids, col_ids, exclude
    ours = OPS.similarity_forward(q, k, *head, both, True, backend)
    truth = reference.similarity_forward(q.double(), double(k), *head, both, True)
    library = by_library(q)
    eager = library_similarity(q, k, *head, both) if library else reference.similarity_forward(q, k, *head, both, True)
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
    rest = arguments(truth, torch.float32)
    plain = library_gradients(q, k, *head, *rest[:4]) if library else reference.similarity_backward(q, k, *head, *rest)
    terms = parts(to_float64((q, k, *head)), *truth[:2], *(x.double() for x in weights))
    for name, x, y, z, size in zip(("dq", "dk"), grads, plain, exact, terms, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=size)


def check_siglip(q, k, positives):
    scale, bias = torch.tensor(10.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)
    ours = OPS.siglip(q, k, scale, bias, positives, True, True, "triton")
    truth = reference.siglip(q.double(), k.double(), scale.double(), bias.double(), positives, True, True)
    eager = (
        library_siglip(q, k, scale, bias, positives)
        if by_library(q)
        else reference.siglip(q, k, scale, bias, positives, True, True)
    )
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


def assert_right(name, results, factor=2.0, terms=0.0):
    for i, (ours, plain, truth) in enumerate(results):
        assert_close_to_reference(ours, plain, truth, factor=factor, name=f"{name}, output {i}", terms=terms)

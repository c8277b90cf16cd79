"""Triton's L2-normalisation against float64, under the interpreter: `make test-triton`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goodness_cases import DTYPES
from gpu_cases import check_normalize
from guards import guarded, inside_nan  # noqa: F401

from ffcl_fast import backends, functional, reference
from ffcl_fast.functional.similarity import normalized

OPS = torch.ops.ffcl_fast
EPS = 1e-12
pytestmark = pytest.mark.usefixtures("guarded")

# (N, D): in registers, several rows a program, ragged; the widest embedding; rows walked in steps.
SHAPES = ((1, 1), (7, 3), (33, 96), (5, 200), (3, 1000), (2, 1300), (2, 4096))


def rows(n, d, dtype):
    """Rows of very different lengths."""
    return inside_nan((torch.randn(n, d) * torch.logspace(-3, 3, n)[:, None]).to(dtype), 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalize(shape, dtype):
    x = rows(*shape, dtype)
    for out in {dtype, torch.bfloat16}:  # autocast rounds float32 rows to its dtype in the same visit
        check_normalize(x, inside_nan(torch.randn(shape).to(out), 3))
    z, norm = OPS.normalize_forward(x, EPS, dtype, "triton")
    assert z.dtype == dtype and norm.dtype == torch.float32 and z.is_contiguous()


def test_as_torch_does_and_its_gradient():
    x = torch.randn(9, 70, requires_grad=True)
    ours, plain = normalized(x, x.dtype, backend="triton"), F.normalize(x, dim=1)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    weight = torch.randn(9, 70)
    gradients = [torch.autograd.grad((z * weight).sum(), x)[0] for z in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad = torch.autograd.grad(normalized(x, x.dtype, backend="triton").square().sum(), x, create_graph=True)[0]
        grad.sum().backward()


def test_rows_shorter_than_eps_are_divided_by_it():
    x = torch.randn(5, 40)
    x[1] = 0
    x[3] *= 1e-15
    z, norm = OPS.normalize_forward(x, EPS, torch.float32, "triton")
    torch.testing.assert_close(z, F.normalize(x, dim=1, eps=EPS), rtol=1e-6, atol=1e-7)
    assert norm[1] == norm[3] == torch.tensor(EPS)
    dz = torch.randn(5, 40)
    dx = OPS.normalize_backward(z, norm, dz, EPS, torch.float32, "triton")
    torch.testing.assert_close(dx[[1, 3]], dz[[1, 3]] / EPS, rtol=1e-6, atol=0)  # no projection


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_values_that_are_not_finite_stay_in_their_rows(value):
    x = torch.randn(4, 33)
    x[2, 5] = value
    z, norm = OPS.normalize_forward(x, EPS, torch.float32, "triton")
    expected = reference.normalize_forward(x, EPS, torch.float32)
    torch.testing.assert_close(z, expected[0], rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(norm, expected[1], rtol=1e-6, atol=0, equal_nan=True)
    dx = OPS.normalize_backward(z, norm, torch.randn(4, 33), EPS, torch.float32, "triton")
    assert dx[2].isnan().any() and dx[[0, 1, 3]].isfinite().all()


def test_strided_rows_are_read_where_they_are(monkeypatch):
    base = torch.randn(12, 100)
    x = base[::2, 3:83]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    z, _ = OPS.normalize_forward(x, EPS, torch.float32, "triton")
    torch.testing.assert_close(z, F.normalize(x, dim=1), rtol=1e-6, atol=1e-7)


def test_a_transposed_input_and_an_expanded_gradient():
    x = torch.randn(40, 7).T.requires_grad_()
    normalized(x, x.dtype, backend="triton").sum().backward()
    exact = x.detach().double().requires_grad_()
    F.normalize(exact, dim=1).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_primitive_normalises_by_the_kernel(monkeypatch):
    calls = []
    module = backends.load("triton")
    for name in ("normalize_forward", "normalize_backward"):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, kernel=kernel, name=name: calls.append(name) or kernel(*a))
    results = []
    q, k = (torch.randn(n, 24, requires_grad=True) for n in (20, 30))
    for backend in ("triton", "reference"):
        row, col = functional.similarity_lse(q, k, 7.0, normalize=True, backend=backend)
        results.append((row, col, *torch.autograd.grad(row.sum() - col.square().sum(), (q, k))))
    assert calls == ["normalize_forward"] * 2 + ["normalize_backward"] * 2
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)


def test_same_bits_on_every_run():
    x = rows(40, 300, torch.bfloat16)
    first = OPS.normalize_forward(x, EPS, torch.bfloat16, "triton")
    assert all(
        torch.equal(a, b) for a, b in zip(first, OPS.normalize_forward(x, EPS, torch.bfloat16, "triton"), strict=True)
    )


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares storage offsets, which guards change
    x = torch.randn(5, 24)
    torch.library.opcheck(OPS.normalize_forward.default, (x, EPS, torch.bfloat16, "triton"))
    z, norm = OPS.normalize_forward(x, EPS, torch.float32, "triton")
    torch.library.opcheck(OPS.normalize_backward.default, (z, norm, torch.randn(5, 24), EPS, torch.float32, "triton"))


def test_what_it_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="cannot run normalize_forward.*float32, float16 and bfloat16"):
        OPS.normalize_forward(torch.zeros(2, 3, dtype=torch.float64), EPS, torch.float64, "triton")

"""The C++ similarity kernels of one instruction set (FFCL_ISA) against float64; run by test_similarity_cpu.py."""

import sys

import torch
import torch.nn.functional as F

from ffcl_fast import reference
from ffcl_fast.backends import native
from ffcl_fast.backends.cpu import similarity


def unit(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(n, d), dim=1).to(dtype)


def check_similarity(n: int, m: int | None, d: int, scale: float, dtype: torch.dtype, exclude: int) -> None:
    q, k = unit(n, d, dtype), None if m is None else unit(m, d, dtype)
    ids = torch.randint(0, 4, (n,)), None if m is None else torch.randint(0, 4, (m,))
    args = (q, k, torch.tensor(scale), *ids, exclude)
    exact = (q.double(), None if k is None else k.double(), torch.tensor(scale).double(), *ids, exclude)
    row, col, cache = similarity.similarity_forward(*args, True, True)
    true_row, true_col, _ = reference.similarity_forward(*exact, True, True)
    torch.testing.assert_close(row.double(), true_row, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(col.double(), true_col, rtol=2e-6, atol=2e-5)
    u, v = torch.rand(len(row)), torch.rand(len(col))
    got = similarity.similarity_backward(*args, row, col, u, v, cache, True, True)
    want = reference.similarity_backward(*exact, true_row, true_col, u.double(), v.double(), None, True, True)
    limit = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).norm() <= limit * y.norm() + 1e-12, (n, m, d, dtype, exclude)


def check_siglip(n: int, d: int) -> None:
    args = unit(n, d), unit(n, d), torch.tensor(10.0), torch.tensor(-8.0)
    exact = [x.double() for x in args]
    for x, y in zip(
        similarity.siglip(*args, True, True, True), reference.siglip(*exact, True, True, True), strict=True
    ):
        assert (x.double() - y).norm() <= 3e-6 * y.norm(), (n, d)


if __name__ == "__main__":
    print(native.module.isa())
    torch.manual_seed(int(sys.argv[1]))
    for n, m, d, scale in ((97, 130, 33, 9.0), (203, None, 150, 60.0), (65, 31, 7, 400.0)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for exclude in range(5):
                check_similarity(n, m, d, scale, dtype, exclude)
        check_siglip(n, d)

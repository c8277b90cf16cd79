"""The pair products of bfloat16 rows (FFCL_ISA=..._bf16, ...amx) against float64; run by test_similarity_cpu.py.

The rule compares with plain PyTorch in bfloat16, which rounds its logits and its softmax; the kernel the softmax
only. The contrastive losses are held to float32's accuracy, rows divided by their norms among them (test_contrast_ops).
"""

import sys

import torch
import torch.nn.functional as F
from similarity_cases import LSE_TERMS, MODES, eager, problem, to_float64, vectors
from test_contrast_ops import CALLS, compare, run

from ffcl_fast import ops, reference
from ffcl_fast.backends import cpu, native
from ffcl_fast.backends.cpu.similarity import Problem
from helpers import assert_close_to_reference

BF16 = torch.bfloat16
# (N, M, D): ones, odd D, tails of every block, several panels of 384 x 2304, D beyond one step of 128 words.
SHAPES = ((1, 1, 1), (1, 7, 3), (5, 1, 17), (40, 40, 1), (33, 65, 96), (97, 130, 33), (130, 71, 301), (1000, 2500, 10))


def check_similarity(args, need=(True, True), both=True, save=True):
    q, k = args[:2]
    both = both and k is not None
    row, col, cache = cpu.similarity_forward(*args, both, save)
    exact = to_float64(args)
    true_row, true_col, _ = reference.similarity_forward(*exact, both, False)
    u, v = torch.randn(row.shape), torch.randn(col.shape)
    got = cpu.similarity_backward(*args, row, col, u, v, cache, *need)
    want = reference.similarity_backward(*exact, true_row, true_col, u.double(), v.double(), None, *need)
    plain_row, plain_col, *plain = eager(*args, u, v)
    # Products of bfloat16 are exact in float32, so the normalisers are as good as those of float32 rows.
    torch.testing.assert_close(row.double(), true_row, rtol=2e-6, atol=2e-5)
    assert_close_to_reference(row, plain_row, true_row, name="row_lse", terms=LSE_TERMS)
    if both:
        torch.testing.assert_close(col.double(), true_col, rtol=2e-6, atol=2e-5)
        assert_close_to_reference(col, plain_col, true_col, name="col_lse", terms=LSE_TERMS)
    for name, x, y, z in zip(("dq", "dk"), got, plain, want, strict=True):
        assert x.shape == z.shape and x.dtype == BF16, name
        if z.numel():
            assert_close_to_reference(x, y, z, factor=3, name=name)


def check_siglip(n, m, d, positives):
    q, k = vectors(n, d, BF16), vectors(m, d, BF16)
    scale, bias = torch.tensor(10.0), torch.tensor(-4.0)
    got = cpu.siglip(q, k, scale, bias, positives, True, True)
    want = reference.siglip(*to_float64((q, k, scale, bias)), positives, True, True)
    a, b, c = (x.clone().requires_grad_() for x in (q, k, bias.to(BF16)))
    labels = -torch.ones(n, m, dtype=BF16)
    if positives:
        labels.diagonal().fill_(1)
    plain = -F.logsigmoid(labels * (scale.to(BF16) * (a @ b.T) + c)).sum()
    plain.backward()
    torch.testing.assert_close(got[0], want[0].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(cpu.siglip(q, k, scale, bias, positives, False, False)[0], got[0])
    assert_close_to_reference(got[1], a.grad, want[1], factor=3, name="dq")
    assert_close_to_reference(got[2], b.grad, want[2], factor=3, name="dk")
    torch.testing.assert_close(got[3], want[3].float(), rtol=1e-5, atol=1e-6)


def check_pairs_are_used():
    """The gradient bears the rounding of G to bfloat16, which the same rows in float32 do not."""
    q, k, *rest = problem(200, 300, 64, BF16, ops.EXCLUDE_NONE, False)
    found = []
    for x, y in ((q, k), (q.float(), k.float())):
        p = Problem(x, y, *rest)
        row, col, cache = p.forward(True, True)
        found.append(p.backward(row, col, torch.ones(200), torch.ones(300), cache, True, True))
    for x, y in zip(*found, strict=True):
        assert 1e-5 < (x - y).norm() / y.norm() < 2.0**-7


def check_threads():
    """The same bits on any number of threads."""
    args = [problem(500, 700, 41, BF16, ops.EXCLUDE_DIAGONAL, symmetric) for symmetric in (False, True)]
    contrast, grad = CALLS["views"](200, 131, BF16), torch.randn(400)
    sig = (vectors(300, 33, BF16), vectors(300, 33, BF16), torch.tensor(10.0), torch.tensor(-4.0), True, True, True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = [*cpu.siglip(*sig)]
        for a in args:
            row, col, cache = cpu.similarity_forward(*a, True, True)
            results += [row, col, *cpu.similarity_backward(*a, row, col, row, col, cache, True, True)]
        loss, _, gradients = run(cpu, contrast, grad)
        found.append([*results, loss, *gradients])
    torch.set_num_threads(2)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def check_others_keep_their_tiles():
    """PyTorch's bfloat16 products, which may use the tile registers of the same threads, are what they were."""
    x = torch.randn(300, 257).to(BF16)
    before = x @ x.T
    check_similarity(problem(200, 300, 64, BF16, ops.EXCLUDE_NONE, False))
    assert torch.equal(x @ x.T, before)


def check_values_not_finite():
    for value in (float("nan"), float("inf")):
        for symmetric in (False, True):
            q, k, *rest = problem(50, 45, 13, BF16, ops.EXCLUDE_NONE, symmetric)
            q[7, 3] = value
            row, col, cache = cpu.similarity_forward(q, k, *rest, True, True)
            assert not row[7].isfinite()
            dq, _ = cpu.similarity_backward(q, k, *rest, row, col, row, col, cache, True, True)
            assert not dq[7].isfinite().any()


def main(seed: int) -> None:
    torch.manual_seed(seed)
    for shape in SHAPES:
        for symmetric in (False, True):
            check_similarity(problem(*shape, BF16, ops.EXCLUDE_NONE, symmetric))
    for mode in MODES.values():
        for symmetric in (False, True):
            for shape in ((1, 1, 3), (40, 40, 17), (150, 333, 31)):
                check_similarity(problem(*shape, BF16, mode, symmetric))
    for kind in ("isotropic", "cone", "raw"):
        for scale in (-5.0, 2.0, 64.0, 300.0):  # the last against running maxima
            for symmetric in (False, True):
                check_similarity(problem(70, 90, 40, BF16, ops.EXCLUDE_NONE, symmetric, scale, kind))
    for need in ((True, False), (False, True)):
        for both, save in ((False, False), (True, False), (True, True)):
            check_similarity(problem(60, 50, 21, BF16, ops.EXCLUDE_NONE, False), need, both, save)
    for call in CALLS:
        for n, d in ((1, 1), (40, 33), (131, 96)):
            compare(CALLS[call](n, d, BF16))
    for shape in ((1, 1, 1), (7, 7, 3), (130, 130, 97), (60, 91, 200)):
        check_siglip(*shape, False)
        check_siglip(shape[0], shape[0], shape[2], True)
    check_pairs_are_used()
    check_threads()
    check_others_keep_their_tiles()
    check_values_not_finite()


if __name__ == "__main__":
    print(native.module.isa())
    main(int(sys.argv[1]))

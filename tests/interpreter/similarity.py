"""Triton similarity kernels against the float64 reference, under the interpreter: `make test-triton`.

Every buffer that a backend asks for lies between guards, and every input inside a buffer of NaN, so that a read or
write outside a tensor shows.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from guards import guarded, inside_nan  # noqa: F401
from similarity_cases import parts, to_float64

from ffcl_fast import backends, functional, ops, reference
from ffcl_fast.backends.aligned import aligned_rows, is_aligned
from ffcl_fast.backends.triton import config, launch, tuning
from ffcl_fast.backends.triton.config import Tile
from helpers import assert_close_to_reference

forward_module = importlib.import_module("ffcl_fast.backends.triton.similarity_forward")
OPS = torch.ops.ffcl_fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_panels(guarded, monkeypatch):  # noqa: F811
    """Every buffer between guards, and several panels of small problems."""
    monkeypatch.setattr(config, "PANEL_SIDE", {2: 32, 4: 32})


def embeddings(n, d, dtype, unit=True):
    x = torch.randn(n, d)
    return inside_nan((F.normalize(x, dim=1) if unit else x).to(dtype), 8)


def ids(n):
    return torch.randint(0, 5, (n,)) + (torch.randint(0, 2, (n,)) << 40)  # the high words matter too


def problem(n, m, d, dtype, exclude, alone):
    """(q, k, row_ids, col_ids); k is None where `alone`."""
    q, k = embeddings(n, d, dtype), None if alone else embeddings(m, d, dtype)
    if exclude <= ops.EXCLUDE_DIAGONAL:
        return q, k, None, None
    row_ids = ids(n)
    return q, k, row_ids, row_ids if alone else ids(m)


def double(x):
    return None if x is None else x.double()


def check_forward(q, k, scale, row_ids=None, col_ids=None, exclude=0, both=True):
    scale = torch.tensor(float(scale))
    arguments = scale, row_ids, col_ids, exclude, both, False
    ours = OPS.similarity_forward(q, k, *arguments, "triton")
    truth = reference.similarity_forward(q.double(), double(k), *arguments)
    eager = reference.similarity_forward(q, k, *arguments)
    for name, x, y, z in zip(("row_lse", "col_lse"), ours, eager, truth, strict=False):
        assert x.dtype == torch.float32
        assert_close_to_reference(x, y, z, name=name)
    return ours


def check_gradient(q, k, scale, row_ids=None, col_ids=None, exclude=0, both=True, need=(True, True)):
    scale = torch.tensor(float(scale))
    lse = reference.similarity_forward(q.double(), double(k), scale, row_ids, col_ids, exclude, both, False)
    weights = [torch.randn(x.numel()) / max(1, x.numel()) for x in lse[:2]]

    def vectors(dtype):
        return [x.to(dtype) for x in (*lse[:2], *weights)]

    head, tail = (row_ids, col_ids, exclude), (torch.empty(0), *need)
    ours = OPS.similarity_backward(q, k, scale, *head, *vectors(torch.float32), *tail, "triton")
    truth = reference.similarity_backward(q.double(), double(k), scale.double(), *head, *vectors(torch.float64), *tail)
    eager = reference.similarity_backward(q, k, scale, *head, *vectors(torch.float32), *tail)
    sizes = parts(to_float64((q, k, scale, *head)), *vectors(torch.float64))
    for name, x, y, z, terms in zip(("dq", "dk"), ours, eager, truth, sizes, strict=True):
        assert x.dtype == q.dtype
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=terms)
    return ours


EXCLUSIONS = range(5)


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("exclude", EXCLUSIONS)
def test_forward(exclude, alone):
    for dtype, (n, m, d) in zip(DTYPES, [(37, 53, 40), (70, 20, 17), (3, 90, 72)], strict=True):
        q, k, row_ids, col_ids = problem(n, m, d, dtype, exclude, alone)
        check_forward(q, k, 14.3, row_ids, col_ids, exclude, both=exclude % 2 == 0)


@pytest.mark.parametrize("both", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("exclude", EXCLUSIONS)
def test_gradient(exclude, alone, both):
    # 16-bit embeddings up to 128 wide keep the gradient in registers; 130 goes through panels, as all of float32 does.
    cases = itertools.product(DTYPES, [(37, 53, 40), (40, 33, 130)])
    for dtype, (n, m, d) in itertools.islice(cases, exclude % 2, None, 2):
        q, k, row_ids, col_ids = problem(n, m, d, dtype, exclude, alone)
        check_gradient(q, k, 14.3, row_ids, col_ids, exclude, both)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_few_rows_is_split_over_pair_columns(dtype):
    q, k = embeddings(5, 24, dtype), embeddings(150, 24, dtype)
    check_gradient(q, k, 10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_gradients_are_not_lost_to_an_overflow(dtype):
    """Weights are divided by the largest, whose reciprocal need not be a float."""
    q, k = embeddings(20, 24, dtype), embeddings(33, 24, dtype)
    head = q, k, torch.tensor(10.0), None, None, ops.EXCLUDE_NONE
    lse = reference.similarity_forward(*head, True, False)[:2]
    weights = [torch.randn_like(x) for x in lse]
    plain = OPS.similarity_backward(*head, *lse, *weights, torch.empty(0), True, True, "triton")
    for power in (2.0**-100, 2.0**-126, 2.0**-140):
        tiny = [x * power for x in weights]
        for x, y in zip(
            OPS.similarity_backward(*head, *lse, *tiny, torch.empty(0), True, True, "triton"), plain, strict=True
        ):
            # Triton's interpreter rounds to subnormal halves in a way of its own.
            atol = 2.0**-146 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal
            torch.testing.assert_close(x.double(), y.double() * power, rtol=2e-2, atol=atol)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_gradient_of_one_side_pair(need):
    for d in (24, 130):
        q, k = embeddings(40, d, torch.bfloat16), embeddings(35, d, torch.bfloat16)
        scale = torch.tensor(10.0)
        lse = reference.similarity_forward(q, k, scale, None, None, 0, True, False)
        one, two = (
            OPS.similarity_backward(
                q, k, scale, None, None, 0, *lse[:2], lse[0] * 0 + 1, lse[1] * 0 + 1, torch.empty(0), *n, "triton"
            )
            for n in (need, (True, True))
        )
        for x, y, wanted in zip(one, two, need, strict=True):
            assert torch.equal(x, y) if wanted else x.shape == (0, d)


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_forward_in_super_tiles_and_chunks(monkeypatch, chunk, alone):
    n, m, d = 150, 100, 20
    monkeypatch.setattr(forward_module, "SPAN", 2)
    monkeypatch.setattr(forward_module, "processors", lambda x: 1)
    monkeypatch.setattr(config, "WORKSPACE", 8 * chunk * (n if alone else m))
    tile = Tile(16, 32, 32, 4, 1, fold=2)
    with tuning.override(forward=tile, triangle=tile, online=Tile(32, 16, 16, 4, 1)):
        q, k, *_ = problem(n, m, d, torch.float32, 0, alone)
        check_forward(q, k, 14.3, exclude=ops.EXCLUDE_DIAGONAL)


# Ids of n rows of which most tiles hold none in common, so that only some tiles are masked.
ORDERED_IDS = {
    "in order": lambda n: torch.arange(n),
    "two views": lambda n: torch.arange(n) % (n // 2) - n // 4,
    "falling": lambda n: -torch.arange(n),
    "classes": lambda n: torch.arange(n) // 7 << 40,
    "beyond each other": lambda n: torch.arange(n) + (n << 50),
    "beyond each other at first": lambda n: torch.arange(n) + (torch.arange(n) < 32) * (n << 50),
    "a few out of order": lambda n: torch.arange(n).index_fill(0, torch.randint(n, (3,)), n // 3),
    "extremes": lambda n: torch.tensor([-(2**63), 2**63 - 1]).repeat_interleave(n)[n // 3 : n // 3 + n],
}


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("kind", ORDERED_IDS)
def test_tiles_without_a_common_id_go_unmasked(kind, alone, monkeypatch):
    n, m, d = 75, 54, 20
    exclude = (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_SAME_ID_OFF_DIAGONAL)[int(torch.randint(2, ()))]
    monkeypatch.setattr(forward_module, "processors", lambda x: 1)  # tall super-tiles
    row_ids, col_ids = ORDERED_IDS[kind](n), ORDERED_IDS[kind](m).flip(0)
    q, k = embeddings(n, d, torch.bfloat16), None if alone else embeddings(m, d, torch.bfloat16)
    col_ids = row_ids if alone else col_ids
    tall, flat = Tile(32, 16, 32, 4, 1), Tile(16, 32, 32, 4, 1)
    halves = Tile(16, 64, 32, 4, 1, registers=168, settle=True)  # ids by halves of a tile, as on sm_90
    with tuning.override(forward=tall, triangle=flat, rows=halves, panel=tall):
        check_forward(q, k, 14.3, row_ids, col_ids, exclude)
        check_gradient(q, k, 14.3, row_ids, col_ids, exclude)  # in registers
        check_gradient(q.float(), None if alone else k.float(), 14.3, row_ids, col_ids, exclude)  # in panels


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("scale", [300.0, -300.0, 2000.0])
def test_forward_rescues_what_the_offset_loses(scale, alone):
    # Rows opposite to everything: their largest exponent is 2 * 300 log2 e below the bound. 2000 is past any offset.
    q = F.normalize(torch.randn(40, 20) * 0.02 + torch.eye(20)[0], dim=1)
    q[:7] *= -1
    k = None if alone else -F.normalize(q[:30] + 0.02 * torch.randn(30, 20), dim=1).abs()
    exclude = ops.EXCLUDE_DIAGONAL if alone else 0
    check_forward(inside_nan(q, 8), None if alone else inside_nan(k, 8), scale, exclude=exclude)


def test_forward_of_rows_of_any_length():
    q, k = embeddings(30, 24, torch.float32, unit=False), embeddings(40, 24, torch.float32, unit=False)
    q[3] *= 40
    k[5] *= 1e-3
    check_forward(q, k, 1.0)


@pytest.mark.parametrize("alone", [False, True], ids=["pair", "self"])
def test_gradient_where_normalisers_spread_too_far_for_one_exponential(alone):
    q = F.normalize(torch.randn(40, 130) * 0.02 + torch.eye(130)[0], dim=1)
    q[:7] *= -1
    k = None if alone else embeddings(33, 130, torch.float32)
    for d in (24, 130):
        half = None if alone else k[:, :d].bfloat16()
        check_gradient(inside_nan(q[:, :d].bfloat16(), 8), half, 200.0)
    check_gradient(inside_nan(q, 8), k, 200.0)


@pytest.mark.parametrize(
    "length, scale, alone",
    [(30.0, 1 / 0.07, False), (100.0, 1.0, False), *itertools.product(["integers"], [0.37, 3700.0], [False, True])],
    ids=str,
)
def test_gradient_of_long_rows_end_to_end(length, scale, alone):
    # |S| to 10^4 and 10^9: the last bit of a normaliser is worth 10^-3 of each of its probabilities, or all of them.
    if length == "integers":  # products are exact in any order, so that what is left is the normalisers' rounding
        q, k = torch.randint(-100, 101, (40, 40)).float(), torch.randint(-100, 101, (33, 40)).float()
    else:
        q, k = (length * F.normalize(torch.randn(n, 40), dim=1) for n in (40, 33))
    results = []
    for backend, dtype in (("triton", torch.float32), ("plain", torch.float32), ("plain", torch.float64)):
        x, y = (v.to(dtype, copy=True).requires_grad_() for v in (q, k))
        s = torch.tensor(scale)
        if backend == "triton":
            lse = functional.similarity_lse(x, None if alone else y, s, exclude="diagonal", backend="triton")
        else:
            product = x @ (x if alone else y).T * s.to(dtype)
            product = product.masked_fill(torch.eye(*product.shape) > 0, -torch.inf)
            lse = product.logsumexp(1), product.logsumexp(0)
        sum((v * torch.linspace(-1, 2, len(v))).mean() for v in lse).backward()
        results.append((*(v.detach() for v in lse), x.grad, *(() if alone else (y.grad,))))
    for name, ours, plain, truth in zip(("row_lse", "col_lse", "dq", "dk"), *results, strict=alone is None):
        assert_close_to_reference(ours, plain, truth, factor=2.0 if "lse" in name else 3.0, name=name)


def test_gradient_knows_what_rounding_took():
    """Soft probabilities far from zero: plain PyTorch loses the last bits of its normalisers, which here count."""
    q, k = (100 + torch.randint(-1, 2, (n, 40)).float() for n in (40, 33))
    x, y = q.clone().requires_grad_(), k.double()
    functional.similarity_lse(x, k, torch.tensor(2.0**-8), backend="triton")[0].sum().backward()
    z = q.double().requires_grad_()
    (z @ y.T * 2.0**-8).logsumexp(1).sum().backward()
    assert float((x.grad - z.grad).abs().max() / z.grad.abs().max()) < 3e-6


def test_an_infinite_element_spoils_no_other_row():
    for d in (24, 130):
        q, k = embeddings(20, d, torch.bfloat16), embeddings(33, d, torch.bfloat16)
        q[3, 2] = torch.inf
        k[:, 2] = k[:, 2].abs() + 0.01  # row 3 of S and every column's sum are infinite
        x = q.clone().requires_grad_()
        row_lse, _ = functional.similarity_lse(x, k, 10.0, backend="triton")
        row_lse[torch.arange(20) != 3].sum().backward()
        alone = q[torch.arange(20) != 3].clone().requires_grad_()
        functional.similarity_lse(alone, k, 10.0, backend="triton")[0].sum().backward()
        assert torch.equal(x.grad[torch.arange(20) != 3], alone.grad)
        assert row_lse[3].isnan()


def test_the_cache_has_what_rounding_took_from_the_normalisers():
    for alone, scale in itertools.product((False, True), (3000.0, 100.0)):
        q, k, *_ = problem(40, 33, 24, torch.float32, 0, alone)
        head = q, k, torch.tensor(scale), None, None, 0, True
        row_lse, col_lse, cache = OPS.similarity_forward(*head, True, "triton")
        assert cache.numel() == backends.load("triton").cache_size(q, k)
        lse = torch.cat([row_lse, col_lse])
        truth = reference.similarity_forward(q.double(), double(k), *head[2:], False)
        error = (lse - torch.cat(truth[:2])).abs().max()
        assert (cache.abs() <= 0.51 * (torch.nextafter(lse.abs(), torch.tensor(torch.inf)) - lse.abs())).all()
        assert bool(cache.any()) and error < 1e-6 * scale
        assert OPS.similarity_forward(*head, False, "triton")[2].numel() == 0


def test_forward_keeps_nan_where_it_belongs():
    for alone in (False, True):
        q, k, *_ = problem(37, 40, 24, torch.float32, 0, alone)
        q[5, 3] = torch.nan
        row_lse, col_lse = check_forward(q, k, 10.0)[:2]
        assert bool(row_lse[5].isnan()) and int(row_lse.isnan().sum()) == (37 if alone else 1)


def test_empty_rows_are_minus_infinity_and_give_nothing():
    q, k = embeddings(20, 24, torch.bfloat16), embeddings(33, 24, torch.bfloat16)
    row_ids, col_ids = torch.zeros(20, dtype=torch.int64), torch.zeros(33, dtype=torch.int64)
    row_ids[4:], col_ids[:3] = 1, 1
    for exclude in (ops.EXCLUDE_SAME_ID, ops.EXCLUDE_DIFFERENT_ID):
        check_forward(q, k, 10.0, row_ids, col_ids * 0, exclude)
        check_gradient(q, k, 10.0, row_ids, col_ids * 0, exclude)
    # Normalisers near 2^290 beside one of 0: the empty rows' own must not enter what the others share.
    close = F.normalize(torch.randn(33, 24) * 0.02 + 1, dim=1).bfloat16()
    check_gradient(close[:20], close, 200.0, row_ids, col_ids * 0, ops.EXCLUDE_SAME_ID)
    check_gradient(close, None, 200.0, col_ids, col_ids, ops.EXCLUDE_DIFFERENT_ID)
    one = q[:1]
    assert check_forward(one, None, 10.0, exclude=ops.EXCLUDE_DIAGONAL)[0].item() == -torch.inf
    assert not bool(check_gradient(one, None, 10.0, exclude=ops.EXCLUDE_DIAGONAL)[0].any())


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (1, 40, 3), (33, 1, 200), (32, 64, 32)])
def test_smallest_and_exact_sizes(n, m, d):
    for dtype in DTYPES[:2]:
        q, k = embeddings(n, d, dtype), embeddings(m, d, dtype)
        check_forward(q, k, 5.0)
        check_gradient(q, k, 5.0)


def test_descriptors_load_what_pointers_load():
    scale = torch.tensor(10.0)
    shapes = {"forward": (16, 16, 32, 4, 1), "rows": (16, 16, 64, 4, 1), "panel": (16, 16, 32, 4, 1)}
    for d in (40, 136):
        q, k = torch.randn(50, d).bfloat16().split((30, 20))
        results = []
        for descriptor in (False, True):
            with tuning.override(**{op: Tile(*shape, descriptor) for op, shape in shapes.items()}):
                results.append(_both_passes(q, k, scale))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_aligned_rows_reach_a_launch(monkeypatch, dtype):
    """Rows off 16 bytes at either end give what their copies give, by the kernels that are compiled and checked."""
    seen = []

    def operand(x, *rest):
        assert is_aligned(x)
        seen.append(x)
        return launch.operand(x, *rest)

    for name in ("similarity_forward", "similarity_backward", "siglip", "linear_goodness"):
        monkeypatch.setattr(importlib.import_module(f"ffcl_fast.backends.triton.{name}"), "operand", operand)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    wide = 128 // torch.finfo(dtype).bits
    for d, pad, first in ((40, 1, 0), (40, wide, 1), (37, 3, 2), (131, 0, 0)):
        base = F.normalize(torch.randn(70, d + pad + first), dim=1).to(dtype)[:, first : first + d]
        q, k = base[:30], base[30:]
        same = [torch.cat([x, x.new_zeros(len(x), -d % wide)], 1) for x in (q, k)]
        for ours, theirs in (
            (_both_passes(q, k, scale), _both_passes(*same, scale)),
            (_both_passes(q, None, scale), _both_passes(same[0], None, scale)),
            *(
                (OPS.siglip(*x, scale, bias, True, need, need, "triton") for x in ((q, k), same))
                for need in (True, False)
            ),
            ([OPS.linear_goodness(*x, None, False, True, "triton")] for x in ((q, k), same)),
        ):
            for x, y in zip(ours, theirs, strict=True):
                assert x.is_contiguous() and torch.equal(x, y[..., : x.shape[-1]] if x.dim() else y)
    assert len(seen) >= 4 * 12


def _both_passes(q, k, scale):
    row_lse, col_lse, cache = OPS.similarity_forward(q, k, scale, None, None, 0, True, True, "triton")
    u, v = torch.ones_like(row_lse), torch.ones_like(col_lse)
    grads = OPS.similarity_backward(q, k, scale, None, None, 0, row_lse, col_lse, u, v, cache, True, True, "triton")
    return row_lse, col_lse, *grads


def test_equal_bits_and_no_copy_of_strided_rows():
    x = torch.randn(60, 2, 24)[:, 1].bfloat16()
    strided = torch.randn(60, 2, 24).bfloat16()[:, 1]
    assert aligned_rows(strided) is strided and aligned_rows(x.T[:24]).is_contiguous()
    strided.copy_(x)
    scale = torch.tensor(10.0)
    first = _both_passes(strided[:30], strided[30:], scale)
    for again in (_both_passes(strided[:30], strided[30:], scale), _both_passes(x[:30], x[30:], scale)):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
    across = torch.randn(24, 30).bfloat16().T
    for a, b in zip(_both_passes(across, x, scale), _both_passes(across.contiguous(), x, scale), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", [True, False])
def test_siglip(positives, dtype):
    for n, m, d in [(37, 53, 40), (50, 30, 17)]:
        q, k = embeddings(n, d, dtype), embeddings(m, d, dtype)
        scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
        for need in ((True, True), (True, False), (False, True), (False, False)):
            ours = OPS.siglip(q, k, scale, bias, positives, *need, "triton")
            truth = reference.siglip(q.double(), k.double(), scale.double(), bias.double(), positives, *need)
            eager = reference.siglip(q, k, scale, bias, positives, *need)
            for name, x, y, z in zip(("loss", "dq", "dk", "dbias"), ours, eager, truth, strict=True):
                assert x.shape == z.shape
                if x.numel() and (any(need) or name == "loss"):
                    assert_close_to_reference(x, y, z, factor=2.0 if name == "loss" else 3.0, name=name)


def test_siglip_of_certain_pairs_and_nan():
    q, k = embeddings(20, 24, torch.float32), embeddings(20, 24, torch.float32)
    loss = OPS.siglip(q, k, torch.tensor(0.0), torch.tensor(-60.0), False, False, False, "triton")[0]
    torch.testing.assert_close(loss.double(), 400 * torch.exp(torch.tensor(-60.0).double()), rtol=1e-5, atol=0)
    q[3, 3] = torch.nan
    assert bool(OPS.siglip(q, k, torch.tensor(1.0), torch.tensor(-1.0), True, True, True, "triton")[0].isnan())


@pytest.mark.parametrize(
    "x, reason",
    [(torch.zeros(4, 8, dtype=torch.float64), "float32, float16 and bfloat16"), (torch.zeros(2, 5000), "4096 wide")],
)
def test_what_it_cannot_run_says_why(x, reason):
    with pytest.raises(RuntimeError, match=reason):
        backends.get("triton", "similarity_forward", x)


def test_candidates_fit_their_chip_and_tiles_divide_super_tiles():
    for chip, operands, width, exclude in itertools.product(
        ("sm80", "sm90", "sm100", "gfx942"), ("half", "tf32", "float"), (1, 64, 96, 128, 200, 512, 4096), (False, True)
    ):
        for op in ("forward", "triangle", "panel", "siglip", "rows", "online"):
            if op == "rows" and (operands != "half" or width > config.REGISTER_WIDTH):
                continue
            for tile in config.candidates(op, chip, operands, width, exclude):
                assert tile.rows & (tile.rows - 1) == 0 and tile.cols & (tile.cols - 1) == 0
                assert forward_module.SPAN * tile.rows % tile.cols == 0
                assert tile.depth >= 16
                size = 2 if operands == "half" else 4
                stages = max(1, tile.stages - 1)
                assert (tile.rows + tile.cols) * tile.depth * size * stages <= config.SHARED_LIMIT[chip]

"""The CUDA similarity kernels, compiled for the CPU by tests/emulation/, against the reference; how they are cut."""

from __future__ import annotations

import math

import pytest
import test_gpu_cuda
import torch
from emulated import emulated, emulated_module, use  # noqa: F401
from guards import guarded, inside_nan  # noqa: F401
from similarity_cases import MODES, parts, problem, to_float64, vectors

from ffcl_fast import functional, ops, reference
from ffcl_fast.backends import cuda, cuda_similarity
from helpers import assert_close_to_reference
from tools.gpu_measure import passes
from tools.gpu_workloads import WORKLOADS, by_cuda

OPS = torch.ops.ffcl_fast
HALVES = (torch.bfloat16, torch.float16)
WAYS = {"sm80": 80, "sm90": 90}
# (N, M, D): tails of rows, columns and depth, several tiles, several super-tiles, one row, one column.
SHAPES = ((1, 70, 8), (131, 1, 24), (150, 260, 72), (300, 129, 64), (129, 150, 200), (40, 140, 520))


def compare(q, k, scale, row_ids, col_ids, exclude, both=True):
    """Forward and gradient of the CUDA kernels against float64 by the project's rule."""
    head = q, k, scale, row_ids, col_ids, exclude
    ours = OPS.similarity_forward(*head, both, True, "cuda")
    eager = reference.similarity_forward(*head, both, True)
    truth = reference.similarity_forward(*to_float64(head), both, True)
    for name, x, y, z in zip(("row_lse", "col_lse"), ours, eager, truth, strict=False):
        assert_close_to_reference(x, y, z, name=name)
    weights = [torch.randn(x.shape, dtype=torch.float64) / max(1, x.numel()) for x in truth[:2]]
    need_k = k is not None

    def rest(results, dtype):  # a cache belongs to its own normalisers
        return *(x.to(dtype) for x in (*results[:2], *weights)), results[2], True, need_k

    grads = OPS.similarity_backward(*head, *rest(ours, torch.float32), "cuda")
    plain = reference.similarity_backward(*head, *rest(eager, torch.float32))
    exact = reference.similarity_backward(*to_float64(head), *rest(truth, torch.float64))
    terms = parts(to_float64(head), *truth[:2], *weights)
    for name, x, y, z, size in zip(("dq", "dk"), grads, plain, exact, terms, strict=True):
        assert_close_to_reference(x, y, z, factor=3.0, name=name, terms=size)


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair(shape, capability, emulated, guarded):  # noqa: F811
    use(emulated, capability)
    for exclude, dtype in zip(torch.randperm(5).tolist()[:2], HALVES, strict=True):
        q, k, *rest = problem(*shape, dtype, exclude, False)
        compare(inside_nan(q, 8), inside_nan(k, 3), *rest, both=bool(torch.rand(()) < 0.7))


# Steps of the depth: one, as many as stay in half of the places, more, more than stay.
@pytest.mark.parametrize("shape", ((1024, 1000, 24), (1000, 520, 200), (1000, 400, 290), (1000, 400, 600)), ids=str)
def test_many_tiles_of_a_cluster(shape, emulated):  # noqa: F811
    """Rounds of the ring, columns that stay and are replaced, both groups' turns: on a chip of one cluster."""
    use(emulated, 90, processors=2)
    assert emulated.sums_plan(shape[0], shape[1], False, True, 2)["span"] >= 4
    dtype = HALVES[int(torch.randint(2, ()))]
    compare(*problem(*shape, dtype, int(torch.randint(2, ())), False))


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_self(mode, capability, emulated, guarded):  # noqa: F811
    use(emulated, capability)
    dtype = HALVES[int(torch.randint(2, ()))]
    compare(*problem(300, 0, 40, dtype, MODES[mode], True))


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("triangle", (False, True), ids=("pair", "self"))
def test_chunks_of_rows(triangle, capability, emulated, monkeypatch):  # noqa: F811
    """Partial sums carried from one launch to the next."""
    use(emulated, capability, processors=1000)
    q, k, *rest = problem(700, 300, 16, torch.bfloat16, ops.EXCLUDE_DIAGONAL, triangle)
    before = emulated.launches()
    emulated.set_sums_workspace(1)
    try:
        compare(q, k, *rest)
    finally:
        emulated.set_sums_workspace(64 << 20)
    assert emulated.launches() - before > 7


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("scale", (100.0, 400.0, -30.0, 0.0))
def test_rescue(scale, capability, emulated):  # noqa: F811
    """Rows far below the bound, and a bound past what an offset serves."""
    use(emulated, capability)
    q, k = vectors(20, 16, torch.bfloat16), vectors(24, 16, torch.bfloat16)
    q[3] = -k.float().mean(0).to(q.dtype) * 2
    q[5] *= 0
    compare(q, k, torch.tensor(scale), None, None, ops.EXCLUDE_NONE)
    compare(q, None, torch.tensor(scale), None, None, ops.EXCLUDE_DIAGONAL)


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("alone", (False, True), ids=("pair", "self"))
def test_long_rows(alone, capability, emulated):  # noqa: F811
    """|S| to 10^4 and 10^9: the last bit of a normaliser is worth 10^-3 of its probabilities, or all of them."""
    use(emulated, capability)
    for scale in (0.37, -3700.0):  # products are exact in any order, so that what is left is the normalisers' rounding
        q, k = (torch.randint(-100, 101, (n, 40)).bfloat16() for n in (140, 133))
        for both in (True, False):
            compare(q, None if alone else k, torch.tensor(scale), None, None, ops.EXCLUDE_DIAGONAL, both)


def test_rescue_of_several_tiles(emulated, guarded):  # noqa: F811
    """Maxima that rise from tile to tile, rows and columns that are lost and others that are not, masks by id."""
    q, k, *rest = problem(300, 400, 24, torch.float16, int(torch.randint(2, 5, ())), False, kind="cone")
    q[::7] *= -1
    compare(inside_nan(q, 8), inside_nan(k, 3), torch.tensor(200.0), *rest[1:])
    compare(inside_nan(q * 20, 8), inside_nan(k, 3), torch.tensor(200.0), *rest[1:])


@pytest.mark.parametrize("power", (2.0**-8, 2.0**-11), ids=("rescued", "by an offset"))
def test_rests_are_what_rounding_took(power, emulated):  # noqa: F811
    q, k = (100 + torch.randint(-1, 2, (n, 40)).bfloat16() for n in (40, 33))
    scale = torch.tensor(power / math.log2(math.e))
    assert scale * math.log2(math.e) == power  # so that exponents are exact
    head = q, k, scale, None, None, ops.EXCLUDE_NONE
    *lse, rests = OPS.similarity_forward(*head, True, True, "cuda")
    truth = torch.cat(reference.similarity_forward(*to_float64(head), True, False)[:2])
    errors = [float((torch.cat(lse).double() + x - truth).abs().max() / truth.max()) for x in (0.0, rests)]
    assert errors[1] < 5e-9 < 2e-8 < errors[0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_infinite_element_spoils_no_other_row(dtype, emulated):  # noqa: F811
    q, k = vectors(20, 24, dtype), vectors(33, 24, dtype)
    q[3, 2] = torch.inf
    k[:, 2] = k[:, 2].abs() + 0.01  # row 3 of S and every column's sum are infinite
    others = torch.arange(20) != 3
    x = q.clone().requires_grad_()
    row_lse, _ = functional.similarity_lse(x, k, 10.0, backend="cuda")
    row_lse[others].sum().backward()
    alone = q[others].clone().requires_grad_()
    functional.similarity_lse(alone, k, 10.0, backend="cuda")[0].sum().backward()
    rounding = torch.finfo(dtype).eps  # the product of another number of rows adds in another order
    torch.testing.assert_close(x.grad[others], alone.grad, rtol=2 * rounding, atol=rounding)
    assert not row_lse[3].isfinite()


def test_nan_stays_where_it_belongs(emulated):  # noqa: F811
    for alone in (False, True):
        q, k = vectors(150, 24, torch.bfloat16), vectors(140, 24, torch.bfloat16)
        q[5, 3] = torch.nan
        row_lse, *_ = OPS.similarity_forward(
            q, None if alone else k, torch.tensor(10.0), None, None, 0, True, False, "cuda"
        )
        assert bool(row_lse[5].isnan()) and int(row_lse.isnan().sum()) == (150 if alone else 1)


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
def test_rows_that_overlap(capability, emulated):  # noqa: F811
    """TMA cannot be told of them: they are copied."""
    use(emulated, capability)
    row, many = vectors(1, 64, torch.bfloat16), vectors(1, 400, torch.bfloat16)
    compare(vectors(9, 64, torch.bfloat16), row.expand(20, 64), torch.tensor(2.0), None, None, ops.EXCLUDE_NONE)
    compare(many.as_strided((30, 64), (8, 1)), None, torch.tensor(2.0), None, None, ops.EXCLUDE_DIAGONAL)


def test_rows_without_a_pair(emulated, guarded):  # noqa: F811
    q, k = vectors(20, 24, torch.float16), vectors(30, 24, torch.float16)
    row_ids, col_ids = torch.arange(20), torch.arange(30) + 10
    for exclude in (ops.EXCLUDE_DIFFERENT_ID, ops.EXCLUDE_SAME_ID):
        ids = (row_ids, col_ids) if exclude == ops.EXCLUDE_DIFFERENT_ID else (row_ids * 0, col_ids * 0)
        compare(q, k, torch.tensor(9.0), *ids, exclude)


def test_panels_are_walked(emulated, guarded, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda_similarity, "PANEL_SIDE", 64)
    for k in (vectors(130, 16, torch.bfloat16), None):
        q = vectors(150, 16, torch.bfloat16)
        compare(q, k, torch.tensor(11.0), None, None, ops.EXCLUDE_DIAGONAL)


@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
def test_normalisers_too_far_apart_for_one_exponential(capability, emulated):  # noqa: F811
    use(emulated, capability)
    q, k = vectors(40, 16, torch.bfloat16), vectors(50, 16, torch.bfloat16)
    q[:7] *= 3
    compare(q, k, torch.tensor(60.0), None, None, ops.EXCLUDE_NONE)


def test_equal_bits(emulated):  # noqa: F811
    """The emulator runs threads in another order every time."""
    args = problem(200, 150, 32, torch.bfloat16, ops.EXCLUDE_NONE, False)
    first = OPS.similarity_forward(*args, True, True, "cuda")
    for x, y in zip(first, OPS.similarity_forward(*args, True, True, "cuda"), strict=True):
        assert torch.equal(x, y)


def test_autograd_over_the_kernels(emulated):  # noqa: F811
    results = []
    image, text = (vectors(40, 32, torch.bfloat16).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    for backend in ("cuda", "reference"):
        loss = functional.clip(image, text, scale, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (image, text, scale))))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("alone", (False, True), ids=("pair", "self"))
@pytest.mark.parametrize("capability", WAYS.values(), ids=WAYS)
def test_what_memcheck_and_racecheck_are_to_run_is_right(capability, alone, emulated, monkeypatch):  # noqa: F811
    use(emulated, capability)
    test_gpu_cuda.test_small_similarity(alone, None)
    test_gpu_cuda.test_small_races(alone, None, monkeypatch)


def test_what_a_gpu_is_to_measure_can_be_called(emulated):  # noqa: F811
    for workload in {workload.name: workload for workload in WORKLOADS}.values():
        if loss := by_cuda(workload):
            arguments = workload.small().inputs("cpu")
            gradients = passes(loss, arguments)[1]()
            assert all(g is None or bool(g.isfinite().all()) for g in gradients), workload.key


def test_refusals(emulated, monkeypatch):  # noqa: F811
    q = torch.randn(3, 8)
    assert cuda.unavailable("similarity_forward", q) == "its tensor-core kernels take bfloat16 and float16"
    wide = torch.zeros(1, 4104, dtype=torch.bfloat16)
    assert cuda.unavailable("similarity_forward", wide) == "embeddings may be at most 4096 wide, not 4104"
    monkeypatch.setattr(cuda, "chip", lambda device: cuda.Chip(75, 40))
    assert "compute capability 8.0" in cuda.unavailable("similarity_forward", q.bfloat16())


def test_misaligned_arguments_never_reach_a_launch(emulated):  # noqa: F811
    q = torch.zeros(4, 16, dtype=torch.bfloat16)
    out, scale = torch.empty(4), torch.ones(())
    good = dict(q=q.data_ptr(), k=q.data_ptr(), rows=4, cols=4, dim=16, q_stride=16, k_stride=16, dtype=1,
                scale=scale.data_ptr(), row_ids=0, col_ids=0, exclude=0, triangle=False, way=0, device=0,
                stream=0)  # fmt: skip
    before = emulated.launches()
    for wrong in (
        {"q": q.data_ptr() + 2}, {"dim": 12}, {"dim": 4104}, {"q_stride": 20}, {"rows": 0}, {"dtype": 0},
        {"exclude": 2}, {"exclude": 9}, {"cols": 1 << 31},
    ):  # fmt: skip
        args = emulated.SimilarityCuda(**good | wrong)
        assert emulated.similarity_workspace_cuda(args) == -1
        assert emulated.similarity_forward_cuda(args, out.data_ptr(), 0, 0, 0, 0) == 1
        assert emulated.similarity_panel_cuda(args, 0, 0, 0, 0, 4, 0, 4, q.data_ptr(), 16) == 1
    args = emulated.SimilarityCuda(**good)
    assert emulated.similarity_forward_cuda(args, out.data_ptr(), 0, 0, 0, 10) == 1  # too little workspace
    assert emulated.similarity_panel_cuda(args, 0, 0, 0, 0, 5, 0, 4, q.data_ptr(), 16) == 1
    assert emulated.similarity_panel_cuda(args, 0, 0, 0, 0, 4, 0, 4, q.data_ptr(), 12) == 1
    assert emulated.launches() == before


# ---------------------------------------------------------------------------------------------------------------------
# How a problem is cut
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", (False, True))
@pytest.mark.parametrize("triangle", (False, True))
def test_every_pair_of_super_tiles_is_covered_once(triangle, cluster, emulated):  # noqa: F811
    for _ in range(20):
        rows, cols = torch.randint(1, 9000, (2,)).tolist()
        cols = rows if triangle else cols
        processors = int(torch.randint(1, 150, ()))
        cut = rows, cols, triangle, cluster, processors
        plan = emulated.sums_plan(*cut)
        side, supers = plan["side"], plan["supers"]
        assert side % 128 == 0 and plan["chunk"] % side == 0
        assert (supers - 1) * side < cols <= supers * side
        chunk = side * int(torch.randint(1, 4, ()))
        seen = []
        for begin in range(0, rows, chunk):
            end = min(rows, begin + chunk)
            cells = [c for c in emulated.sums_cells(*cut, begin, end) if 0 <= c[1] < supers]
            assert all(begin // side <= r < -(-end // side) for r, _ in cells)
            seen += cells
        assert len(seen) == len(set(seen))
        expected = {(r, c) for r in range(-(-rows // side)) for c in range(r if triangle else 0, supers)}
        assert set(seen) == expected


@pytest.mark.parametrize("cluster", (False, True))
@pytest.mark.parametrize("triangle", (False, True))
def test_every_slot_is_added_once(triangle, cluster, emulated):  # noqa: F811
    """Each super-tile's sums reach each normaliser of its rows and of its columns once."""
    rows = int(torch.randint(300, 4000, ()))
    cols = rows if triangle else int(torch.randint(300, 4000, ()))
    cut = rows, cols, triangle, cluster, 132
    side = emulated.sums_plan(*cut)["side"]
    shares = 2 if cluster else 1
    chunk = 2 * side
    for index in torch.randint(rows, (10,)).tolist():
        own, got_rows, got_cols = index // side, [], []
        for begin in range(0, rows, chunk):
            end = min(rows, begin + chunk)
            first_row, last_row, last_col = emulated.sums_slots(*cut, False, index, begin, end)
            if begin <= index < end:
                got_rows += range(first_row // shares, last_row // shares)
            assert first_row % shares == last_row % shares == last_col % shares == 0
            if triangle and begin // side <= own:
                got_cols += range(begin // side, begin // side + last_col // shares)
        supers = -(-cols // side)
        assert got_rows == list(range(own if triangle else 0, supers))
        assert got_cols == (list(range(own + 1)) if triangle else [])


def test_workspace_is_bounded(emulated):  # noqa: F811
    for rows, cols in ((1 << 20, 1 << 20), (1 << 17, 1 << 14), (100, 100)):
        for cluster in (False, True):
            plan = emulated.sums_plan(rows, cols, False, cluster, 132)
            least_rows = 4 * 4 * (cols + plan["side"])  # one row of super-tiles
            assert 4 * plan["workspace"] <= max(64 << 20, least_rows) + 8192


def test_pairs_of_any_length_have_a_place(emulated):  # noqa: F811
    for capability, shared in ((80, 163 << 10), (86, 99 << 10), (90, 227 << 10)):
        for packs in [*torch.randint(1, 60000, (200,)).tolist(), 1, 31, 32, 256, 257]:
            for pack_bytes in (16, 2, 4):
                lanes, cluster, share, kept, blocks, used = emulated.pair_plan(
                    1000, packs, pack_bytes, True, capability, shared
                )
                assert used <= shared and kept <= share and share * cluster >= packs
                assert cluster == 1 or (capability >= 90 and lanes == 256)
                assert blocks == (125 if lanes == 32 else 1000 * cluster)
                if packs * pack_bytes * 2 <= shared - 192:
                    assert kept == share  # one visit to memory
    assert emulated.pair_plan(1000, 3620, 16, True, 90, 227 << 10)[1] == 2  # 1 KiB of each block is the driver's
    # Blocks a sample of 50,176 elements of 16 bits: many samples fill the chip, few are cut further.
    for rows, gradients, blocks in ((1000, True, 2), (1000, False, 1), (100, False, 4), (10, True, 8), (10, False, 8)):
        assert emulated.pair_plan(rows, 50176 // 8, 16, gradients, 90, 227 << 10)[1] == blocks
        assert emulated.pair_plan(rows, 50176 // 8, 16, gradients, 80, 163 << 10)[1] == 1


def test_pools_of_any_shape_have_a_way(emulated):  # noqa: F811
    for _ in range(200):
        channels, positions, processors = (int(x) for x in torch.randint(1, 5000, (3,)))
        for last in (False, True):
            for wide in (4, 8):
                way, pack, parts, across, blocks, shared = emulated.pool_plan(
                    7, channels, positions, last, wide, True, processors
                )
                assert blocks == 7 * parts and shared <= 99 << 10
                assert (way == 2) == last and pack in (1, wide)
                if way == 2:
                    assert parts * across * pack >= channels > (parts - 1) * across * pack
                else:
                    assert parts * (128 if way == 1 else 8) >= channels
    # Few samples of 64 channels of 16 bits, the channels last, are cut down to 64 bytes a position.
    for samples, across in ((1, 4), (64, 4), (132, 8), (1000, 8)):
        assert emulated.pool_plan(samples, 64, 3136, True, 8, True, 132)[3:5] == (across, samples * 8 // across)

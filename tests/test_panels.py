"""The row panels' own promises: tiles cover S once, workspace is bounded. Values are in test_ops.py."""

from __future__ import annotations

import pytest
import torch
from similarity_cases import vectors

from ffcl_fast import ops
from ffcl_fast.backends import panels, panels_similarity
from ffcl_fast.backends.panels_similarity import ACCELERATOR_TILE, CPU_TILE, _Tiles, diagonal_of

ONE = torch.tensor(1.0)


TILES = {"cpu": CPU_TILE, "meta": ACCELERATOR_TILE}  # "meta" stands for any other device


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize("n,m", ((1, 1), (7, 3), (300, 5000), (3000, 700), (9000, 1), (5000, 8200)))
def test_tiles_cover_every_pair_once(n, m, device):
    seen = torch.zeros(n, m, dtype=torch.int8)
    for rows, cols in _Tiles(torch.empty(n, 1, device=device), torch.empty(m, 1, device=device), ONE):
        seen[rows, cols] += 1
        assert (rows.stop - rows.start) * (cols.stop - cols.start) <= TILES[device].elements
        assert cols.stop - cols.start <= TILES[device].columns
    assert (seen == 1).all()


@pytest.mark.parametrize("device", TILES)
@pytest.mark.parametrize("n", (1, 255, 256, 257, 5000))
def test_tiles_of_a_symmetric_matrix(n, device):
    """On or above the diagonal once; the tiles on it whole."""
    seen = torch.zeros(n, n, dtype=torch.int8)
    for rows, cols in _Tiles(torch.empty(n, 1, device=device), None, ONE):
        seen[rows, cols] += 1
        if rows != cols:
            seen[cols, rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    "rows,cols",
    (
        (slice(0, 4), slice(0, 4)),
        (slice(2, 7), slice(4, 20)),
        (slice(0, 3), slice(3, 9)),
        (slice(5, 9), slice(0, 6)),
    ),
)
def test_diagonal_of(rows, cols):
    whole = torch.zeros(20, 20)
    diagonal_of(whole[rows, cols], rows, cols).fill_(1)
    expected = torch.zeros(20, 20)
    expected[rows, cols] = torch.eye(20)[rows, cols]
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("exclude", (ops.EXCLUDE_NONE, ops.EXCLUDE_SAME_ID))
@pytest.mark.parametrize("symmetric", (False, True))
def test_no_buffer_larger_than_a_tile(exclude, symmetric):
    """Under 64 MB of workspace at any N: nothing allocated is larger than one tile or one gradient."""
    n, d = 6000, 8
    q, k = vectors(n, d), None if symmetric else vectors(n, d)
    ids = torch.arange(n) if exclude else None
    col_ids = None if symmetric else ids
    arguments = (q, k, torch.tensor(5.0), ids, col_ids, exclude)
    with _Largest() as largest:
        row, col, cache = panels.similarity_forward(*arguments, True, True)
        panels.similarity_backward(*arguments, row, col, row, col, cache, True, True)
        if not symmetric:
            panels.siglip(q, k, torch.tensor(5.0), torch.tensor(-5.0), True, True, True)
    assert largest.elements <= max(CPU_TILE.elements, n * d)


def test_no_copy_of_wide_rows_larger_than_a_tile():
    q, k, scale = (torch.empty(shape, device="meta", dtype=torch.float16) for shape in ((70000, 512), (10, 512), ()))
    tiles = _Tiles(q, k, scale)
    with _Largest() as largest:
        for rows, cols in tiles:
            tiles.logits(rows, cols)
    assert largest.elements <= ACCELERATOR_TILE.elements < q.numel()


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_large_logits_do_not_use_one_offset():
    """Beyond |S| = 65 one offset would lose rows; there is none where the bound is unknown, infinite or NaN either."""
    q = vectors(10, 4)
    assert _Tiles(q, None, torch.tensor(20.0)).offset() == 0.0
    assert _Tiles(q, None, torch.tensor(-64.0)).offset() == pytest.approx(20.0, abs=1e-3)
    assert _Tiles(q, None, torch.tensor(66.0)).offset() is None
    assert _Tiles(q * float("nan"), None, ONE).offset() is None
    assert _Tiles(q * float("inf"), None, ONE).offset() is None


@pytest.mark.parametrize("symmetric", (False, True))
def test_both_ways_agree(symmetric, monkeypatch):
    arguments = (vectors(600, 16), None if symmetric else vectors(700, 16), torch.tensor(30.0), None, None, 1)

    def run():
        row, col, cache = panels.similarity_forward(*arguments, True, True)
        return row, col, *panels.similarity_backward(*arguments, row, col, row, col, cache, True, True)

    first = run()
    monkeypatch.setattr(panels_similarity._Tiles, "offset", lambda self: None)
    for a, b in zip(first, run(), strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0  # an element may be what is left of terms of this size
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * largest)


class _Count(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def test_an_accelerator_is_given_large_pieces():
    """Each operation is a launch that takes the host microseconds: a tile of a CPU's size is done before that."""
    q, k, scale = (torch.empty(shape, device="meta") for shape in ((8192, 64), (8192, 64), ()))
    arguments = q, k, scale, None, None, ops.EXCLUDE_NONE
    with _Count() as count:
        row, col, cache = panels.similarity_forward(*arguments, True, True)
        panels.similarity_backward(*arguments, row, col, row, col, cache, True, True)
    assert count.operations < 250

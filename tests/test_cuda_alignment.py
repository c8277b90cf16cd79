"""The CUDA kernels where tensors start, or rows lie, between packs of 16 bytes: the emulator refuses such loads."""

from __future__ import annotations

import pytest
import torch
from emulated import emulated, emulated_module, use  # noqa: F401

from ffcl_fast import reference

OPS = torch.ops.ffcl_fast
WIDTH = 96  # whole packs of every dtype
# First element and distance between rows.
PLACES = {"packs": (8, 112), "rows between packs": (0, 101), "start between packs": (3, 112), "neither": (3, 101)}


def placed(rows: int, place: str, dtype: torch.dtype) -> torch.Tensor:
    start, apart = PLACES[place]
    return torch.randn(rows, apart).to(dtype)[:, start : start + WIDTH]


def same(name: str, *args) -> None:
    """The operator as the reference has it: a wrong address is not a matter of digits."""
    ours, wanted = (f(*args, *last) for f, last in ((getattr(OPS, name), ("cuda",)), (getattr(reference, name), ())))
    for a, b in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_goodness(place, dtype, emulated):  # noqa: F811
    h = placed(5, place, dtype)
    same("goodness_forward", h, True, True, True, 0.1)
    goodness = reference.goodness_forward(h, True, True, False, 0.1)[0]
    same("goodness_backward", h, goodness, torch.randn(5), torch.randn(5, WIDTH).to(dtype), True, True, 0.1)
    layers = [placed(3, "packs", dtype), h]
    same("goodness_many", layers, True, True)
    same("goodness_many_backward", layers, torch.randn(8), True, True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("first", (False, True))
def test_pair_cosine(first, place, dtype, emulated):  # noqa: F811
    pair = placed(4, "packs", dtype), placed(4, place, dtype)
    pair = pair[::-1] if first else pair
    target = torch.tensor([1.0, -1.0, -1.0, 1.0])
    same("pair_cosine_forward", *pair, target, -0.5, True, 0.5, True, True)
    coefficients = reference.pair_cosine_forward(*pair, target, -0.5, True, 1.0, False, False)[1]
    same("pair_cosine_backward", *pair, coefficients, torch.randn(4), True, True, True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("last", (False, True), ids=("NCL", "NLC"))
def test_pool(last, place, dtype, emulated):  # noqa: F811
    h = placed(3, place, dtype)
    h = h.unflatten(1, (WIDTH // 8, 8)).transpose(1, 2) if last else h.unflatten(1, (8, WIDTH // 8))
    same("pool_goodness_forward", h, True, True)
    pooled = reference.pool_goodness_forward(h, True, True)[1]
    same("pool_goodness_backward", h, pooled, torch.randn(3), torch.randn(pooled.shape), True, True)

"""Buffers between guards and inputs inside NaN, so that a read or write outside a tensor shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

GUARD = 64
POISON = 12288.0  # exact in every dtype, and no value of a test


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """new_empty returns poison between guards; whoever wrote to a guard fails the test."""
    plain = Tensor.new_empty
    buffers = []

    def new_empty(self, *size, **options):
        if type(self) is not Tensor:  # fake tensors have no memory
            return plain(self, *size, **options)
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = torch.Size(size).numel()
        buffer = plain(self, count + 2 * GUARD, **options).fill_(POISON)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(size)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert bool((buffer[:GUARD] == POISON).all() and (buffer[-GUARD:] == POISON).all()), "written outside a buffer"


def inside_nan(x: Tensor, pad: int = 5) -> Tensor:
    """The (N, D) or (N, C, L) x as a view into a buffer that is NaN elsewhere: samples `pad` elements apart.

    The order of a sample's memory stays.
    """
    flat = x.transpose(1, 2).flatten(1) if x.dim() == 3 and x.stride(2) != 1 else x.flatten(1)
    buffer = torch.full((x.shape[0] + 2, flat.shape[1] + pad), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[1:-1, : flat.shape[1]]
    view.copy_(flat)
    if x.dim() == 2:
        return view
    if x.stride(2) == 1:
        return view.unflatten(1, x.shape[1:])
    return view.unflatten(1, (x.shape[2], x.shape[1])).transpose(1, 2)

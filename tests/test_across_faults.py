"""What goes wrong on one rank ends in a clear error on every rank, in time: bad arguments, NaN, a rank that is gone."""

from __future__ import annotations

import os
import time

import pytest
import torch
from processes import Died, Raised, run

import ffcl_fast as ff
from ffcl_fast.distributed import LostRank

WAIT = 20  # seconds: the group's timeout where a rank stays silent


def _losses(options):
    def clip(x, y, scale=5.0):
        return ff.ClipLoss(**options)(x, y, scale)

    return {
        "clip": clip,
        "siglip": lambda x, y, scale=5.0: ff.SigLipLoss(**options)(x, y, scale, -1.0),
        "info_nce": lambda x, y, scale=5.0: ff.InfoNCELoss(1 / scale, **options)(x, y),
        "nt_xent": lambda x, y, scale=5.0: ff.NTXentLoss(1 / scale, **options)(x, y),
        "sup_con": lambda x, y, scale=5.0: ff.SupConLoss(1 / scale, **options)(torch.stack((x, y), 1)),
    }


def _nan(x):
    x = x.clone()
    x[-1, -1] = torch.nan
    return x


# what rank 1 does to its embeddings -> a part of the message on every rank
FAULTS = {
    "empty": (lambda x: x[:0], "empty"),
    "nan": (_nan, "NaN"),
    "infinite": (lambda x: x / 0, "NaN or infinity"),
    "width": (lambda x: x[:, :-1], "width D"),
    "dtype": (lambda x: x.double(), "dtype"),
    "integer": (lambda x: x.long(), "float16"),
}


def test_wrong_arguments_on_one_rank(seed):
    """Every loss, every fault, the same on both ranks; the group goes on working afterwards."""
    for problems in run(3, _wrong, seed):
        assert not problems, "\n".join(problems)


def _wrong(rank: int, world: int, seed: int) -> list[str]:
    problems = []
    torch.manual_seed(seed + rank)
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    for name, loss in _losses({"distributed": "auto"}).items():
        for fault, (spoil, text) in FAULTS.items():
            a, b = (spoil(x), spoil(y)) if rank == 1 else (x, y)
            try:
                loss(a, b)
                problems.append(f"{name}, {fault}: no error on rank {rank}")
            except (TypeError, ValueError) as error:
                if text not in str(error) or (rank != 1 and "rank" not in str(error)):
                    problems.append(f"{name}, {fault}: rank {rank} says {error}")
        for what, arguments, text in (
            ("another scale", (x, y, 5.0 + rank), "the same on every rank"),
            ("no gradient", (x, y.clone().requires_grad_(rank == 1)), "requires_grad"),
        ):
            try:
                loss(*arguments)
                problems.append(f"{name}, {what}: no error on rank {rank}")
            except ValueError as error:
                if text not in str(error):
                    problems.append(f"{name}, {what}: rank {rank} says {error}")
        if not loss(x, y).isfinite():
            problems.append(f"{name}: does not work afterwards")
    try:
        list(_losses({"distributed": "auto"}).values())[rank % 2](x, y)
        problems.append("different losses: no error")
    except ValueError as error:
        if "different losses" not in str(error):
            problems.append(f"different losses: {error}")
    return problems


def test_copied_options_that_do_not_fit(seed):
    for text in run(2, _misfit):
        assert "world_size must be" in text[0] and "rank must be" in text[1]


def _misfit(rank: int, world: int) -> list[str]:
    texts = []
    for options in ({"rank": rank, "world_size": 3}, {"rank": 1 - rank, "world_size": 2}):
        try:
            ff.ClipLoss(local_loss=True, gather_with_grad=True, **options)(torch.randn(2, 3), torch.randn(2, 3), 1.0)
        except ValueError as error:
            texts.append(str(error))
    return texts


@pytest.mark.parametrize("strategy", ("gather", "ring"))
@pytest.mark.parametrize("moment", ("before", "forward", "backward"))
def test_a_rank_that_dies(strategy, moment, seed):
    """The others have LostRank, and long before the group's timeout: the broken connection tells them."""
    first, second, third = run(3, _dies, strategy, moment, timeout=WAIT, check=False)
    assert second == Died(7)
    for other in (first, third):
        assert not isinstance(other, Raised | Died), other
        seconds, text = other
        assert "has died" in text and seconds < 2 * WAIT


def _dies(rank: int, world: int, strategy: str, moment: str):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.distributed.barrier()
    began = time.monotonic()
    if rank == 1:
        if moment == "before":
            os._exit(7)
        if moment == "forward":  # after the meeting, before its part of the work
            import ffcl_fast.distributed.losses as losses

            losses.similarity.lse = lambda *_, **__: os._exit(7)
    try:
        value = ff.ClipLoss(distributed=strategy)(x, y, 5.0)
        if rank == 1:
            os._exit(7)
        value.backward()
    except LostRank as error:
        return time.monotonic() - began, str(error)
    raise AssertionError("no error")


def test_a_rank_that_does_not_come(seed):
    """It is alive but elsewhere: the others hear so when the group's timeout is over."""
    first, second = run(2, _silent, timeout=3, check=False)
    assert "timeout" in first and second == "slept"


def _silent(rank: int, world: int) -> str:
    if rank == 1:
        time.sleep(8)
        return "slept"
    try:
        ff.SigLipLoss(distributed="ring")(torch.randn(2, 3), torch.randn(2, 3), 1.0, 0.0)
    except LostRank as error:
        return str(error)
    raise AssertionError("no error")

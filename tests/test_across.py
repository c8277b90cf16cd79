"""The contract across processes: after DDP's averaging, gradients are those of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from across_cases import CASES, draw, gradients, single, towers
from processes import run

from ffcl_fast.distributed.meeting import _spare

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5}


@pytest.mark.parametrize("world", (2, 4))
def test_contract(world, seed):
    for failures in run(world, _contract, seed):
        assert not failures, "\n".join(failures)


def _contract(rank: int, world: int, seed: int) -> list[str]:
    failures = []
    for number, name in enumerate(CASES):
        for even, dtype in ((True, torch.float64), (False, torch.float64), (False, torch.float32)):
            for strategy in ("gather", "ring"):
                problem = _compare(name, rank, world, seed + number, even, dtype, {"distributed": strategy})
                failures += [f"{name} {strategy} {dtype} even={even}: {p}" for p in problem]
    return failures


def _compare(name, rank, world, seed, even, dtype, options, spoil=None) -> list[str]:
    batch, rows, negatives = draw(seed, world, even, dtype)
    value, truth = single(name, batch, towers(0, dtype, False))
    model = towers(0, dtype, True)
    loss = CASES[name](model, batch.part(rows[rank], negatives[rank]), options)
    ours = gradients(model, loss if spoil is None else spoil(loss))
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    problems = []
    for what, a, b in [("value", mean / world, value), *((n, ours[n], g) for n, g in truth.items())]:
        error, size = float((a - b).norm()), max(float(b.norm()), 1.0)
        if not error <= TOLERANCE[dtype] * size:
            problems.append(f"{what} off by {error:.2e} of {size:.2e}")
    return problems


def test_usual_mistakes_fail_the_contract(seed):
    """Gradients of a process's own rows only, and a factor of the world size: the comparison above must see both."""
    for found in run(2, _mistakes, seed):
        assert all(found.values()), found


def _mistakes(rank: int, world: int, seed: int) -> dict[str, bool]:
    group = {"rank": rank, "world_size": world}
    found = {}
    for local in (True, False):  # what open_clip's options without gather_with_grad give
        options = {"local_loss": local, **group}
        found[f"clip local_loss={local}"] = bool(_compare("clip", rank, world, seed, True, torch.float64, options))
    for name in CASES:
        args = (name, rank, world, seed, True, torch.float64, {"distributed": "gather"})
        found[f"{name} times world"] = bool(_compare(*args, spoil=lambda loss: loss * world))
        found[f"{name} over world"] = bool(_compare(*args, spoil=lambda loss: loss / world))
        if name != "info_nce_paired":  # without the other processes at all
            found[f"{name} alone"] = bool(_compare(name, rank, world, seed, True, torch.float64, {}))
    return found


def test_copied_options_meet_the_contract(seed):
    for failures in run(2, _copied, seed):
        assert not failures, "\n".join(failures)


def _copied(rank: int, world: int, seed: int) -> list[str]:
    group = {"rank": rank, "world_size": world}
    runs = [("clip", {"local_loss": local, "gather_with_grad": True, **group}) for local in (True, False)]
    runs += [("siglip", {**group, "dist_impl": name}) for name in (None, "bidir", "gather")] + [
        ("nt_xent", {"gather_distributed": True})
    ]
    return [
        f"{name} {options}: {p}"
        for name, options in runs
        for p in _compare(name, rank, world, seed, True, torch.float64, options)
    ]


def test_strategy_follows_memory(monkeypatch, seed):
    """FFCL_GATHER_LIMIT of any one rank decides for all; the values are the same."""
    results = run(2, _choice, seed)
    assert [chosen for chosen, _ in results] == ["ring", "ring"]
    assert not any(problems for _, problems in results)


def _choice(rank: int, world: int, seed: int):
    import os

    import ffcl_fast.distributed.losses as losses

    os.environ["FFCL_GATHER_LIMIT"] = "64" if rank == 1 else str(1 << 30)
    _spare.cache_clear()
    seen = []
    plain = losses.meet

    def meet(*args):
        seen.append(plain(*args))
        return seen[-1]

    losses.meet = meet
    problems = _compare("clip", rank, world, seed, False, torch.float64, {"distributed": "auto"})
    return seen[0][3].strategy, problems

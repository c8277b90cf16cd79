"""Two and three processes (gloo): values and gradients are those of open_clip and lightly, rank by rank."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("open_clip.loss")
pytest.importorskip("lightly.loss")


@pytest.mark.long
@pytest.mark.parametrize("world", (2, 3))
def test_modules_across_processes(world):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, args=(world, f"file://{folder}/rendezvous"), nprocs=world)


def _process(rank: int, world: int, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        _gather(rank, world)
        _clip(rank, world)
        _siglip(rank, world)
        _nt_xent(rank, world)
    finally:
        dist.destroy_process_group()


def _rows(rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.nn.functional.normalize(torch.randn(10, 12, generator=generator), dim=1)


def _agree(name, ours, theirs, inputs, averaged=()):
    """Value and gradients; of the results numbered ``averaged`` ours is the mean of theirs over the processes."""
    results = []
    for loss in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        value.backward()
        results.append([value.detach()] + [x.grad for x in leaves])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        b = torch.zeros_like(a) if b is None else b
        a = torch.zeros_like(b) if a is None else a
        if i in averaged:
            b = b.clone()
            dist.all_reduce(b)
            b /= dist.get_world_size()
        error = float((a - b).norm() / b.norm().clamp_min(1e-6))
        assert error < 3e-6, f"{name}, rank {dist.get_rank()}, result {i}: {error:.2e}"


def _gather(rank, world):
    from ffcl_fast import distributed

    x = _rows(rank, 1).requires_grad_()
    everyone = torch.cat([_rows(r, 1) for r in range(world)])
    assert distributed.world_size() == world and distributed.rank() == rank
    assert torch.equal(distributed.gather(x), everyone)
    weights = torch.arange(everyone.numel(), dtype=torch.float32).view_as(everyone) * (rank + 1)
    own = slice(10 * rank, 10 * rank + 10)
    (distributed.gather_with_grad(x) * weights).sum().backward()
    factor = sum(range(1, world + 1)) / (rank + 1)
    torch.testing.assert_close(x.grad, weights[own] * factor)
    x.grad = None
    (distributed.gather_own_grad(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights[own])


def _clip(rank, world):
    import open_clip.loss as original

    import ffcl_fast as ff

    inputs = (_rows(rank, 2), _rows(rank, 3), torch.tensor(14.0))
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
            options |= {"rank": rank, "world_size": world}
            for backend in ("auto", "reference"):
                ours = ff.ClipLoss(**options, backend=backend)
                averaged = (3,) if gather_with_grad else ()  # the scale's gradient
                _agree(f"clip {options}", ours, original.ClipLoss(**options), inputs, averaged)


def _siglip(rank, world):
    import open_clip.loss as original

    import ffcl_fast as ff

    inputs = (_rows(rank, 4), _rows(rank, 5), torch.tensor(10.0), torch.tensor(-5.0))
    for name in ("bidir", "shift", "reduce", "gather"):
        options = {"rank": rank, "world_size": world, "dist_impl": name}
        _agree(f"siglip {name}", ff.SigLipLoss(**options), original.SigLipLoss(**options), inputs)


def _nt_xent(rank, world):
    import lightly.loss as original

    import ffcl_fast as ff

    inputs = (_rows(rank, 6), _rows(rank, 7))
    for backend in ("auto", "panels", "reference"):
        ours = ff.NTXentLoss(0.2, gather_distributed=True, backend=backend)
        _agree("nt_xent", ours, original.NTXentLoss(0.2, gather_distributed=True), inputs)
    torch.manual_seed(0)
    ours = ff.NTXentLoss(0.2, (25, 12), True)
    torch.manual_seed(0)
    theirs = original.NTXentLoss(0.2, (25, 12), True)
    for _ in range(3):
        _agree("nt_xent with a memory bank", ours, theirs, inputs)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)


# A spawned process imports this file by its name: the folder of the tests must be on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

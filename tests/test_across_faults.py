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


def _copied(rank, world):
    """Those of open_clip's and lightly's options that go across processes."""
    own = {"rank": rank, "world_size": world}
    losses = {}
    for local in (True, False):
        for gather in (True, False):
            options = {"local_loss": local, "gather_with_grad": gather, **own}
            losses[f"clip {local} {gather}"] = _losses(options)["clip"]
    for way in (None, "bidir", "shift", "reduce", "gather"):
        losses[f"siglip {way}"] = _losses({"dist_impl": way, **own})["siglip"]
    return {**losses, "nt_xent gather_distributed": _losses({"gather_distributed": True})["nt_xent"]}


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
    for name, loss in (_losses({"distributed": "auto"}) | _copied(rank, world)).items():
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
    one, other = list(_losses({"distributed": "auto"}).values())[:2]
    problems += _told("different losses", lambda: (other if rank % 2 else one)(x, y), "different losses")
    ways = ("gather", "ring", "ring")
    for name in _losses({}):
        loss = _losses({"distributed": ways[rank]})[name]
        problems += _told(f"{name}, another way", lambda loss=loss: loss(x, y), "'gather' on rank 0, 'ring' on rank 1")
    loss = ff.SigLipLoss(rank=rank, world_size=world, dist_impl=("bidir", "gather", "bidir")[rank])
    problems += _told("another dist_impl", lambda: loss(x, y, 5.0, -1.0), "dist_impl")
    for loss in (ff.SigLipLoss(distributed="auto"), ff.SigLipLoss(rank=rank, world_size=world)):
        problems += _told("another bias", lambda loss=loss: loss(x, y, 5.0, -1.0 - rank), "logit_bias must be the same")
        bias = torch.tensor(-1.0, requires_grad=rank == 1)
        problems += _told("a bias that learns", lambda loss=loss, bias=bias: loss(x, y, 5.0, bias), "requires_grad")
    bias = "text" if rank == 1 else None
    for name, options in (
        ("distributed", {"distributed": "auto"}),
        ("local", {"local_loss": True, **_own(rank, world)}),
    ):
        problems += _told(
            f"clip {name}, bias", lambda o=options: ff.ClipLoss(**o)(x, y, 5.0, bias), "logit_bias must be a number"
        )
    return problems


def _own(rank, world):
    return {"rank": rank, "world_size": world}


def _told(what: str, step, text: str) -> list[str]:
    """Nothing if ``step`` raises ``text`` here, else what is wrong."""
    try:
        step()
    except (TypeError, ValueError) as error:
        return [] if text in str(error) else [f"{what}: {error}"]
    return [f"{what}: no error"]


def test_own_anchors_of_uneven_batches(seed):
    """open_clip's ``local_loss`` alone, which took no uneven batch: own rows' loss, keys constant."""
    for problems in run(3, _own_anchors, seed):
        assert not problems, problems


def _own_anchors(rank: int, world: int, seed: int) -> list[str]:
    torch.manual_seed(seed)
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    rows = (slice(0, 2), slice(2, 3), slice(3, 9))[rank]
    results = []
    for ours in (True, False):
        a, b = (v[rows].clone().requires_grad_() for v in (x, y))
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        if ours:
            loss = ff.ClipLoss(local_loss=True, **_own(rank, world))(a, b, scale)
        else:
            target = torch.arange(9)[rows]
            cross = torch.nn.functional.cross_entropy
            loss = (cross(scale * a @ y.T, target) + cross(scale * b @ x.T, target)) / 2
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad, scale.grad))
    names = ("value", "images", "texts", "scale")
    return [n for n, p, q in zip(names, *results, strict=True) if not torch.allclose(p, q, rtol=1e-10, atol=1e-12)]


def test_queues_and_banks(seed):
    """What is wrong with one process's keys, or queues that differ, is told to all before any key is replaced."""
    for problems in run(2, _queues, seed):
        assert not problems, "\n".join(problems)


def _queues(rank: int, world: int, seed: int) -> list[str]:
    torch.manual_seed(seed)
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    queue, bank = ff.Queue(9, 5), ff.NTXentLoss(memory_bank_size=(9, 5), gather_distributed=True)
    before = queue.bank.clone(), bank.memory_bank.bank.clone()
    problems = []
    faults = {name: fault for name, fault in FAULTS.items() if name not in ("width", "dtype")}
    faults["narrow"] = (FAULTS["width"][0], "wid" if rank else "rank 1")
    for fault, (spoil, text) in faults.items():
        a, b = (spoil(v.detach()) if rank == 1 else v.detach() for v in (x, y))
        a = a.requires_grad_() if a.is_floating_point() else a
        problems += _told(f"bank, {fault}", lambda a=a, b=b: bank(a, b), text)
        if fault not in ("empty", "narrow"):
            problems += _told(f"queue, {fault}", lambda b=b: queue.enqueue(b), text)
    problems += _told("queue, narrow", lambda: queue.enqueue(y[:, : 5 - rank]), "keys must have shape (n, 5)")
    problems += _told("queue, another dtype", lambda: (queue if rank else ff.Queue(9, 5).double()).enqueue(y), "dtype")
    moved = ff.Queue(9, 5, gather=False)
    moved.enqueue(y[: 2 + rank])
    moved.gather = True
    for what, other in (("size", ff.Queue(9 + rank, 5)), ("position", moved)):
        problems += _told(f"queue, {what}", lambda other=other: other.enqueue(y), f"queue's {what}")
        loss = ff.InfoNCELoss(distributed="auto")
        problems += _told(f"loss, {what}", lambda loss=loss, other=other: loss(x, y, other), f"queue's {what}")
    differs = ff.Queue(9, 5)
    differs.bank *= 1 - 2 * rank
    problems += _told("loss, keys", lambda: ff.InfoNCELoss(distributed="auto")(x, y, differs), "queue's oldest key")
    other = ff.NTXentLoss(memory_bank_size=(9 + rank, 5), gather_distributed=True)
    problems += _told("bank, size", lambda: other(x, y), "memory bank's size")
    if not (torch.equal(queue.bank, before[0]) and torch.equal(bank.memory_bank.bank, before[1])):
        problems.append("keys were replaced")
    queue.enqueue(y[: 3 * rank])  # a process may have none
    bank(x, y).backward()
    if int(queue.position) != 3 or int(bank.memory_bank.bank_ptr) != 8 or not x.grad.isfinite().all():
        problems.append("does not work afterwards")
    return problems


def test_queues_and_banks_of_a_group(seed):
    """They take the keys of their group, and ask nothing of a process outside of it."""
    first, second, third = run(3, _grouped, seed)
    assert first and second is None and third


def _grouped(rank: int, world: int, seed: int) -> bool | None:
    group = torch.distributed.new_group([0, 2])
    if rank == 1:
        return None
    torch.manual_seed(seed)
    keys = torch.nn.functional.normalize(torch.randn(6, 5))
    own = keys[:3] if rank == 0 else keys[3:]
    queue = ff.Queue(8, 5, group=group)
    loss = ff.NTXentLoss(memory_bank_size=(8, 5), gather_distributed=True, group=group)
    queue.enqueue(own)
    loss(own.clone().requires_grad_(), own)
    return torch.allclose(queue.keys[:6], keys) and torch.allclose(loss.memory_bank.bank[:6], keys)


@pytest.mark.parametrize("what", ("queue", "bank", "own anchors"))
def test_a_rank_that_dies_before(what, seed):
    survivor, dead = run(2, _gone, what, check=False)
    assert dead == Died(7) and not isinstance(survivor, Raised | Died) and "has died" in survivor, survivor


def _gone(rank: int, world: int, what: str) -> str:
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    torch.distributed.barrier()
    if rank == 1:
        os._exit(7)
    try:
        if what == "queue":
            ff.Queue(8, 5).enqueue(y)
        elif what == "bank":
            ff.NTXentLoss(memory_bank_size=(8, 5), gather_distributed=True)(x, y)
        else:
            ff.ClipLoss(local_loss=True, **_own(rank, world))(x, y, 5.0)
    except LostRank as error:
        return str(error)
    raise AssertionError("no error")


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


@pytest.mark.parametrize(
    ("name", "moment", "strategy"),
    (
        ("siglip", "forward", "gather"),
        ("siglip", "backward", "ring"),
        ("info_nce", "forward", "ring"),
        ("info_nce", "backward", "gather"),
        ("nt_xent", "forward", "gather"),
        ("nt_xent", "backward", "ring"),
        ("sup_con", "forward", "ring"),
        ("sup_con", "backward", "gather"),
    ),
)
def test_a_rank_that_dies_in_any_loss(name, moment, strategy, seed):
    """With a learnt scale: SigLIP's backward pass exchanges nothing else, its gradients are made going forward."""
    survivor, dead = run(2, _dies, strategy, moment, name, timeout=WAIT, check=False)
    assert dead == Died(7) and not isinstance(survivor, Raised | Died), survivor
    seconds, text = survivor
    assert "has died" in text and seconds < 2 * WAIT


def _dies(rank: int, world: int, strategy: str, moment: str, name: str = "clip"):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.distributed.barrier()
    began = time.monotonic()
    if rank == 1:
        if moment == "before":
            os._exit(7)
        if moment == "forward":  # after the meeting, before its part of the work
            import ffcl_fast.distributed.losses as losses

            losses.similarity.lse = losses.sigmoid_loss = lambda *_, **__: os._exit(7)
    try:
        scale = torch.tensor(5.0, requires_grad=True)
        value = _losses({"distributed": strategy})[name](x, y, scale)
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

"""cached_step against the step that it stands for, and the queue of keys."""

from __future__ import annotations

import copy

import pytest
import torch
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ffcl_fast as ff
from ffcl_fast.cached import _devices


class Encoder(nn.Module):
    """Rows do not depend on each other; dropout makes random state count, a counter buffers."""

    def __init__(self, width: int = 5, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one = nn.Linear(6, 16, dtype=dtype)
        self.drop = nn.Dropout(0.3)
        self.two = nn.Linear(16, width, dtype=dtype)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        self.calls += 1
        return self.two(self.drop(torch.relu(self.one(x + shift))))


def chunks(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    parts = -(-len(x) // size)
    return [x[i * len(x) // parts : (i + 1) * len(x) // parts] for i in range(parts)]


def plain_step(encoders, inputs, loss, chunk_size):
    """The same chunks with every graph kept, and one backward pass."""
    outputs = [torch.cat([e(c) for c in chunks(x, chunk_size)]) for e, x in zip(encoders, inputs, strict=True)]
    value = loss(*outputs)
    value.backward()
    return value.detach()


def same_gradients(a: nn.Module, b: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("chunk_size", (1, 3, 50))
def test_equal_to_the_plain_step(chunk_size, seed):
    ours = Encoder(dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    a, b = torch.randn(10, 6, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)
    loss = ff.NTXentLoss(0.3)
    results = []
    for step in (
        lambda: ff.cached_step(ours, (a, b), loss, chunk_size),
        lambda: plain_step([theirs] * 2, (a, b), loss, chunk_size),
    ):
        torch.manual_seed(seed)
        results.append((step(), torch.rand(3)))  # and random numbers go on alike
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    same_gradients(ours, theirs)
    assert ours.calls == theirs.calls


def test_two_encoders_arguments_and_accumulation(seed):
    ours = nn.ModuleList((Encoder(), Encoder()))
    ours.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    theirs = copy.deepcopy(ours)
    a, b = torch.randn(9, 6), torch.randn(9, 6)

    def loss_of(model):
        return lambda x, y: ff.ClipLoss()(
            nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1), model.scale
        )

    for _ in range(2):  # gradients add up
        torch.manual_seed(seed)
        ff.cached_step(list(ours), ((a, 0.0), {"x": b}), loss_of(ours), 4)
        torch.manual_seed(seed)
        plain_step(list(theirs), (a, b), loss_of(theirs), 4)
    same_gradients(ours, theirs, 2e-5)


def test_autocast_and_scaler(seed):
    """The same chunks under bfloat16: casts made without a graph must not be used with one."""
    ours = Encoder()
    theirs = copy.deepcopy(ours)
    a, b = torch.randn(8, 6), torch.randn(8, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours_value = ff.cached_step(ours, (a, b), ff.NTXentLoss(), 3, scaler=scaler)
        assert torch.is_autocast_enabled("cpu")
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ff.NTXentLoss()(*(torch.cat([theirs(c) for c in chunks(x, 3)]) for x in (a, b)))
    scaler.scale(value).backward()
    assert torch.equal(ours_value, value.detach())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error < 0.05, f"{name}: {error}"  # bfloat16 rounds every weight's gradient once a chunk, 2^-9 each


@pytest.mark.parametrize(
    ("change", "text"),
    (
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 2.0}, "chunk_size"),
        ({"inputs": ()}, "inputs"),
        ({"encoders": [abs]}, "encoders"),
        ({"inputs": ((torch.ones(3, 6), torch.ones(2, 6)), torch.ones(3, 6))}, r"inputs\[0\]"),
        ({"inputs": (torch.ones(3, 6), torch.ones(0, 6))}, r"inputs\[1\]"),
        ({"inputs": (torch.ones(3, 6), "text")}, r"inputs\[1\]"),
        ({"loss": lambda x, y: x}, "one number"),
    ),
)
def test_wrong_arguments(change, text):
    arguments = {"encoders": Encoder(), "inputs": (torch.ones(3, 6), torch.ones(3, 6)), "loss": ff.NTXentLoss()}
    arguments |= {"chunk_size": 2} | change
    with pytest.raises(ValueError, match=text):
        ff.cached_step(**arguments)


def test_frozen_encoder(seed):
    """CLIP's locked image tower; and nothing that learns at all is an error, as in a plain step."""
    tower, ours = Encoder(dtype=torch.float64).requires_grad_(False), Encoder(dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    a, b = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    for step, learner in ((ff.cached_step, ours), (plain_step, theirs)):
        torch.manual_seed(seed)
        step([tower, learner], (a, b), ff.NTXentLoss(0.3), 3)
    same_gradients(ours, theirs)
    assert all(p.grad is None for p in tower.parameters())
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ff.cached_step(tower, (a, b), lambda x, y: ff.ClipLoss()(x, y, scale), 3)
    assert scale.grad is not None
    with pytest.raises(ValueError, match="requires a gradient"):
        ff.cached_step(tower, (a, b), ff.NTXentLoss(0.3), 3)


def test_random_state_where_the_weights_are():
    """An encoder may move its inputs: random numbers are then drawn on its weights' device."""
    weights, counts = nn.Linear(2, 2, device="meta"), nn.Module()
    counts.register_buffer("steps", torch.zeros((), device="meta"))
    for encoder in (weights, counts):
        assert {d.type for d in _devices((torch.ones(2, 2),), [encoder, abs])} == {"cpu", "meta"}


def test_under_ddp(seed):
    """Two processes, one loss across them, a scale inside the wrapped module that only the loss uses."""
    for problems in run(2, _ddp, seed):
        assert not problems, problems


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(dtype=torch.float64)
        self.encoder.drop.p = 0.0
        self.log_scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x):
        return self.encoder(x)


def _ddp(rank: int, world: int, seed: int) -> list[str]:
    torch.manual_seed(seed)
    model = _Model()
    whole = torch.randn(2, 11, 6, dtype=torch.float64)
    part = slice(0, 4) if rank == 0 else slice(4, 11)

    def loss_of(m, options):
        def loss(x, y):
            x, y = nn.functional.normalize(x, dim=1), nn.functional.normalize(y, dim=1)
            return ff.ClipLoss(**options)(x, y, m.log_scale.exp())

        return loss

    truth = copy.deepcopy(model)
    value = loss_of(truth, {})(truth(whole[0]), truth(whole[1]))
    value.backward()
    problems = []
    for unused in (False, True):
        ours = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=unused)
        for _ in range(2):  # the second step starts from what DDP kept of the first
            ours.zero_grad()
            inputs = (whole[0][part], whole[1][part])
            ff.cached_step(ours, inputs, loss_of(ours.module, {"distributed": "auto"}), 3)
        for (name, p), q in zip(ours.module.named_parameters(), truth.parameters(), strict=True):
            if not torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11):
                problems.append(f"find_unused_parameters={unused} {name}: {(p.grad - q.grad).abs().max():.2e}")
    return problems

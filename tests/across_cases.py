"""The losses across processes, each with a model of two towers: what the tests of the contract run in every process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ffcl_fast as ff

INPUTS, DIM = 7, 6


class Towers(nn.Module):
    """Two linear encoders and what a loss learns; one forward call, so that DDP sees every parameter."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, DIM, dtype=dtype)
        self.second = nn.Linear(INPUTS, DIM, dtype=dtype)
        self.log_scale = nn.Parameter(torch.tensor(1.2, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-1.5, dtype=dtype))
        with torch.no_grad():
            for parameter in (*self.first.parameters(), *self.second.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # bias + 0: a parameter that DDP's forward returns must be used there
        return self.first(a), self.second(b), self.log_scale.exp(), self.bias + 0


@dataclass(frozen=True)
class Batch:
    """All samples; ``part`` is a process's own."""

    a: Tensor
    b: Tensor
    negatives: Tensor
    labels: Tensor

    def part(self, rows: slice, negatives: slice) -> Batch:
        return Batch(self.a[rows], self.b[rows], self.negatives[negatives], self.labels[rows])


Case = Callable[[nn.Module, Batch, dict], Tensor]


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def _info_nce(model, batch, options, **more):
    x, y, scale, bias = model(batch.a, batch.b)
    return ff.InfoNCELoss(1.0, **more, **options), x, y, 1 / scale, bias


def info_nce(model, batch, options):
    loss, x, y, temperature, bias = _info_nce(model, batch, options)
    loss.temperature = temperature
    return loss(x, y) + 0 * bias


def info_nce_negatives(model, batch, options):
    loss, x, y, temperature, bias = _info_nce(model, batch, options, reduction="sum", decoupled=True)
    loss.temperature = temperature
    return loss(x, y, batch.negatives) + 0 * bias


def info_nce_paired(model, batch, options):
    loss, x, y, temperature, bias = _info_nce(model, batch, options, negative_mode="paired")
    loss.temperature = temperature
    negatives = torch.stack((x.roll(1, 1), y.roll(2, 1)), 1)
    return loss(x, y, negatives) + 0 * bias


def nt_xent(model, batch, options):
    x, y, scale, bias = model(batch.a, batch.b)
    loss = ff.NTXentLoss(**options)
    loss.temperature = 1 / scale
    return loss(x, y) + 0 * bias


def nt_xent_decoupled(model, batch, options):
    x, y, scale, bias = model(batch.a, batch.b)
    loss = ff.NTXentLoss(decoupled=True, **options)
    loss.temperature = 1 / scale
    return loss(x, y) + 0 * bias


def _sup_con(views: int, mode: str, labelled: bool) -> Case:
    def case(model, batch, options):
        x, y, scale, bias = model(batch.a, batch.b)
        features = torch.stack([_unit(v) for v in (x, y, x + y)[:views]], 1)
        loss = ff.SupConLoss(contrast_mode=mode, **options)
        loss.temperature = 1 / scale
        rest = 0 * bias + 0 * y.sum()
        return loss(features, batch.labels if labelled else None) + rest

    return case


def clip(model, batch, options):
    x, y, scale, bias = model(batch.a, batch.b)
    return ff.ClipLoss(**options)(_unit(x), _unit(y), scale, bias)


def siglip(model, batch, options):
    x, y, scale, bias = model(batch.a, batch.b)
    return ff.SigLipLoss(**options)(_unit(x), _unit(y), scale, bias)


CASES: dict[str, Case] = {
    "info_nce": info_nce,
    "info_nce_negatives": info_nce_negatives,
    "info_nce_paired": info_nce_paired,
    "nt_xent": nt_xent,
    "nt_xent_decoupled": nt_xent_decoupled,
    "sup_con": _sup_con(2, "all", True),
    "sup_con_self": _sup_con(2, "all", False),
    "sup_con_one": _sup_con(2, "one", True),
    "sup_con_single": _sup_con(1, "all", True),
    "sup_con_three": _sup_con(3, "all", True),
    "clip": clip,
    "siglip": siglip,
}


def draw(seed: int, world: int, even: bool, dtype: torch.dtype) -> tuple[Batch, list[slice], list[slice]]:
    """(whole batch, each process's rows, each one's negatives)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def counts(low):
        if even:
            return [low + 3] * world
        return torch.randint(1, low + 6, (world,), generator=generator).tolist()

    sizes, negatives = counts(4), counts(3)
    sizes[0] += 2 * (sum(sizes) < 3)
    total = sum(sizes)
    labels = torch.randint(0, max(2, total // 2), (total,), generator=generator)
    batch = Batch(normal(total, INPUTS), normal(total, INPUTS), normal(sum(negatives), DIM), labels)
    return batch, _slices(sizes), _slices(negatives)


@functools.cache
def towers(seed: int, dtype: torch.dtype, spread: bool) -> nn.Module:
    """The model of a seed, the same wherever it is made; ``spread``: a copy wrapped for the process group."""
    model = Towers(dtype, torch.Generator().manual_seed(seed))
    return DistributedDataParallel(model) if spread else model


def _slices(sizes: list[int]) -> list[slice]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - n, end) for n, end in zip(sizes, ends, strict=True)]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def single(name: str, batch: Batch, model: nn.Module, options: dict | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The truth: the loss of the whole batch in one process, and every parameter's gradient."""
    loss = CASES[name](model, batch, options or {})
    return loss.detach(), gradients(model, loss)

"""The sizes that are measured, and with whom: one list a question, one file of tests a list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Generator

from .families import FAMILIES, Family, Inputs, Provider, Shape


@dataclass(frozen=True)
class Workload:
    """A family at a size with the providers that compute it side by side.

    ``leave_out``: providers that this size is pointless for. ``rounds``: at least so many.
    """

    family: Family
    shape: Shape
    chosen: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"{self.family.name}-{'x'.join(map(str, self.shape))}"

    def providers(self) -> dict[str, Provider]:
        """Those chosen, or ours in float32, every rival and the ceiling."""
        usual = [
            name
            for name, p in self.family.providers.items()
            if p.kind != "truth" and p.dtype is None and name not in self.leave_out
        ]
        return {name: self.family.providers[name] for name in self.chosen or usual}

    def resized(self, shape: Shape) -> Workload:
        return Workload(self.family, shape, self.chosen, self.leave_out, self.rounds)

    def inputs(self, seed: int = 0) -> Inputs:
        """float32 inputs, the same for every provider."""
        return self.family.inputs(self.shape, Generator().manual_seed(seed))

    def flops(self) -> float:
        """Useful operations, forward and backward; 0 for memory-bound work."""
        return self.family.units * self.family.unit_flops(self.shape)


def prepared(provider: Provider, family: Family, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """A provider's own leaves over the shared inputs, matrices converted to its dtype or the one given."""
    dtype = dtype or provider.dtype
    found = {}
    for name, x in inputs.items():
        x = x.detach()
        if dtype is not None and x.is_floating_point() and (x.dim() > 1 or dtype == torch.float64):
            x = x.to(dtype)
        found[name] = x.requires_grad_() if name in family.leaves else x
    return found


def _list(family: str, *shapes: Shape, **options) -> list[Workload]:
    return [Workload(FAMILIES[family], shape, **options) for shape in shapes]


SIMILARITY = [
    *_list("nt_xent", (8192, 128), (8192, 512)),
    *_list("clip", (8192, 128), (8192, 512)),
    *_list("sup_con", (8192, 128), (8192, 512)),
    *_list("info_nce", (8192, 128)),
    *_list("info_nce_queue", (4096, 65536, 128)),
    *_list("siglip", (8192, 512)),
]
SMALL = [
    *_list("nt_xent", (512, 128), (512, 512), leave_out=("pytorch-metric-learning",)),
    # It lists every pair of pairs, cubic in the rows: a thousand times slower, so it gets a size and rounds of its own.
    *_list("nt_xent", (384, 128), chosen=("cpu", "pytorch-metric-learning")),
    *_list("clip", (512, 128), (512, 512)),
    *_list("sup_con", (512, 128), (512, 512)),
    *_list("info_nce", (512, 128)),
    *_list("siglip", (512, 512)),
]
_CURVE = dict(leave_out=("pytorch-metric-learning", "product"))
SCALING = [
    *_list("nt_xent", *[(n, 128) for n in (256, 1024, 2048, 4096)], **_CURVE),
    *_list("nt_xent", (16384, 128), (32768, 128), rounds=3, **_CURVE),
]
GOODNESS = [
    *_list("pair_cosine", (64, 64, 56, 56)),
    *_list("goodness_normalize", (4096, 2048), (65536, 512)),
]
BF16 = [
    *_list("nt_xent", (8192, 256), chosen=("cpu", "cpu-bf16")),
    *_list("clip", (8192, 256), chosen=("cpu", "cpu-bf16")),
]
# Peak memory in a process of its own. The largest are for us alone: a matrix of pairs would have 2^32 entries.
_MEMORY_SIZES = (2048, 4096, 8192, 16384)
MEMORY = [
    *_list("nt_xent", *[(n, 128) for n in _MEMORY_SIZES], leave_out=("pytorch-metric-learning", "product")),
    *_list("clip", *[(n, 128) for n in _MEMORY_SIZES], leave_out=("product",)),
    *_list("sup_con", (8192, 128), (16384, 128), leave_out=("product",)),
    *_list("info_nce", (8192, 128), (16384, 128), leave_out=("product",)),
    *_list("siglip", (8192, 128), (16384, 128), leave_out=("product",)),
    *_list("nt_xent", (65536, 128), (16384, 512), chosen=("cpu",)),
    *_list("clip", (65536, 128), (16384, 512), chosen=("cpu",)),
    *_list("sup_con", (65536, 128), chosen=("cpu",)),
    *_list("info_nce", (65536, 128), chosen=("cpu",)),
    *_list("siglip", (65536, 128), chosen=("cpu",)),
    *_list("pair_cosine", (64, 64, 56, 56), leave_out=("copy",)),
    *_list("goodness_normalize", (4096, 2048), leave_out=("copy",)),
]


def cases(workloads: list[Workload]) -> pytest.MarkDecorator:
    """``@cases(SIMILARITY)``: a test for each provider of each workload, ``-k`` choosing among them."""
    return pytest.mark.parametrize(
        ("workload", "provider"),
        [pytest.param(w, name, id=f"{w.name}:{name}") for w in workloads for name in w.providers()],
    )

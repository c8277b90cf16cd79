"""The sizes that are measured, and with whom: one list a question, one file of tests a list.

A list holds the sizes of the device that this process measures on: on a GPU those of the design, on a CPU what two
cores do in seconds. A GPU measures bfloat16 where the work is a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator

from .machine import target
from .provider import Family, Inputs, Provider, Shape
from .variants import FAMILIES, NUMERICS

ON_GPU = target() == "cuda"


@dataclass(frozen=True)
class Workload:
    """A family at a size with the providers that compute it side by side.

    ``leave_out``: providers that this size is pointless for. ``rounds``: at least so many. ``dtype``: of the matrices.
    ``brief``: whether ``--brief`` measures it, as what is quick or what a bar needs. ``thorough``: whether providers
    that are take part on a CPU; on a GPU they always do.
    """

    family: Family
    shape: Shape
    chosen: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    rounds: int = 5
    dtype: torch.dtype | None = None
    brief: bool = True
    thorough: bool = False

    @property
    def name(self) -> str:
        return f"{self.family.name}-{'x'.join(map(str, self.shape))}"

    def providers(self) -> dict[str, Provider]:
        """Those chosen, or ours in float32, every rival and the ceiling; of either those that this device runs."""
        usual = [
            name
            for name, p in self.family.providers.items()
            if p.kind != "truth"
            and p.dtype is None
            and name not in self.leave_out
            and (self.thorough or ON_GPU or not p.thorough)
        ]
        found = {name: self.family.providers[name] for name in self.chosen or usual}
        return {name: p for name, p in found.items() if target() in p.devices}

    def resized(self, shape: Shape) -> Workload:
        return replace(self, shape=shape)

    def inputs(self, seed: int = 0) -> Inputs:
        """float32 inputs, the same for every provider."""
        return self.family.inputs(self.shape, Generator(target()).manual_seed(seed))

    def flops(self) -> float:
        """Useful operations, forward and backward; 0 for memory-bound work."""
        return self.family.units * self.family.unit_flops(self.shape)


def prepared(
    provider: Provider,
    family: Family,
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    usual: torch.dtype | None = None,
) -> Inputs:
    """A provider's own leaves over the shared inputs, matrices in ``dtype``, or its own, or ``usual``."""
    dtype = dtype or provider.dtype or usual
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
    *_list("sup_con", (8192, 128)),
    *_list("sup_con", (8192, 512), brief=False),
    *_list("info_nce", (8192, 128)),
    *_list("info_nce_queue", (4096, 65536, 128), brief=False),
    *_list("siglip", (8192, 512), brief=False),
]
# What the design measures on a GPU, at sizes for two cores.
_WIDE = dict(leave_out=("panels",), rounds=3)
_LONG = dict(**_WIDE, brief=False)
WIDE = [
    *_list("clip", (2048, 768), (2048, 1024), **_LONG),
    *_list("info_nce_queue", (512, 16384, 768), **_LONG),
    *_list("siglip", (2048, 768), **_LONG),
    *_list("sup_con_1000", (4096, 128), **_LONG),
    *_list("sup_con_n", (4096, 128), **_LONG),
    *_list("sup_con_lonely", (4096, 128), **_LONG),
]
RAGGED = [
    *_list("clip", (3001, 96), (3001, 200), (3001, 384), (1501, 1152), **_WIDE),
    *_list("nt_xent", (3002, 96), (3002, 200), leave_out=("panels", "pytorch-metric-learning"), rounds=3),
]
_COMPARED = ("cpu", "cpu-bf16", "triton", "cuda", "panels", "open_clip")
ACCURACY = [
    Workload(family, (509, 2048) if "far" in name else (1021, 256), chosen=_COMPARED, rounds=3)
    for name, family in NUMERICS.items()
]
SMALL = [
    *_list("nt_xent", (128, 512), (512, 128), (512, 512), leave_out=("pytorch-metric-learning",)),
    # It lists every pair of pairs, cubic in the rows: a thousand times slower, so it gets a size and rounds of its own.
    *_list("nt_xent", (384, 128), chosen=("cpu", "pytorch-metric-learning")),
    *_list("clip", (128, 512), (512, 128), (512, 512)),
    *_list("sup_con", (512, 128), (512, 512)),
    *_list("info_nce", (512, 128)),
    *_list("siglip", (128, 512), (512, 512)),
]
_CURVE = dict(leave_out=("pytorch-metric-learning", "product"))
SCALING = [
    *_list("nt_xent", *[(n, 128) for n in (256, 1024, 2048, 4096)], **_CURVE),
    *_list("nt_xent", (16384, 128), (32768, 128), rounds=3, brief=False, **_CURVE),
]
_RESNET = ((128, 28, 28), (256, 14, 14), (512, 7, 7))  # ResNet-18's activations at 224 pixels, after the first stage
GOODNESS = [
    *_list("pair_cosine", (64, 64, 56, 56), *[(64, *maps) for maps in _RESNET]),
    *_list("pair_cosine_nhwc", (64, 64, 56, 56)),
    *_list("pool_goodness", (64, 64, 56, 56)),
    *_list("pool_goodness_nhwc", (64, 64, 56, 56)),
    *_list("goodness_normalize", (4096, 2048), (8192, 1024), (2048, 4096)),
    *_list("goodness_normalize", (65536, 512), brief=False),
    *_list("layerwise", (256,), (2048,), (8192,)),
    *_list("unit_rows", (8192, 512)),
    *_list("linear_goodness", (4096, 1024, 784)),
]
BF16 = [
    *_list("nt_xent", (1024, 512), (8192, 256), chosen=("cpu", "cpu-bf16", "lightly-bf16")),
    *_list("clip", (1024, 512), (8192, 256), chosen=("cpu", "cpu-bf16", "open_clip-bf16")),
]
# Peak memory in a process of its own. The largest are for us alone: a matrix of pairs would have 2^32 entries.
_OTHERS = ("product", "panels")  # a process takes seconds: NT-Xent shows what the panels take
_NT_XENT = ("pytorch-metric-learning", "product")
MEMORY = [
    *_list("nt_xent", (2048, 128), (4096, 128), leave_out=_NT_XENT, brief=False),
    *_list("nt_xent", (8192, 128), leave_out=_NT_XENT),
    *_list("nt_xent", (16384, 128), chosen=("panels",), brief=False),
    *_list("clip", (2048, 128), (4096, 128), (8192, 128), leave_out=_OTHERS, brief=False),
    *(w for f in ("sup_con", "info_nce", "siglip") for w in _list(f, (8192, 128), leave_out=_OTHERS, brief=False)),
    # Of the rivals a process takes half a minute here.
    *(
        w
        for family in ("nt_xent", "clip", "sup_con", "info_nce", "siglip")
        for w in (
            *_list(family, (16384, 128), chosen=("cpu",)),
            *_list(family, (16384, 128), leave_out=("cpu", *_OTHERS, *_NT_XENT), brief=False),
        )
    ),
    *_list("nt_xent", (16384, 512), chosen=("cpu",)),
    *_list("clip", (16384, 512), chosen=("cpu",)),
    *(
        w
        for family in ("nt_xent", "clip", "sup_con", "info_nce", "siglip")
        for w in _list(family, (65536, 128), chosen=("cpu",), brief=False)
    ),
    *_list("pair_cosine", (64, 64, 56, 56), leave_out=("copy",)),
    *_list("goodness_normalize", (4096, 2048), leave_out=("copy",)),
]

SIMILARITY, SMALL, GOODNESS = (
    [replace(workload, thorough=True) for workload in question] for question in (SIMILARITY, SMALL, GOODNESS)
)

if ON_GPU:
    from . import gpu_sizes

    SIMILARITY, WIDE, RAGGED, SMALL, SCALING, GOODNESS = (
        [Workload(FAMILIES[family], shape, **options) for family, shape, options in question]
        for question in gpu_sizes.QUESTIONS
    )
    BF16, MEMORY = [], []  # bfloat16 is the rule there, and every timed run measures its peak memory

TIMED = (SIMILARITY, WIDE, RAGGED, ACCURACY, SMALL, SCALING, GOODNESS, BF16)

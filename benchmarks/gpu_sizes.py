"""The sizes that a GPU measures, those of the bars: (family, shape, options) by question."""

from __future__ import annotations

from typing import Any

import torch

from .provider import Shape

Sizes = list[tuple[str, Shape, dict[str, Any]]]

_BF16 = dict(dtype=torch.bfloat16)
# from here on a rival's matrix of pairs has 2^34 entries and more: they are run, and their failure is the row
_HUGE = dict(dtype=torch.bfloat16, rounds=3)
# pytorch-metric-learning lists pairs of pairs
_NT_XENT = dict(dtype=torch.bfloat16, leave_out=("pytorch-metric-learning",))
_ALONE = dict(dtype=torch.bfloat16, rounds=3, chosen=("triton", "cuda", "memeff", "product 8192"))


def _each(family: str, shapes: list[Shape], options: dict[str, Any]) -> Sizes:
    return [(family, shape, options) for shape in shapes]


SIMILARITY = [
    *_each("clip", [(4096, 512), (8192, 512), (32768, 512), (65536, 512)], _BF16),
    *_each("clip", [(32768, 128)], _BF16),  # what the triangle is compared with
    *_each("clip", [(131072, 512), (262144, 512)], _HUGE),
    *_each("clip", [(1 << 20, 512)], _ALONE),
    *_each("info_nce_queue", [(4096, 65536, 128), (8192, 262144, 768)], _BF16),
    *_each("sup_con", [(32768, 128)], _BF16),
    *_each("siglip", [(65536, 768)], _BF16),
]
WIDE = [
    *_each("clip", [(32768, 768), (32768, 1024), (65536, 768), (65536, 1024)], _BF16),
    *_each("sup_con_1000", [(32768, 128)], _BF16),
    *_each("sup_con_n", [(32768, 128)], _BF16),
    *_each("sup_con_lonely", [(32768, 128)], _BF16),
]
RAGGED = [
    *_each("clip", [(30011, 96), (30011, 200), (30011, 384), (30011, 1152)], _BF16),
    *_each("nt_xent", [(30010, 96), (30010, 200)], _NT_XENT),
]
SMALL = [
    *_each("nt_xent", [(512, 128), (512, 512)], _NT_XENT),
    *_each("clip", [(512, 128), (512, 512)], _BF16),
    *_each("sup_con", [(512, 128), (512, 512)], _BF16),
]
SCALING = [
    *_each("nt_xent", [(n, 128) for n in (1024, 4096, 8192, 16384, 32768)], _NT_XENT),
    *_each("nt_xent", [(131072, 128)], _NT_XENT | _HUGE),
    *_each("nt_xent", [(8192, 256), (32768, 256), (131072, 256)], _NT_XENT),
]
_RESNET = [(n, *maps) for n in (64, 512) for maps in ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))]
GOODNESS = [
    *(
        size
        for family in ("pair_cosine", "pair_cosine_nhwc", "pool_goodness", "pool_goodness_nhwc")
        for size in _each(family, _RESNET, {})
    ),
    *_each("goodness_normalize", [(65536, d) for d in (512, 1024, 2048, 4096)], {}),
    *_each("layerwise", [(256,), (1024,), (8192,)], {}),
    *_each("unit_rows", [(65536, 512)], {}),
    *_each("linear_goodness", [(32768, 2048, 2048)], _BF16),
]
QUESTIONS: tuple[Sizes, ...] = (SIMILARITY, WIDE, RAGGED, SMALL, SCALING, GOODNESS)

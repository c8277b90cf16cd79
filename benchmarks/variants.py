"""Families made from those of families.py: other classes, geometries, temperatures, memory layouts, whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import ffcl_fast as ff
from ffcl_fast.functional import linear_goodness, pool_goodness
from ffcl_fast.functional.similarity import normalized

from . import families
from .families import CLIP, GOODNESS_NORMALIZE, PAIR_COSINE, SUP_CON, copy, elements, fewer, ours, product
from .gpu_rivals import product_8192
from .provider import Family, Function, Inputs, Provider, Shape

# --- SupCon: shape (2N, D); other numbers of classes, and rows without a positive ------------------------------------


def _sup_con(name: str, title: str, classes: Callable[[int], int]) -> Family:
    def inputs(shape: Shape, random: Generator) -> Inputs:
        found = SUP_CON.inputs(shape, random)
        n = shape[0] // 2
        return found | {"labels": torch.randint(0, classes(n), (n,), generator=random, device=random.device)}

    return replace(SUP_CON, name=name, title=title, inputs=inputs)


def _one_view(shape: Shape, random: Generator) -> Inputs:
    n, d = shape
    features = F.normalize(torch.randn(n, 1, d, generator=random, device=random.device), dim=2)
    return {
        "features": features,
        # about a third of the rows are alone in their class
        "labels": torch.randint(0, n, (n,), generator=random, device=random.device),
    }


def _metric_learning_one_view() -> Function:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(0.07)
    return lambda x: loss(x["features"].flatten(0, 1), x["labels"])


_PML = "pytorch-metric-learning"
SUP_CON_1000 = _sup_con("sup_con_1000", "SupCon, 1000 classes", lambda n: 1000)
SUP_CON_N = _sup_con("sup_con_n", "SupCon, as many classes as samples", lambda n: n)
SUP_CON_LONELY = replace(
    SUP_CON,
    name="sup_con_lonely",
    title="SupCon, one view, rows without a positive",
    inputs=_one_view,
    # SupContrast's formulation divides by zero here
    providers={name: p for name, p in SUP_CON.providers.items() if p.kind != "rival"}
    | {_PML: replace(SUP_CON.providers[_PML], build=_metric_learning_one_view)},
)

# --- numerics: shape (N, D), CLIP's loss at a temperature on embeddings of a geometry --------------------------------

TEMPERATURES = (0.01, 0.07, 0.5)
GEOMETRIES = ("isotropic", "cone", "far")


def _embeddings(geometry: str, temperature: float) -> Callable[[Shape, Generator], Inputs]:
    def inputs(shape: Shape, random: Generator) -> Inputs:
        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=random.device)

        image = draw(*shape)
        # far: nothing matches, so that the best cosine of a wide row is under 0.1
        text = draw(*shape) if geometry == "far" else image + draw(*shape)
        if geometry == "cone":
            mean = 2 * draw(1, shape[1])
            image, text = image + mean, text + mean
        scale = torch.tensor(math.log(1 / temperature), device=random.device)
        return {"image": F.normalize(image, dim=1), "text": F.normalize(text, dim=1), "log_scale": scale}

    return inputs


def numerics_name(geometry: str, temperature: float) -> str:
    return f"clip_{geometry}_{temperature:g}"


_ACCURATE = ("cpu", "triton", "cuda", "panels", "cpu-bf16", "reference", "open_clip")
NUMERICS = {
    numerics_name(geometry, temperature): replace(
        CLIP,
        name=numerics_name(geometry, temperature),
        title=f"CLIP, {geometry} embeddings, temperature {temperature:g}",
        inputs=_embeddings(geometry, temperature),
        providers={name: CLIP.providers[name] for name in _ACCURATE},
        check=lambda shape: shape,
    )
    for geometry in GEOMETRIES
    for temperature in TEMPERATURES
}

# --- activations: shape (N, C, H, W) in both memory layouts ----------------------------------------------------------


def channels_last(family: Family) -> Family:
    def inputs(shape: Shape, random: Generator) -> Inputs:
        found = family.inputs(shape, random)
        return {k: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for k, x in found.items()}

    return replace(family, name=f"{family.name}_nhwc", title=f"{family.title}, channels last", inputs=inputs)


def _maps(shape: Shape, random: Generator) -> Inputs:
    n, c = shape[:2]
    return {
        "x": torch.randn(shape, generator=random, device=random.device),
        "grad_goodness": torch.randn(n, generator=random, device=random.device),
        "grad_pooled": torch.randn(n, c, generator=random, device=random.device),
    }


def _our_pool(backend: str) -> Function:
    return lambda x: pool_goodness(x["x"], "mean_squares", backend=backend)


def _eager_pool(x: Inputs) -> tuple[Tensor, Tensor]:
    pooled = x["x"].mean((2, 3))
    return pooled.square().mean(1), pooled


POOL_GOODNESS = Family(
    name="pool_goodness",
    title="Global average pool + goodness",
    inputs=_maps,
    leaves=("x",),
    providers=ours(_our_pool) | {"eager": Provider("rival", "plain PyTorch", lambda: _eager_pool), "copy": copy("x")},
    units=0,
    unit_flops=elements(0),
    useful_bytes=elements(2),  # read once forward, its gradient written once
    ceiling_bytes=elements(2),
    quick=(6, 4, 5, 5),
    check=fewer(16),
    upstream=lambda x: (x["grad_goodness"], x["grad_pooled"]),
)

# --- layerwise: shape (N,), the eight blocks of ResNet-18 pooled to their channels, positive and negative samples ----

WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)
_LAYERS = range(len(WIDTHS))


def _layers(shape: Shape, random: Generator) -> Inputs:
    return {
        f"{side}{i}": torch.randn(shape[0], WIDTHS[i], generator=random, device=random.device)
        for side in ("positive", "negative")
        for i in _LAYERS
    }


def _sides(x: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    return [x[f"positive{i}"] for i in _LAYERS], [x[f"negative{i}"] for i in _LAYERS]


def _our_layerwise(backend: str) -> Function:
    loss = ff.LayerwiseLoss(ff.GoodnessLoss("mean_squares", backend=backend))
    return lambda x: loss(*_sides(x))


def _eager_layerwise(x: Inputs) -> Tensor:
    total = x["positive0"].new_zeros(())
    for positive, negative in zip(*_sides(x), strict=True):
        good, bad = positive.square().mean(1), negative.square().mean(1)
        total = total + (F.softplus(2 - good).sum() + F.softplus(bad - 2).sum()) / (2 * len(good))
    return total


def _layer_bytes(factor: float) -> Callable[[Shape], float]:
    return lambda shape: 4.0 * factor * 2 * shape[0] * sum(WIDTHS)


def _copy_layers() -> Function:
    out: list[Tensor] = []

    def run(x: Inputs) -> Tensor:
        positive, negative = _sides(x)
        if not out:
            out.extend(torch.empty_like(h) for h in (*positive, *negative))
        for to, h in zip(out, (*positive, *negative), strict=True):
            to.copy_(h.detach())
        return out[0]

    return run


LAYERWISE = Family(
    name="layerwise",
    title="Layerwise goodness, ResNet-18's eight blocks at once",
    inputs=_layers,
    leaves=tuple(f"{side}{i}" for side in ("positive", "negative") for i in _LAYERS),
    providers=ours(_our_layerwise)
    | {
        "eager": Provider("rival", "plain PyTorch, layer by layer", lambda: _eager_layerwise),
        "copy": Provider("ceiling", "Tensor.copy_, layer by layer", _copy_layers),
    },
    units=0,
    unit_flops=elements(0),
    useful_bytes=_layer_bytes(3),  # read forward, read and written backward
    ceiling_bytes=_layer_bytes(2),
    quick=(6,),
    check=fewer(256),
)

# --- one kernel each beside Forward-Forward's: shape (N, D); (N, H, D) for a layer of H units on D inputs ------------


def _our_unit_rows(backend: str) -> Function:
    return lambda x: normalized(x["x"], x["x"].dtype, backend=backend)


UNIT_ROWS = replace(
    GOODNESS_NORMALIZE,  # the same rows and upstream gradient, the same bytes
    name="unit_rows",
    title="L2-normalisation",
    providers={name: p for name, p in ours(_our_unit_rows).items() if name in ("triton", "panels", "reference")}
    | {
        "cpu": Provider("ours", "ffcl_fast, plain PyTorch", lambda: _our_unit_rows("cpu"), devices=("cpu",)),
        "eager": Provider("rival", "torch.nn.functional.normalize", lambda: lambda x: F.normalize(x["x"], dim=1)),
        "copy": copy("x"),
    },
    upstream=lambda x: (x["grad_out"],),
)


def _layer(shape: Shape, random: Generator) -> Inputs:
    n, units, d = shape
    sizes = {"x": (n, d), "weight": (units, d), "grad_goodness": (n,)}
    return {name: torch.randn(size, generator=random, device=random.device) for name, size in sizes.items()}


def _our_linear_goodness(backend: str) -> Function:
    return lambda x: linear_goodness(x["x"], x["weight"], relu=True, backend=backend)


def _eager_linear_goodness(x: Inputs) -> Tensor:
    return F.linear(x["x"], x["weight"]).relu().float().square().sum(1)


LINEAR_GOODNESS = Family(
    name="linear_goodness",
    title="Linear layer + ReLU + goodness, activation not stored",
    inputs=_layer,
    leaves=("x", "weight"),
    providers={name: p for name, p in ours(_our_linear_goodness).items() if name != "cuda"}
    | {
        "eager": Provider("rival", "plain PyTorch", lambda: _eager_linear_goodness),
        "product": product("x", "weight"),
        "product 8192": product_8192(),
    },
    units=4,  # the layer's product twice, the gradients of its inputs and of its weight
    forward_units=1,
    unit_flops=lambda shape: 2.0 * math.prod(shape),
    quick=(12, 20, 24),
    check=fewer(512),
    upstream=lambda x: (x["grad_goodness"],),
)

FAMILIES: dict[str, Family] = families.FAMILIES | NUMERICS | {
    family.name: family
    for family in (
        SUP_CON_1000, SUP_CON_N, SUP_CON_LONELY, channels_last(PAIR_COSINE), POOL_GOODNESS,
        channels_last(POOL_GOODNESS), LAYERWISE, UNIT_ROWS, LINEAR_GOODNESS,
    )
}  # fmt: skip

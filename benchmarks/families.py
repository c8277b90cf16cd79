"""What is measured: for each loss its inputs, our backends, its rivals, and the work that counts as useful.

A provider is built when it is first used, so a library that is not installed is one missing row. Units are those of
similarity.md: one unit U is one matrix product over all pairs, 2 N M D operations, and a loss counts the units that our
design needs, forward and backward, whoever computes it. Memory-bound work counts each input read and each output
written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import ffcl_fast as ff
from ffcl_fast.functional.goodness import goodness_and_normalize

from . import gpu_rivals, plain
from .gpu_rivals import compiled, product_8192
from .provider import Family, Function, Inputs, Outputs, Provider, Shape

__all__ = ["FAMILIES", "Family", "Function", "Inputs", "Outputs", "Provider", "Shape"]


def ours(make: Callable[[str], Function]) -> dict[str, Provider]:
    """Our backends, and the same kernels on 16-bit inputs."""
    return {
        "cpu": Provider("ours", "ffcl_fast, C++ kernels", lambda: make("cpu"), devices=("cpu",)),
        "triton": Provider("ours", "ffcl_fast, Triton kernels", lambda: make("triton"), devices=("cuda",)),
        "cuda": Provider("ours", "ffcl_fast, CUDA kernels", lambda: make("cuda"), devices=("cuda",)),
        "panels": Provider("ours", "ffcl_fast, plain PyTorch over row panels", lambda: make("panels")),
        "cpu-bf16": Provider(
            "ours", "ffcl_fast, C++ kernels, bfloat16 inputs", lambda: make("cpu"), torch.bfloat16, devices=("cpu",)
        ),
        "reference": Provider("truth", "ffcl_fast.reference", lambda: make("reference")),
    }


def in_bf16(what: str, build: Callable[[], Function]) -> Provider:
    return Provider("rival", f"{what}, bfloat16 inputs", build, torch.bfloat16, devices=("cpu",))


def fewer(rows: int) -> Callable[[Shape], Shape]:
    return lambda shape: (min(shape[0], rows), *shape[1:])


def product(q: str, k: str) -> Provider:
    """One product over all pairs into memory that is there already: the rate this machine's own library reaches."""

    def build() -> Function:
        out = torch.empty(0)

        def run(x: Inputs) -> Tensor:
            nonlocal out
            a, b = x[q].detach().flatten(0, -2), x[k].detach().flatten(0, -2)
            if out.numel() == 0:
                out = a.new_zeros(a.shape[0], b.shape[0])
            return torch.mm(a, b.T, out=out)

        return run

    return Provider("ceiling", "torch.mm, one unit", build, devices=("cpu",))


def copy(name: str) -> Provider:
    def build() -> Function:
        out = torch.empty(0)

        def run(x: Inputs) -> Tensor:
            nonlocal out
            if out.numel() == 0:
                out = torch.zeros_like(x[name].detach())
            return out.copy_(x[name].detach())

        return run

    return Provider("ceiling", "Tensor.copy_", build)


def pairs(shape: Shape) -> float:
    return 2.0 * shape[0] * shape[0] * shape[-1]


# --- NT-Xent: shape (2N, D), rows of both views ----------------------------------------------------------------------


def _nt_xent_inputs(shape: Shape, random: Generator) -> Inputs:
    n, d = shape[0] // 2, shape[1]
    out0 = torch.randn(n, d, generator=random, device=random.device)
    return {"out0": out0, "out1": out0 + 0.5 * torch.randn(n, d, generator=random, device=random.device)}


def _lightly() -> Function:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(0.5)
    return lambda x: loss(x["out0"], x["out1"])


def _metric_learning_nt_xent() -> Function:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(0.5)

    def run(x: Inputs) -> Tensor:
        labels = torch.arange(x["out0"].shape[0], device=x["out0"].device).repeat(2)
        return loss(torch.cat((x["out0"], x["out1"])), labels)

    return run


def _own_product() -> Provider:
    """The product of all rows of both views with themselves."""

    def build() -> Function:
        run, stacked = product("z", "z").build(), {}

        def call(x: Inputs) -> Outputs:
            if not stacked:
                stacked["z"] = torch.cat((x["out0"].detach(), x["out1"].detach()))
            return run(stacked)

        return call

    return Provider("ceiling", "torch.mm, one unit", build, devices=("cpu",))


def _our_nt_xent(backend: str) -> Function:
    loss = ff.NTXentLoss(0.5, backend=backend)
    return lambda x: loss(x["out0"], x["out1"])


NT_XENT = Family(
    name="nt_xent",
    title="NT-Xent",
    inputs=_nt_xent_inputs,
    leaves=("out0", "out1"),
    providers=ours(_our_nt_xent)
    | {
        "lightly": Provider("rival", "lightly.loss.NTXentLoss", _lightly),
        "pytorch-metric-learning": Provider(
            "rival", "pytorch_metric_learning.losses.NTXentLoss", _metric_learning_nt_xent
        ),
        "lightly, compiled": compiled("lightly.loss.NTXentLoss", _lightly),
        "lightly-bf16": in_bf16("lightly.loss.NTXentLoss", _lightly),
        "product": _own_product(),
        "product 8192": product_8192(),
    },
    units=2,
    forward_units=0.5,
    unit_flops=pairs,
    quick=(96, 24),
    check=fewer(2048),
)

# --- CLIP and SigLIP: shape (N, D) -----------------------------------------------------------------------------------


def _clip_inputs(shape: Shape, random: Generator) -> Inputs:
    image, text = (torch.randn(shape, generator=random, device=random.device) for _ in range(2))
    return {
        "image": F.normalize(image, dim=1),
        "text": F.normalize(image + text, dim=1),
        "log_scale": torch.tensor(math.log(1 / 0.07), device=random.device),
        "bias": torch.tensor(-10.0, device=random.device),
    }


def _open_clip() -> Function:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda x: loss(x["image"], x["text"], x["log_scale"].exp())


def _open_siglip() -> Function:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda x: loss(x["image"], x["text"], x["log_scale"].exp(), x["bias"])


def _our_clip(backend: str) -> Function:
    loss = ff.ClipLoss(backend=backend)
    return lambda x: loss(x["image"], x["text"], x["log_scale"].exp())


def _our_siglip(backend: str) -> Function:
    loss = ff.SigLipLoss(backend=backend)
    return lambda x: loss(x["image"], x["text"], x["log_scale"].exp(), x["bias"])


CLIP = Family(
    name="clip",
    title="CLIP, learnable scale",
    inputs=_clip_inputs,
    leaves=("image", "text", "log_scale"),
    providers=ours(_our_clip)
    | {
        "open_clip": Provider("rival", "open_clip.ClipLoss", _open_clip),
        "open_clip, compiled": compiled("open_clip.ClipLoss", _open_clip),
        "open_clip-bf16": in_bf16("open_clip.ClipLoss", _open_clip),
        **gpu_rivals.CLIP,
        "product": product("image", "text"),
        "product 8192": product_8192(),
    },
    units=4,
    forward_units=1,
    unit_flops=pairs,
    quick=(80, 24),
    check=fewer(2048),
)

SIGLIP = Family(
    name="siglip",
    title="SigLIP, learnable scale and bias",
    inputs=_clip_inputs,
    leaves=("image", "text", "log_scale", "bias"),
    providers=ours(_our_siglip)
    | {
        "open_clip": Provider("rival", "open_clip.SigLipLoss", _open_siglip),
        "open_clip, compiled": compiled("open_clip.SigLipLoss", _open_siglip),
        **gpu_rivals.SIGLIP,
        "product": product("image", "text"),
        "product 8192": product_8192(),
    },
    units=3,
    forward_units=1,
    unit_flops=pairs,
    quick=(80, 24),
    check=fewer(2048),
)

# --- SupCon: shape (2N, D), two views, ten classes -------------------------------------------------------------------


def _sup_con_inputs(shape: Shape, random: Generator) -> Inputs:
    n, d = shape[0] // 2, shape[1]
    labels = torch.randint(0, 10, (n,), generator=random, device=random.device)
    centres = torch.randn(10, 1, d, generator=random, device=random.device)
    features = F.normalize(0.5 * centres[labels] + torch.randn(n, 2, d, generator=random, device=random.device), dim=2)
    return {"features": features, "labels": labels}


def _metric_learning_sup_con() -> Function:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(0.07)
    return lambda x: loss(x["features"].flatten(0, 1), x["labels"].repeat_interleave(2))


def _our_sup_con(backend: str) -> Function:
    loss = ff.SupConLoss(0.07, backend=backend)
    return lambda x: loss(x["features"], x["labels"])


SUP_CON = Family(
    name="sup_con",
    title="SupCon, 10 classes",
    inputs=_sup_con_inputs,
    leaves=("features",),
    providers=ours(_our_sup_con)
    | {
        "SupContrast": Provider(
            "rival", "SupContrast's formulation in plain PyTorch", lambda: lambda x: plain.sup_con(**x)
        ),
        "SupContrast, compiled": compiled(
            "SupContrast's formulation in plain PyTorch", lambda: lambda x: plain.sup_con(**x)
        ),
        "pytorch-metric-learning": Provider(
            "rival",
            "pytorch_metric_learning.losses.SupConLoss",
            _metric_learning_sup_con,
            own_definition=True,  # it differentiates through a normalisation of its own
        ),
        "product": product("features", "features"),
        "product 8192": product_8192(),
    },
    units=2,
    forward_units=0.5,
    unit_flops=pairs,
    quick=(96, 24),
    check=fewer(2048),
)

# --- InfoNCE: shape (N, D), or (N, M, D) with a queue of M negatives -------------------------------------------------


def _info_nce_inputs(shape: Shape, random: Generator) -> Inputs:
    n, d = shape[0], shape[-1]
    query = torch.randn(n, d, generator=random, device=random.device)
    inputs = {"query": query, "key": query + torch.randn(n, d, generator=random, device=random.device)}
    if len(shape) == 3:
        inputs["queue"] = torch.randn(shape[1], d, generator=random, device=random.device)
    return inputs


def _info_nce() -> Function:
    from info_nce import InfoNCE

    loss = InfoNCE(0.1)
    return lambda x: loss(x["query"], x["key"], x.get("queue"))


def _our_info_nce(backend: str) -> Function:
    loss = ff.InfoNCELoss(0.1, backend=backend)
    return lambda x: loss(x["query"], x["key"], x.get("queue"))


_INFO_NCE = dict(
    inputs=_info_nce_inputs,
    leaves=("query", "key"),  # a queue gets no gradient
)
_INFO_NCE_RIVAL = {
    "info-nce-pytorch": Provider("rival", "info_nce.InfoNCE", _info_nce),
    "info-nce-pytorch, compiled": compiled("info_nce.InfoNCE", _info_nce),
    "product 8192": product_8192(),
}
INFO_NCE = Family(
    name="info_nce",
    title="InfoNCE, negatives in the batch",
    providers=ours(_our_info_nce) | _INFO_NCE_RIVAL | {"product": product("query", "key")},
    units=4,
    forward_units=1,
    unit_flops=pairs,
    quick=(80, 24),
    check=fewer(2048),
    **_INFO_NCE,
)
INFO_NCE_QUEUE = Family(
    name="info_nce_queue",
    title="InfoNCE, queue of negatives",
    providers=ours(_our_info_nce) | _INFO_NCE_RIVAL | {"product": product("query", "queue")},
    units=3,  # the queue needs no gradient
    forward_units=1,
    unit_flops=lambda shape: 2.0 * math.prod(shape),
    quick=(40, 100, 24),
    check=lambda shape: (min(shape[0], 512), min(shape[1], 4096), shape[2]),
    **_INFO_NCE,
)

# --- goodness family: memory-bound -----------------------------------------------------------------------------------


def _pair_cosine_inputs(shape: Shape, random: Generator) -> Inputs:
    h1 = torch.randn(shape, generator=random, device=random.device)
    target = torch.randint(0, 2, shape[:1], generator=random, device=random.device) * 2 - 1
    return {"h1": h1, "h2": h1 + torch.randn(shape, generator=random, device=random.device), "target": target}


def _cosine_embedding() -> Function:
    loss = torch.nn.CosineEmbeddingLoss()
    return lambda x: loss(x["h1"].flatten(1), x["h2"].flatten(1), x["target"])


def _our_pair_cosine(backend: str) -> Function:
    loss = ff.PairCosineLoss(backend=backend)
    return lambda x: loss(x["h1"], x["h2"], x["target"])


def elements(factor: float) -> Callable[[Shape], float]:
    return lambda shape: 4.0 * factor * math.prod(shape)


PAIR_COSINE = Family(
    name="pair_cosine",
    title="Pair cosine",
    inputs=_pair_cosine_inputs,
    leaves=("h1", "h2"),
    providers=ours(_our_pair_cosine)
    | {
        "CosineEmbeddingLoss": Provider("rival", "torch.nn.CosineEmbeddingLoss", _cosine_embedding),
        "CosineEmbeddingLoss, compiled": compiled("torch.nn.CosineEmbeddingLoss", _cosine_embedding),
        "copy": copy("h1"),
    },
    units=0,
    unit_flops=elements(0),
    useful_bytes=elements(4),  # two read, two gradients written
    ceiling_bytes=elements(2),
    quick=(6, 4, 5, 5),
    check=fewer(16),
)


def _activation_inputs(shape: Shape, random: Generator) -> Inputs:
    names = ("x", "grad_out")
    inputs = {name: torch.randn(shape, generator=random, device=random.device) for name in names}
    return inputs | {"grad_goodness": torch.randn(shape[:1], generator=random, device=random.device)}


def _our_goodness_normalize(backend: str) -> Function:
    return lambda x: goodness_and_normalize(x["x"], "mean_squares", relu=True, backend=backend)


GOODNESS_NORMALIZE = Family(
    name="goodness_normalize",
    title="ReLU + goodness + normalise",
    inputs=_activation_inputs,
    leaves=("x",),
    providers=ours(_our_goodness_normalize)
    | {
        "eager": Provider(
            "rival", "plain PyTorch, as Forward-Forward codes do", lambda: lambda x: plain.goodness_normalize(x["x"])
        ),
        "eager, compiled": compiled("plain PyTorch", lambda: lambda x: plain.goodness_normalize(x["x"])),
        "eager, shared": Provider(
            "rival",
            "plain PyTorch, the norm taken from the goodness",
            lambda: lambda x: plain.goodness_normalize_shared(x["x"]),
        ),
        "copy": copy("x"),
    },
    units=0,
    unit_flops=elements(0),
    useful_bytes=elements(5),  # x read and h written, then x and h's gradient read and x's written
    ceiling_bytes=elements(2),
    quick=(12, 40),
    check=fewer(512),
    upstream=lambda x: (x["grad_goodness"], x["grad_out"]),
)

FAMILIES = {
    family.name: family
    for family in (
        NT_XENT, CLIP, SUP_CON, INFO_NCE, INFO_NCE_QUEUE, SIGLIP, PAIR_COSINE, GOODNESS_NORMALIZE,
    )
}  # fmt: skip

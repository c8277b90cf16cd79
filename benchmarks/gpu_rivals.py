"""Rivals that need a CUDA GPU, and those that PyTorch itself has. Each imports when it is first called: several import
on a CPU and fail only then."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .provider import Function, Inputs, Provider

_GPU = ("cuda",)
Side = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows, columns, labels -> mean cross-entropy of the rows


def compiled(what: str, build: Callable[[], Function]) -> Provider:
    """What people use today under ``torch.compile``, for each size on its own: of a second shape, here that of the
    comparison with float64, it would otherwise make a slower function for all."""
    make = lambda: torch.compile(build(), dynamic=False)  # noqa: E731
    return Provider("rival", f"{what} under torch.compile", make, thorough=True)


def _both_sides(make: Callable[[], Side]) -> Callable[[], Function]:
    """A one-sided fused cross-entropy called once for each side of CLIP's loss."""

    def build() -> Function:
        side = make()

        def run(x: Inputs) -> Tensor:
            scale, labels = x["log_scale"].exp(), torch.arange(x["image"].shape[0], device=x["image"].device)
            image, text = x["image"], x["text"]
            return (side((scale * image).to(image.dtype), text, labels)
                    + side((scale * text).to(text.dtype), image, labels)) / 2  # fmt: skip

        return run

    return build


def _cut_cross_entropy() -> Side:
    from cut_cross_entropy import linear_cross_entropy

    # no filter: by default gradients of small probabilities are dropped
    return lambda rows, cols, labels: linear_cross_entropy(rows, cols, labels, impl="cce", filter_eps=None)


def _liger() -> Side:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda rows, cols, labels: loss(cols, rows, labels)


def _quack() -> Side:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def _inf_cl() -> Side:
    from inf_cl import cal_inf_loss

    def side(rows: Tensor, cols: Tensor, labels: Tensor) -> Tensor:
        return cal_inf_loss(rows, cols, labels, scale=rows.new_ones(()), head_dim=256).mean()

    return side


def _linear_cross_entropy() -> Side:
    from torch.nn.functional import linear_cross_entropy

    return linear_cross_entropy


def _memeff() -> Function:
    from memeff import MemoryEfficientCLIPLoss

    # no gradient for the temperature; its default `stable=True` rescales the gradients
    loss = MemoryEfficientCLIPLoss(temperature=0.07, normalized_inputs=True, stable=False)
    return lambda x: loss(x["image"], x["text"])


def _siglip_kernel() -> Function:
    from siglip_kernel import fused_siglip_loss

    return lambda x: fused_siglip_loss(x["image"], x["text"], x["log_scale"], x["bias"])


CLIP = {
    "memeff": Provider("rival", "memeff.MemoryEfficientCLIPLoss, stable=False", _memeff, devices=_GPU),
    "inf-cl": Provider("rival", "inf_cl.cal_inf_loss, both sides", _both_sides(_inf_cl), devices=_GPU),
    "quack": Provider("rival", "quack chunked_linear_cross_entropy, both sides", _both_sides(_quack), devices=_GPU),
    "cut-cross-entropy": Provider(
        "rival", "cut_cross_entropy without its filter, both sides", _both_sides(_cut_cross_entropy), devices=_GPU
    ),
    "liger": Provider("rival", "LigerFusedLinearCrossEntropyLoss, both sides", _both_sides(_liger), devices=_GPU),
    "linear_cross_entropy": Provider(
        "rival", "torch.nn.functional.linear_cross_entropy", _both_sides(_linear_cross_entropy), thorough=True
    ),
}  # fmt: skip
SIGLIP = {"siglip-kernel": Provider("rival", "siglip_kernel.fused_siglip_loss", _siglip_kernel, devices=_GPU)}


def product_8192() -> Provider:
    """The vendor's own 8192-cubed product, in the dtype of the inputs: the GPU's ceiling."""

    def build() -> Function:
        made: dict[str, Tensor] = {}

        def run(x: Inputs) -> Tensor:
            if not made:
                like = next(t for t in x.values() if t.dim() > 1)
                made["a"], made["b"] = (
                    torch.randn(8192, 8192, device=like.device).to(like.dtype) / math.sqrt(8192) for _ in range(2)
                )
                made["out"] = torch.empty_like(made["a"])
            return torch.mm(made["a"], made["b"], out=made["out"])

        return run

    return Provider("ceiling", "torch.mm, 8192 cubed", build, devices=_GPU, flops=2.0 * 8192**3)

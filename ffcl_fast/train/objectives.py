"""What the first two stages minimise: a loss on two activations of a layer, or on two outputs, by name.

Every loss takes (first, second, third) as :class:`~ffcl_fast.train.batches.Views` makes them for its kind of items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ffcl_fast.functional import clip, pool_goodness, siglip
from ffcl_fast.functional.pair_cosine import pair_cosine_gradient
from ffcl_fast.losses import GoodnessLoss, InfoNCELoss, LayerwiseLoss, NTXentLoss, PairCosineLoss, SupConLoss

from . import parallel
from .config import CONTRASTIVE, GOODNESS, Config

SIGLIP_BIAS = -10.0


def _clip(temperature: float = 0.07) -> Callable[[Tensor, Tensor], Tensor]:
    """CLIP's loss of pooled views, its scale held at what CLIP's training begins with (Radford et al. 2021)."""
    return lambda x, y: clip(F.normalize(x, dim=1), F.normalize(y, dim=1), 1 / temperature)


def _siglip(temperature: float = 0.1) -> Callable[[Tensor, Tensor], Tensor]:
    """The sigmoid loss of pooled views, scale and bias held at SigLIP's first values (Zhai et al. 2023)."""
    return lambda x, y: siglip(F.normalize(x, dim=1), F.normalize(y, dim=1), 1 / temperature, SIGLIP_BIAS)


# The copied libraries' own temperatures are the losses' defaults.
_CONTRASTIVE: dict[str, Callable[..., Any]] = {
    "info_nce": InfoNCELoss,
    "nt_xent": NTXentLoss,
    "sup_con": SupConLoss,
    "clip": _clip,
    "siglip": _siglip,
}


@dataclass(frozen=True)
class Objective:
    """``loss(h1, h2, third)`` is a mean over samples; ``items``: the kind of :class:`Views` it is for;
    ``normalize``: the next layer must not see this one's goodness, so its input is brought to unit mean square.
    ``gradient(h, third, relu)``, where there is one, gives that loss of h's two halves (after ReLU where ``relu``) and
    its gradient in h from one visit."""

    name: str
    items: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    normalize: bool = False
    gradient: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]] | None = None


def objective(name: str, config: Config) -> Objective:
    """The objective called ``name``, one of the choices of ``local_loss``, with the settings of ``config``."""
    if name in GOODNESS:
        goodness = GoodnessLoss(name, config.goodness_objective, config.threshold)
        return Objective(name, "sides", lambda h1, h2, label: goodness(h1, h2), normalize=True)
    if name in CONTRASTIVE:
        options = {} if config.temperature is None else {"temperature": config.temperature}
        layerwise = LayerwiseLoss(_CONTRASTIVE[name](**options))  # it normalises where the loss does not

        def contrast(h1: Tensor, h2: Tensor, label: Tensor) -> Tensor:
            h1, h2, label = parallel.everyone(_pooled(h1), _pooled(h2), label)
            return layerwise([h1], [h2], label if name == "sup_con" else None)

        return Objective(name, "views", contrast)

    def gradient(h: Tensor, target: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        return pair_cosine_gradient(h, target, config.margin, relu=relu)

    return Objective(name, "pairs", PairCosineLoss(margin=config.margin), gradient=gradient)


def _pooled(h: Tensor) -> Tensor:
    """(N, C, ...) averaged over every position, (N, C), before it is sent to other processes."""
    return h if h.dim() == 2 else pool_goodness(h)[1]

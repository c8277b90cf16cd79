"""A loss at every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.goodness import pool_goodness
from ..functional.layerwise import layerwise
from .contrastive import InfoNCELoss, NTXentLoss, SupConLoss
from .goodness import GoodnessLoss


class LayerwiseLoss(nn.Module):
    """The weighted sum of one loss over a list of layers.

    Args:
        loss: the loss of one layer:

            - :class:`PairCosineLoss`: gets both activations whole, and ``target`` of 1 and -1;
            - :class:`GoodnessLoss`: positive and negative activations, no target;
            - :class:`InfoNCELoss`, :class:`NTXentLoss`: both views, globally average pooled to (N, C), no target;
            - :class:`SupConLoss`: both views, pooled and normalised to unit length, and (N,) labels or None;
            - anything else that is callable with the two activations, and with the target where one is given.
        weights: one number a layer; None for 1 each.
    """

    def __init__(self, loss: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be a loss module or function; got {type(loss).__name__}")
        self.loss = loss
        try:
            self.weights = None if weights is None else [float(w) for w in weights]
        except (TypeError, ValueError):
            raise TypeError(f"weights must be a list of numbers, one a layer; got {weights!r}") from None

    def forward(
        self,
        activations_1: Sequence[Tensor],
        activations_2: Sequence[Tensor],
        target: Tensor | None = None,
        return_layers: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Sum over the layers, 0-dimensional; with ``return_layers`` also each layer's part of it, detached.

        Raises:
            TypeError: activations that are no lists.
            ValueError: no layers, lists of different lengths, or a target for a loss that takes none.
        """
        if target is not None and isinstance(self.loss, GoodnessLoss | InfoNCELoss | NTXentLoss):
            raise ValueError(f"target must be None: {type(self.loss).__name__} takes none")
        loss = self.loss
        if isinstance(loss, InfoNCELoss | NTXentLoss):
            loss = self._views
        elif isinstance(loss, SupConLoss):
            loss = self._labelled_views
        return layerwise(loss, activations_1, activations_2, target, self.weights, return_layers)

    def _views(self, h1: Tensor, h2: Tensor) -> Tensor:
        return self.loss(_pool(h1), _pool(h2))

    def _labelled_views(self, h1: Tensor, h2: Tensor, labels: Tensor | None = None) -> Tensor:
        views = torch.stack((F.normalize(_pool(h1), dim=1), F.normalize(_pool(h2), dim=1)), 1)
        return self.loss(views, labels)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _pool(h: Tensor) -> Tensor:
    """(N, C, ...) averaged over every position, (N, C) float32; (N, C) as it is."""
    return h if h.dim() == 2 else pool_goodness(h)[1]

"""Modules of the goodness family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional import _checks
from ..functional.goodness import KINDS, check_activation, check_number, goodness
from ..functional.goodness_many import goodness_many
from ..functional.objectives import OBJECTIVES, TwoThreshold, default_threshold, goodness_loss
from ..functional.pair_cosine import pair_cosine


class PairCosineLoss(nn.Module):
    """:class:`torch.nn.CosineEmbeddingLoss` over flattened activations of any shape: FFCL's local loss.

    Args:
        margin: cosine up to which a negative pair costs nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        relu: apply ReLU to both activations first, in the same pass.
        backend: ``"auto"`` or one of :data:`ffcl_fast.backends.NAMES`.

    Raises ValueError for an unknown reduction, TypeError for a margin that is no number. See
    :func:`ffcl_fast.functional.pair_cosine`.
    """

    folds_weight = True

    def __init__(
        self, margin: float = 0.0, reduction: str = "mean", *, relu: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        check_number(margin, "margin")
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.backend(backend)
        self.margin = margin
        self.reduction = reduction
        self.relu = relu
        self.backend = backend

    def forward(self, h1: Tensor, h2: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
        """Loss of (N, ...), (N, ...) and (N,) of 1 and -1: float32, 0-dimensional or (N,) for ``"none"``."""
        return pair_cosine(
            h1, h2, target, self.margin, self.reduction, weight=weight, relu=self.relu, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}, relu={self.relu}"


class GoodnessLoss(nn.Module):
    """Forward-Forward's loss of a layer: high goodness for positive samples, low for negative ones (Hinton 2022).

    Args:
        goodness: ``"sum_squares"`` or ``"mean_squares"`` of each sample's activation.
        objective: ``"logistic"``, ``"silu"``, ``"symba"`` or ``"two_threshold"``; formulas at
            :func:`ffcl_fast.functional.goodness_loss`.
        threshold: theta; None for 2 with ``"mean_squares"`` and the number of elements a sample with ``"sum_squares"``.
        alpha: SymBa's slope.
        two_threshold: constants of that objective.
        relu: apply ReLU to the activations first, in the same pass.
        backend: ``"auto"`` or one of :data:`ffcl_fast.backends.NAMES`.

    Raises ValueError for an unknown goodness or objective.
    """

    def __init__(
        self,
        goodness: str = "sum_squares",
        objective: str = "logistic",
        threshold: float | None = None,
        alpha: float = 4.0,
        *,
        two_threshold: TwoThreshold | None = None,
        relu: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("goodness", goodness, KINDS)
        _checks.choice("objective", objective, OBJECTIVES)
        _checks.backend(backend)
        self.goodness = goodness
        self.objective = objective
        self.threshold = threshold
        self.alpha = alpha
        self.two_threshold = two_threshold
        self.relu = relu
        self.backend = backend

    def forward(self, h_pos: Tensor, h_neg: Tensor) -> Tensor:
        """Loss of (N, ...) positive and (M, ...) negative activations: float32, 0-dimensional."""
        _check_layer(h_pos, h_neg)
        g_pos, g_neg = (goodness(h, self.goodness, relu=self.relu, backend=self.backend) for h in (h_pos, h_neg))
        return self.of_goodness(g_pos, g_neg, h_pos[0].numel())

    def of_layers(self, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> list[Tensor]:
        """The loss of every layer, as :meth:`forward` gives it, from one grouped pass over both lists."""
        layers = list(zip(positive, negative, strict=True))
        for pair in layers:
            _check_layer(*pair)
        kinds = {(h.dtype, h.device) for pair in layers for h in pair}
        if len(kinds) > 1 or type(self).forward is not GoodnessLoss.forward:
            return [self(*pair) for pair in layers]
        g = goodness_many([*positive, *negative], self.goodness, relu=self.relu, backend=self.backend)
        count = len(layers)
        return [self.of_goodness(g[i], g[count + i], h[0].numel()) for i, h in enumerate(positive)]

    def of_goodness(self, g_pos: Tensor, g_neg: Tensor, width: int) -> Tensor:
        """The loss where the goodness is already known; ``width``: elements a sample that it was taken over."""
        theta = default_threshold(self.goodness, width) if self.threshold is None else self.threshold
        return goodness_loss(g_pos, g_neg, self.objective, theta, self.alpha, self.two_threshold)

    def extra_repr(self) -> str:
        return f"{self.goodness!r}, {self.objective!r}, threshold={self.threshold}, relu={self.relu}"


def _check_layer(h_pos: Tensor, h_neg: Tensor) -> None:
    """Raise TypeError or ValueError unless these are activations of one layer."""
    check_activation(h_pos, "h_pos")
    check_activation(h_neg, "h_neg")
    if h_pos.shape[1:] != h_neg.shape[1:]:
        raise ValueError(
            "h_pos and h_neg must be activations of one layer, equal in every dimension but the first;"
            f" got {tuple(h_pos.shape)} and {tuple(h_neg.shape)}"
        )

"""Modules of the goodness family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..functional import _checks
from ..functional.goodness import KINDS, check_activation, check_number, goodness
from ..functional.goodness_many import goodness_of_all
from ..functional.layerwise import constants
from ..functional.objectives import OBJECTIVES, TwoThreshold, default_threshold, goodness_loss, goodness_loss_over
from ..functional.pair_cosine import pair_cosine
from .described import described


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
        return described(self, "margin", "reduction", "relu")


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

    def of_layers(self, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The loss of every layer, as :meth:`forward` gives it, from one grouped pass over both lists: (layers,), or a
        list where layers differ in their number of samples, dtype or device, or a subclass has a loss of its own."""
        layers = list(zip(positive, negative, strict=True))
        for pair in layers:
            _check_layer(*pair)
        alike = all((h.dtype, h.device) == (positive[0].dtype, positive[0].device) for pair in layers for h in pair)
        if not (alike and self._is_ours("forward")):
            return [self(*pair) for pair in layers]
        sizes, widths = [h.shape[0] for h in (*positive, *negative)], [h[0].numel() for h in positive]
        g = goodness_of_all([*positive, *negative], self.goodness, relu=self.relu, backend=self.backend)
        count = len(layers)
        # Compared, not hashed: in a compiled graph they may be symbols.
        same = all(n == side[0] for side in (sizes[:count], sizes[count:]) for n in side)
        if self.objective == "symba":
            same = same and sizes[0] == sizes[-1]
        if not (same and self._is_ours("of_goodness")):
            each = g.split(sizes)
            return [self.of_goodness(*x) for x in zip(each[:count], each[count:], widths, strict=True)]
        g_pos, g_neg = (x.view(count, -1) for x in g.split((count * sizes[0], count * sizes[-1])))
        thresholds = [self._threshold_at(width) for width in widths]
        one = all(x == thresholds[0] for x in thresholds)
        theta = thresholds[0] if one else constants(thresholds, g)[:, None]
        return goodness_loss_over(1, g_pos, g_neg, self.objective, theta, self.alpha, self.two_threshold)

    def _is_ours(self, method: str) -> bool:
        return getattr(type(self), method) is getattr(GoodnessLoss, method) and method not in self.__dict__

    def of_goodness(self, g_pos: Tensor, g_neg: Tensor, width: int) -> Tensor:
        """The loss where the goodness is already known; ``width``: elements a sample that it was taken over."""
        return goodness_loss(g_pos, g_neg, self.objective, self._threshold_at(width), self.alpha, self.two_threshold)

    def _threshold_at(self, width: int) -> float:
        if self.threshold is None:
            return default_threshold(self.goodness, width)
        check_number(self.threshold, "threshold")
        return self.threshold

    def extra_repr(self) -> str:
        return described(self, "goodness", "objective", "threshold", "relu")


def _check_layer(h_pos: Tensor, h_neg: Tensor) -> None:
    """Raise TypeError or ValueError unless these are activations of one layer."""
    check_activation(h_pos, "h_pos")
    check_activation(h_neg, "h_neg")
    if h_pos.shape[1:] != h_neg.shape[1:]:
        raise ValueError(
            "h_pos and h_neg must be activations of one layer, equal in every dimension but the first;"
            f" got {tuple(h_pos.shape)} and {tuple(h_neg.shape)}"
        )

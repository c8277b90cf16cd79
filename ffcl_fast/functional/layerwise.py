"""One loss for every layer of two activations, summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def layerwise(
    loss: Callable[..., Tensor],
    activations_1: Sequence[Tensor],
    activations_2: Sequence[Tensor],
    target: Tensor | None = None,
    weights: Sequence[float] | None = None,
    return_layers: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Sum over layers l of ``weights[l] * loss(activations_1[l], activations_2[l], target)``.

    With activations that do not depend on each other (each layer's input detached) the sum trains every layer by its
    own loss alone, in one backward pass.

    Args:
        loss: takes a layer's two activations, and ``target`` unless that is None; returns a 0-dimensional tensor. With
            an attribute ``folds_weight`` that is true, it is also given ``weight=`` and returns the weighted loss. With
            a method ``of_layers`` (as :class:`GoodnessLoss` has) and no target, that gets both lists at once and
            returns their losses, a list or a (layers,) tensor.
        activations_1, activations_2: lists of one tensor a layer.
        target: what every layer's loss gets as third argument, such as (N,) labels.
        weights: one number a layer; None for 1 each.
        return_layers: also return the layers' weighted losses, detached; they add up to the sum.

    Returns:
        0-dimensional tensor, or ``(sum, layers)``.

    Raises:
        TypeError: activations that are no lists.
        ValueError: no layers, or lists of different lengths.
    """
    for name, activations in (("activations_1", activations_1), ("activations_2", activations_2)):
        if not isinstance(activations, list | tuple):
            raise TypeError(f"{name} must be a list of tensors, one a layer; got {type(activations).__name__}")
    count = len(activations_1)
    if not count:
        raise ValueError("activations_1 must hold at least one layer; got none")
    if len(activations_2) != count:
        raise ValueError(
            f"activations_1 and activations_2 must hold one tensor a layer; got {count} and {len(activations_2)}"
        )
    if weights is not None and len(weights) != count:
        raise ValueError(f"weights must hold one number for each of {count} layers; got {len(weights)}")
    extra = () if target is None else (target,)
    folds = getattr(loss, "folds_weight", False)
    together = getattr(loss, "of_layers", None) if target is None else None
    each = together(activations_1, activations_2) if together else None
    if isinstance(each, Tensor) and each.shape == (count,) and each.is_floating_point():
        numbers = None if weights is None else [weights[i] for i in range(count)]
        if numbers is None or all(isinstance(x, int | float) for x in numbers):
            losses = each if numbers is None else each * constants(numbers, each)
            return (losses.sum(), list(losses.detach())) if return_layers else losses.sum()
    values = []
    for i in range(count):
        weight = 1.0 if weights is None else weights[i]
        if folds:
            values.append(loss(activations_1[i], activations_2[i], *extra, weight=weight))
        else:
            value = loss(activations_1[i], activations_2[i], *extra) if each is None else each[i]
            values.append(value if weight == 1.0 else value * weight)
    total = sum(values[1:], values[0])
    return (total, [v.detach() for v in values]) if return_layers else total


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """``values`` in the dtype and on the device of ``like``. Written there: a copy from the host would wait for the
    device, and a CUDA graph could not capture it."""
    return torch.stack([like.new_full((), value) for value in values])

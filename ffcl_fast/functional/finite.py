"""Which sums of exponentials an infinite element spoils, though they may come out as numbers.

The exponential of a logit of minus infinity is 0, so that a row or column that holds one has a plausible normaliser,
and -inf, as where every pair is left out, if it holds nothing else. An element that is NaN shows by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def nothing_or_nan(
    q: Tensor, k: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, exclude: int
) -> tuple[Tensor, Tensor] | None:
    """(N,) and (M,): NaN where the row, or another that it is paired with, has an element that is not finite, else 0.

    ``exclude`` is one of ops.EXCLUDE_*; k = None stands for k = q. None where a look at CPU tensors shows that every
    element is finite; nothing is read back from a device.
    """
    if _known_finite(q) and (k is None or _known_finite(k)):
        return None
    acc = ops.accumulator_dtype(q)
    rows = _spoilt(q)
    cols = rows if k is None else _spoilt(k)
    col_ids = row_ids if k is None else col_ids

    def sums(own: Tensor, own_ids: Tensor | None, other: Tensor, other_ids: Tensor | None) -> Tensor:
        hit = own | _meets(other, other_ids, own, own_ids, exclude)
        return torch.where(hit, torch.nan, 0.0).to(acc)

    of_rows = sums(rows, row_ids, cols, col_ids)
    return of_rows, of_rows if k is None else sums(cols, col_ids, rows, row_ids)


def _known_finite(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    least, largest = torch.aminmax(x.detach())
    return bool(least.isfinite() & largest.isfinite())


def _spoilt(x: Tensor) -> Tensor:
    x = x.detach()
    return ~(x.amin(1).isfinite() & x.amax(1).isfinite())


def _meets(spoilt: Tensor, ids: Tensor | None, own: Tensor, own_ids: Tensor | None, exclude: int) -> Tensor:
    """For every row of one side whether a pair of it that is not left out has one of the ``spoilt`` of the other."""
    count = spoilt.sum()
    if exclude == ops.EXCLUDE_NONE:
        return (count > 0).expand_as(own)
    aligned = torch.zeros_like(own)  # the partner on the diagonal
    shared = min(len(own), len(spoilt))
    aligned[:shared] = spoilt[:shared]
    if exclude == ops.EXCLUDE_DIAGONAL:
        return count > aligned.long()
    ordered, order = ids.sort()
    before = torch.nn.functional.pad(spoilt[order].cumsum(0), (1, 0))
    alike = before[torch.searchsorted(ordered, own_ids, right=True)] - before[torch.searchsorted(ordered, own_ids)]
    if exclude == ops.EXCLUDE_DIFFERENT_ID:
        return alike > 0
    different = count > alike
    return different | aligned if exclude == ops.EXCLUDE_SAME_ID_OFF_DIAGONAL else different

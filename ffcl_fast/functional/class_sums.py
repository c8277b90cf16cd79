"""Sums of rows by class, with the same bits on every run on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def class_sums(x: Tensor, group: Tensor, classes: int) -> Tensor:
    """(classes, D): the sum of the rows of ``x`` (B, D) whose ``group`` (B,) is each class."""
    if x.is_cuda and x.dtype == torch.float32:
        return fixed_point_sums(x, group, classes)
    return x.new_zeros(classes, x.shape[1]).index_add_(0, group, x)


def fixed_point_sums(x: Tensor, group: Tensor, classes: int) -> Tensor:
    """The same for float32 by 64-bit integers: a GPU adds rows in whatever order its threads arrive, and the sum of
    floating-point numbers depends on that order, the sum of integers does not.

    The largest element takes all bits that sums of B rows leave, so that what is rounded off is far below float32's
    last bit of it. A class with an element that is not finite is NaN.
    """
    finite = x.nan_to_num(0.0, 0.0, 0.0)
    bits = 62 - _bit_length(x.shape[0], x.device) - torch.frexp(finite.abs().amax()).exponent
    unit = torch.pow(torch.full((), 2.0, dtype=torch.float64, device=x.device), bits)
    whole = (finite.double() * unit).round().to(torch.int64)
    sums = whole.new_zeros(classes, x.shape[1]).index_add_(0, group, whole)
    lost = x.new_zeros(classes).index_add_(0, group, (x * 0.0).sum(1))
    return (sums.double() / unit).to(x.dtype) + lost[:, None]


def _bit_length(rows: int, device: torch.device) -> int | Tensor:
    if torch.compiler.is_compiling():  # where the number of rows may be a symbol
        return torch.frexp(torch.full((), rows, dtype=torch.float64, device=device)).exponent
    return rows.bit_length()

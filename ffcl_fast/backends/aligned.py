"""Rows at 16-byte addresses, as the tensor-core kernels of the GPU backends read them."""

from __future__ import annotations

from torch import Tensor


def unit(x: Tensor) -> int:
    """Elements in 16 bytes: what :func:`aligned_rows` are multiples of, as kernels get their strides."""
    return 16 // x.element_size()


def is_aligned(x: Tensor) -> bool:
    """Whether every row of x begins and ends at a multiple of 16 bytes, and the copy engine (TMA) can read them: rows
    that do not overlap and lie within 2^40."""
    step = x.stride(0) * x.element_size()
    whole = x.data_ptr() % 16 == 0 and step % 16 == 0 and x.shape[1] % unit(x) == 0
    return whole and x.stride(1) == 1 and x.shape[1] <= x.stride(0) and step < 1 << 40


def without_padding(x: Tensor, width: int) -> Tensor:
    """The gradient of what :func:`aligned_rows` took, `width` wide, from that of what it returned."""
    return x if x.shape[1] == width else x[:, :width].contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """x itself where :func:`is_aligned`, else a copy that is: its rows end in zeros, which change no product.

    So every product of tiles runs the kernel that was compiled and checked. Narrow loads need so many registers for
    their addresses that a tile spills, and the copy engine takes no other strides. The copy is O(N D) beside O(N M D).
    """
    if is_aligned(x):
        return x
    width, wide = x.shape[1], unit(x)
    copy = x.new_empty(x.shape[0], -(-width // wide) * wide)
    copy[:, :width] = x
    copy[:, width:] = 0.0
    return copy

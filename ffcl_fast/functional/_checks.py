"""Validation shared by every public function: a clear exception that names the argument, before any kernel runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends, ops

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def embeddings(name: str, x: Tensor, dim: int = 2) -> None:
    """``x`` must be a non-empty ``dim``-dimensional tensor of float16, bfloat16, float32 or float64.

    Raises:
        TypeError: not a tensor, not a dense one, or another dtype.
        ValueError: another number of dimensions, or no elements.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    dense(name, x)
    if x.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(x.shape)}")
    if is_empty(x):
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def is_empty(x: Tensor) -> bool:
    """Whether ``x`` has no elements. Where torch.compile does not know their number yet: False, and the compiled code
    raises RuntimeError where it has none."""
    if not torch.compiler.is_compiling():
        return x.numel() == 0
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes a second and a half to import

    if guard_or_false(x.numel() == 0):
        return True
    torch._check(x.numel() != 0)
    return False


def dense(name: str, x: Tensor) -> None:
    """Raises TypeError for sparse, nested and MKL-DNN tensors: kernels read memory by strides."""
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {kind}")


def alike(name: str, x: Tensor, other_name: str, other: Tensor, rows: bool = False) -> None:
    """``x`` must have the width, dtype and device of ``other``, and with ``rows`` as many rows.

    A difference of dtype is allowed under autocast, which casts both.

    Raises:
        TypeError: the dtypes differ.
        ValueError: the shapes or the devices differ.
    """
    if rows and x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have as many rows as {other_name}: got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} must be as wide as {other_name}: got shapes {tuple(x.shape)} and {tuple(other.shape)}"
        )
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}: got {x.device} and {other.device}")
    if x.dtype != other.dtype and compute_dtype(x) != compute_dtype(other):
        raise TypeError(f"{name} must have the dtype of {other_name}: got {x.dtype} and {other.dtype}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def backend(value: str) -> None:
    """Raises ValueError for an unknown backend."""
    choice("backend", value, backends.NAMES)


def ids(name: str, value: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
    """``value`` as a contiguous int64 vector of ``rows`` identifiers on ``device``; None stays None.

    Raises:
        TypeError: not a tensor of integers or booleans.
        ValueError: not ``rows`` elements.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    if value.numel() != rows:
        raise ValueError(f"{name} must have {rows} elements, got shape {tuple(value.shape)}")
    return value.reshape(-1).to(device=device, dtype=torch.int64).contiguous()


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype in which products with ``x`` run: its own, or autocast's where that is on (float64 stays)."""
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def scalar(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """A number or one-element tensor as a 0-dim tensor in the accumulator dtype of ``x``, on its device.

    Raises:
        TypeError: neither a number nor a floating tensor.
        ValueError: a tensor with more than one element, or a number that is not finite.
    """
    acc = ops.accumulator_dtype(x)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        return (value.reshape(()) if value.dim() else value).to(device=x.device, dtype=acc)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return torch.full((), value, dtype=acc, device=x.device)


def inverse_temperature(temperature: float | Tensor, x: Tensor) -> Tensor:
    """1 / temperature as a 0-dim tensor in the accumulator dtype of ``x``; a tensor keeps its gradient.

    Raises:
        TypeError, ValueError: as :func:`scalar`; ValueError also for the number 0.
    """
    if isinstance(temperature, Tensor):
        return scalar("temperature", temperature, x).reciprocal()
    if isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        if abs(temperature) < 1e-8:
            raise ValueError(f"temperature must not be zero, got {temperature}")
        if -math.inf < temperature < math.inf:
            return torch.full((), 1.0 / temperature, dtype=ops.accumulator_dtype(x), device=x.device)
    return scalar("temperature", temperature, x)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The mean or sum of ``loss``, or ``loss`` itself for ``"none"``."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss

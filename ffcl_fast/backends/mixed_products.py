"""Products of 16-bit matrices in float32: by one call where the build of PyTorch has it, not all do on AMD's GPUs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

_log = logging.getLogger("ffcl_fast.backends")

_mixed: dict[tuple[torch.device, torch.dtype], bool] = {}


def mixed_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch multiplies 16-bit matrices into a float32 sum on this device."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    key = device, dtype
    if key not in _mixed:
        try:
            a = torch.zeros(16, 16, device=device, dtype=dtype)
            c = torch.zeros(16, 16, device=device)
            torch.ops.aten.addmm.dtype_out(c, a, a, torch.float32, out=c)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            _log.warning("%s products on %s go through float32 copies, which are slow: %s", dtype, device, error)
            # These say nothing of the build: the next call asks again.
            if isinstance(error, torch.OutOfMemoryError) or torch.cuda.is_current_stream_capturing():
                return False
            _mixed[key] = False
        else:
            _mixed[key] = True
    return _mixed[key]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a b (first) or total + a b, in float32."""
    beta = 0.0 if first else 1.0
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif mixed_product(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)

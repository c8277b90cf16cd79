"""Whether the library multiplies 16-bit matrices into float32: not every build of PyTorch does, on AMD's GPUs least."""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger("ffcl_fast.backends")

_mixed: dict[tuple[torch.device, torch.dtype], bool] = {}


def mixed_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch multiplies 16-bit matrices into a float32 sum on this device."""
    if device.type != "cuda":
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

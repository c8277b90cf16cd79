"""The compiled module, where it was built, and its status codes as exceptions."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

# Values of ffcl::DType in csrc/isa.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("ffcl_fast._native"), None
    except ModuleNotFoundError:
        return None, "ffcl_fast was installed without its compiled part"
    except ImportError as error:
        logging.getLogger("ffcl_fast.backends").warning("the compiled part of ffcl_fast does not load: %s", error)
        return None, f"the compiled part does not load: {error}"


module, problem = _load()  # the module, or None and the reason


def usable(x: Tensor) -> bool:
    """Whether the compiled CPU kernels take tensors like ``x``."""
    return module is not None and x.device.type == "cpu" and x.dtype in DTYPES


def check(status: int, op: str) -> None:
    """Raise what a kernel's status code (``ffcl::Status`` in csrc/isa.h) stands for."""
    if status == 0:
        return
    if status == 1:
        raise ValueError(f"{op}: the kernel refused its arguments")
    if status == 2:
        raise MemoryError(f"{op}: not enough memory for the kernel's workspace")
    if status == 3:
        raise RuntimeError(f"{op}: this kernel was not built into ffcl_fast._native")
    raise RuntimeError(f"{op}: native error {status}")


def call(kernel: str, *arguments) -> None:
    """The compiled function of that name. Raises what its status code stands for."""
    check(getattr(module, kernel)(*arguments), kernel)

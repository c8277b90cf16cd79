"""Launches of the Triton backend for CPU tensors, compiled for sm_90 or sm_80 and run by the machine.

Triton itself looks at the arguments, chooses what it has compiled and launches it: only its driver and what it holds
for a compiled kernel are replaced.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ffcl_fast.backends import triton as backend
from ffcl_fast.backends.triton import config

from .. import no_gpu
from .grid import execute
from .memory import GlobalMemory, TensorMap
from .program import Program

LARGEST_TILE = 128  # rows and columns of a panel are whole tiles
launches: collections.Counter = collections.Counter()  # by name of the kernel


class Kernel(no_gpu.Kernel):
    """Runs the PTX of a compiled kernel."""

    def __init__(self, name: str, compiled, signature: dict[str, str | tuple]):
        self.name, self.metadata, self.signature = name, compiled.metadata, signature
        self.program = Program(compiled.asm["ptx"])

    def __getitem__(self, grid: no_gpu.Grid) -> Callable[..., None]:
        def run(*arguments) -> None:
            launches[self.name] += 1
            memory, parameters, maps = GlobalMemory(), [], {}
            boxes = iter(getattr(self.metadata, "tensordesc_meta", None) or ())
            for kind, value in _flat(tuple(self.signature.values()), arguments):
                if isinstance(value, TensorDescriptor):
                    maps[len(parameters)] = _tensor_map(value, next(boxes), memory)
                    parameters += [0, *value.shape, *value.strides]
                elif torch.is_tensor(value):
                    memory.add(value.untyped_storage().data_ptr(), value.untyped_storage().nbytes())
                    parameters.append(value.data_ptr())
                elif kind == "fp32":
                    parameters.append(int(np.float32(value).view(np.uint32)))
                else:
                    parameters.append(int(value))
            # What is left are Triton's scratch buffers, which these kernels do not use.
            parameters += [0] * (len(self.program.parameters) - len(parameters))
            execute(self.program, grid, parameters, memory, self.metadata.shared, maps)

        return run


def _flat(kinds: tuple, values: tuple) -> Iterator[tuple[str, object]]:
    """(type, value) of what is left of arguments when the kernel is compiled."""
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _tensor_map(value: TensorDescriptor, box: dict, memory: GlobalMemory) -> TensorMap:
    size, (rows, cols), stride = value.base.element_size(), value.shape, value.strides[0]
    data = memory.add(value.base.data_ptr(), ((rows - 1) * stride + cols) * size)
    return TensorMap(data, (rows, cols), stride * size, size, tuple(box["block_size"]), box["swizzle"])


def _without_ptxas(*arguments) -> tuple[str, str] | None:
    """Triton's hook for who changes the stages of its compiler."""
    if not arguments:
        return "ptx", "ptx"  # part of the keys in its cache
    arguments[1]["cubin"] = lambda source, metadata: b""


def _compiled(kernel: JITFunction, signature: dict, constants: dict, options, attributes) -> Kernel:
    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        found = kernel.compile(source, target=driver.active.get_current_target(), options=options.__dict__)
    return Kernel(kernel.fn.__name__, found, signature)


def installed(chip: str = "sm90") -> contextlib.AbstractContextManager[None]:
    """Launches of the Triton backend for CPU tensors run on the machine, with the tiles of one of no_gpu.CHIPS.
    TRITON_INTERPRET must not have been set."""
    side = config.panel_side
    changes = (
        (backend, "doubtful", lambda x: None),
        (config, "panel_side", lambda x: max(side(x), LARGEST_TILE)),
    )
    return no_gpu.launching(_compiled, chip, changes)

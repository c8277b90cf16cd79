"""Launches of the Triton backend for CPU tensors, compiled for sm_90 or sm_80 and run by the machine.

Triton itself looks at the arguments, chooses what it has compiled and launches it: only its driver and what it holds
for a compiled kernel are replaced.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ffcl_fast.backends import triton as backend
from ffcl_fast.backends.triton import config, launch

from .grid import execute
from .memory import GlobalMemory, TensorMap
from .program import Program

CHIPS = {"sm90": GPUTarget("cuda", 90, 32), "sm80": GPUTarget("cuda", 80, 32)}  # what the machine knows all of
NOWHERE = 1 << 10  # and the chip's number: the device that kernels are kept for, which is no GPU's
LARGEST_TILE = 128  # rows and columns of a panel are whole tiles
Grid = tuple[int, int, int]
launches: collections.Counter = collections.Counter()  # by name of the kernel


class Kernel:
    """Stands for Triton's compiled kernel: Triton and :class:`launch.Launch` launch it as they do theirs."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, compiled, signature: dict[str, str | tuple]):
        self.name, self.metadata, self.signature = name, compiled.metadata, signature
        self.program = Program(compiled.asm["ptx"])

    def launch_metadata(self, *_) -> None:
        return None

    def run(
        self, x: int, y: int, z: int, stream: int, function: int, packed: tuple, metadata, enter, leave, *arguments
    ) -> None:
        self[x, y, z](*arguments)

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
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


class _Nowhere:
    """Triton's driver of a GPU that is not there."""

    utils = None

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return NOWHERE + self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _without_ptxas(*arguments) -> tuple[str, str] | None:
    """Triton's hook for who changes the stages of its compiler."""
    if not arguments:
        return "ptx", "ptx"  # part of the keys in its cache
    arguments[1]["cubin"] = lambda source, metadata: b""


def _compiled(kernel: JITFunction, key: str, signature: dict, device: int, constants: dict, options, attributes, *_):
    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        found = kernel.compile(source, target=driver.active.get_current_target(), options=options.__dict__)
    kernel.device_caches[device][0][key] = ours = Kernel(kernel.fn.__name__, found, signature)
    return ours


@contextlib.contextmanager
def installed(chip: str = "sm90") -> Iterator[None]:
    """Launches of the Triton backend for CPU tensors run on the machine, with the tiles of one of CHIPS.
    TRITON_INTERPRET must not have been set."""
    modules = [m for name, m in sys.modules.items() if name.startswith(launch.__package__ + ".")]
    side = config.panel_side
    changes = [
        (JITFunction, "_do_compile", _compiled),
        (backend, "unavailable", lambda op, x: None),
        (backend, "doubtful", lambda x: None),
        (config, "family", lambda device: chip),
        (config, "precision", lambda x: "ieee"),
        (config, "panel_side", lambda x: max(side(x), LARGEST_TILE)),
        (config, "_stored", lambda device: {}),
        # By name, as each module has imported it.
        *((m, "rounding", lambda device: "hardware") for m in modules if hasattr(m, "rounding")),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    active = driver._active
    driver.set_active(_Nowhere(CHIPS[chip]))
    launch.forget_plans()
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
        driver._active = active
        launch.forget_plans()

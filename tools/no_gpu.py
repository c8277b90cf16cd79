"""The Triton backend for CPU tensors on a machine without a GPU: Triton looks at the arguments and chooses what to
launch as on one, but its driver is none and what stands for a compiled kernel is the caller's."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ffcl_fast.backends import triton as backend
from ffcl_fast.backends.triton import config, launch, tuning

CHIPS = {"sm90": GPUTarget("cuda", 90, 32), "sm80": GPUTarget("cuda", 80, 32)}
_nowhere = itertools.count(1 << 10)  # devices that are no GPU's, for whom Triton keeps kernels: each use has its own
Grid = tuple[int, int, int]
Change = tuple[Any, str, Any]  # object or module, name, what it is meanwhile


class Driver:
    """Triton's driver of a GPU that is not there."""

    utils = None

    def __init__(self, target: GPUTarget):
        self.target, self.device = target, next(_nowhere)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Kernel:
    """Stands for Triton's compiled kernel: Triton and :class:`launch.Launch` call it as they do theirs."""

    function, packed_metadata, metadata = 0, (), None

    def launch_metadata(self, *_) -> None:
        return None

    def run(
        self, x: int, y: int, z: int, stream: int, function: int, packed: tuple, metadata, enter, leave, *arguments
    ) -> None:
        """As Triton's own launch calls it."""
        self[x, y, z](*arguments)

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        raise NotImplementedError


def modules_with(name: str) -> list:
    """The backend's modules that have a name of their own, as each has imported it."""
    return [m for key, m in sys.modules.items() if key.startswith(launch.__package__ + ".") and hasattr(m, name)]


@contextlib.contextmanager
def launching(make: Callable[..., Kernel], chip: str, changes: Iterable[Change]) -> Iterator[None]:
    """Meanwhile launches of the Triton backend for CPU tensors are those of ``make(kernel, signature, constants,
    options, attributes)``, with the tiles of one of CHIPS, and each of the further changes holds."""

    def compiled(kernel: JITFunction, key: str, signature: dict, device: int, constants, options, attributes, *_):
        kernel.device_caches[device][0][key] = found = make(kernel, signature, constants, options, attributes)
        return found

    changes = (
        (JITFunction, "_do_compile", compiled),
        (backend, "unavailable", lambda op, x: None),
        (config, "family", lambda device: chip),
        (config, "precision", lambda x: "ieee"),
        (tuning, "_stored", lambda device: {}),
        *((m, "rounding", lambda device: "hardware") for m in modules_with("rounding")),
        *changes,
    )
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    active = driver._active
    driver.set_active(Driver(CHIPS[chip]))
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

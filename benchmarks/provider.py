"""The two records that everything measured is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Shape = tuple[int, ...]
Inputs = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[[Inputs], Outputs]


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss.

    Attributes:
        kind: "ours", "rival", or "ceiling": the machine's own matrix product or copy, nothing to differentiate.
        what: where it comes from, for readers.
        build: imports what it needs and returns the function.
        dtype: what floating inputs are converted to, None for the workload's own.
        own_definition: its result differs from the reference's by definition, so its error is that from itself in
            float64.
        devices: the types of device it runs on.
        flops: operations of a ceiling that does not depend on the shape; None for one unit of it.
        thorough: on a CPU measured at the sizes of the bars only, and not by --brief and --quick: torch.compile takes
            half a minute a size there.
    """

    kind: str
    what: str
    build: Callable[[], Function]
    dtype: torch.dtype | None = None
    own_definition: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    flops: float | None = None
    thorough: bool = False


@dataclass(frozen=True)
class Family:
    """A loss, over any sizes.

    Attributes:
        inputs: float32 inputs of a shape from a generator, on the generator's device.
        leaves: the inputs that need a gradient.
        providers: by name; :func:`baseline` says which of them each is compared with.
        units: U that count, forward and backward; 0 for memory-bound work.
        unit_flops: operations of one U.
        useful_bytes: float32 bytes that have to move, forward and backward; None for products.
        ceiling_bytes: bytes that the ceiling's copy moves.
        quick: a tiny shape.
        check: a shape at which float64 is affordable.
        upstream: gradients of the outputs; None where the output is a scalar loss.
        forward_units: of ``units`` those of the forward pass.
    """

    name: str
    title: str
    inputs: Callable[[Shape, Generator], Inputs]
    leaves: tuple[str, ...]
    providers: dict[str, Provider]
    units: float
    unit_flops: Callable[[Shape], float]
    quick: Shape
    check: Callable[[Shape], Shape]
    useful_bytes: Callable[[Shape], float] | None = None
    ceiling_bytes: Callable[[Shape], float] | None = None
    upstream: Callable[[Inputs], tuple[Tensor, ...]] | None = None
    forward_units: float = 0


def baseline(kind: str, name: str, usual: str) -> str:
    """Which of our providers the time of this one is divided by: ``usual`` ("cpu", on a GPU "triton"), but for a rival
    with bfloat16 inputs, which its name tells, the one that has them too."""
    return "cpu-bf16" if kind == "rival" and name.endswith("-bf16") else usual

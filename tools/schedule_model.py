"""Time, traffic and memory of the cross-process losses on paper: what ``simulate_ranks.py`` plays, the docs tabulate.

Forward and backward of one step on one of W processes, n anchors and n keys each, width D, element size e:

- time of a product of one block, n x n: 2 n n D / rate; a pass over it is that once forward (1) and three times
  backward (S again, dq, dk).
- or, where kernels were measured, what they took at that size, and no less than a call costs its host.
- a message of b bytes takes latency + b / bandwidth; a collective is that of its ring algorithm.
- gather: collectives and products one after the other. ring: at each step the longer of the two.

Every rate, bandwidth and latency is the caller's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

FORWARD, BACKWARD = 1, 3  # passes over a block of S


@dataclass(frozen=True)
class Kernels:
    """Measured times of the forward and the backward pass over one block, two sizes at least.

    device: (operations of one product, seconds forward, seconds backward), by size; between two sizes times lie on
    their line, beyond on the line of the last two. host: seconds (forward, backward) that a call takes at any size.
    """

    device: tuple[tuple[float, float, float], ...]
    host: tuple[float, float] = (0.0, 0.0)

    def seconds(self, backward: bool, block: float) -> float:
        last = len(self.device) - 1
        at = min(max(1, bisect_left([work for work, *_ in self.device], block)), last)
        (x0, *y0), (x1, *y1) = self.device[at - 1 : at + 1]
        slope = (y1[backward] - y0[backward]) / (x1 - x0)
        return max(y0[backward] + slope * (block - x0), self.host[backward])


@dataclass(frozen=True)
class Machine:
    """What a process has. A collective passes W - 1 hops, a ring's blocks as many messages.

    rate: operations a second; bandwidth: bytes a second of its link; latency: seconds a message takes besides;
    hop: the same inside a collective, that of a message where not given; call: seconds an operator takes besides;
    kernels: what was measured, in place of rate.
    """

    rate: float
    bandwidth: float
    latency: float
    hop: float | None = None
    call: float = 0.0
    kernels: Kernels | None = None

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def hopping(self, size: float) -> float:
        return (self.latency if self.hop is None else self.hop) + size / self.bandwidth

    def product(self, passes: int, block: float) -> float:
        if self.kernels is not None:
            return self.call + self.kernels.seconds(passes == BACKWARD, block)
        return self.call + passes * block / self.rate


@dataclass(frozen=True)
class Problem:
    """symmetric: anchors are the keys (NT-Xent, SupCon); both: column sums too (CLIP)."""

    world: int
    rows: int
    dim: int
    element: int = 4
    symmetric: bool = False
    both: bool = True

    @property
    def block(self) -> float:
        """Floating-point operations of one pass over a block."""
        return 2.0 * self.rows * self.rows * self.dim

    @property
    def keys(self) -> float:
        return float(self.rows * self.dim * self.element)

    @property
    def gradients(self) -> float:
        return float(self.rows * self.dim * 4)

    @property
    def sums(self) -> bool:
        return self.symmetric or self.both

    def passes(self) -> float:
        """Passes over a block a process computes, forward and backward; half of them where S is symmetric."""
        return (FORWARD + BACKWARD) * self.world / (2 if self.symmetric else 1)


def traffic(p: Problem, strategy: str) -> float:
    """Bytes a process sends a step."""
    w = p.world
    if strategy == "gather":
        sums = 2 * (w - 1) / w * 8 * p.rows * w * 2 + (w - 1) * 8 * p.rows if p.sums else 0
        return (w - 1) * (p.keys + p.gradients) + sums  # max and sum in float64; normaliser and weight back in float32
    hops = w // 2 if p.symmetric else w - 1
    home = hops if p.symmetric else hops + 1  # of a block's sums or gradients, the way back being one message
    sums = 8 * p.rows * home + 8 * p.rows * hops if p.sums else 0
    return 2 * hops * p.keys + home * p.gradients + sums


def memory(p: Problem, strategy: str) -> float:
    """Bytes a process holds at most beyond its own embeddings, their gradients and a kernel's workspace.

    gather: all keys, their gradients, and those once more where the collective copies them. ring: the block at work
    and the one that arrives; the gradients that its tile gives to both sides, and those on their way in and out.
    """
    if strategy == "gather":
        return p.world * (p.keys + 2 * p.gradients)
    return 2 * p.keys + 4 * p.gradients


def seconds(p: Problem, strategy: str, machine: Machine) -> float:
    """Predicted time of a step."""
    w = p.world
    if strategy == "gather":
        # all_gather of keys; MAX and SUM of the columns; all_gather of two vectors; reduce_scatter of gradients
        time = sum(
            count * machine.product(passes, part * p.block)
            for passes in (FORWARD, BACKWARD)
            for count, part in _gathered(p)
        )
        time += (w - 1) * (machine.hopping(p.keys) + machine.hopping(p.gradients))
        if p.sums:
            time += 5 * (w - 1) * machine.hopping(8 * p.rows)
        return time
    hops = w // 2 if p.symmetric else w - 1
    half = p.symmetric and w % 2 == 0
    own = 0.5 if p.symmetric else 1.0
    vectors = 8 * p.rows if p.sums else 0

    def at(step: int) -> float:
        # the own block first; while one is computed the next is on its way
        part = p.block * (own if step == 0 else 0.5 if half and step == hops else 1.0)
        forward, backward = machine.product(FORWARD, part), machine.product(BACKWARD, part)
        if step < hops:
            # sums and gradients of the block before travel beside it, on the same link
            sums, grads = (vectors, p.gradients) if step > p.symmetric else (0, 0)
            forward = max(forward, machine.message(p.keys + sums))
            backward = max(backward, machine.message(p.keys + vectors + grads))
        return forward + backward

    alike = max(0, hops - 2)  # of the steps from the third to the last but one, each is as long as the others
    time = sum(at(step) for step in {0, min(1, hops), hops}) + (alike * at(2) if alike else 0.0)
    return time + machine.message(vectors) + machine.message(p.gradients)


def _gathered(p: Problem) -> Iterator[tuple[int, float]]:
    """(calls, blocks in each) of a pass over gathered keys: one call, or one a neighbour where S is symmetric."""
    if not p.symmetric:
        yield 1, float(p.world)
        return
    half = p.world % 2 == 0  # of the block opposite
    yield 1 + half, 0.5
    yield p.world // 2 - half, 1.0


def crossover(p: Problem, machine: Machine, free: float) -> str:
    """The way that is faster where its memory fits, and why."""
    if memory(p, "gather") > free:
        return "ring: a gather does not fit"
    gather, ring = (seconds(p, way, machine) for way in ("gather", "ring"))
    return "gather" if gather <= ring else "ring"

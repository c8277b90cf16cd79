"""Time, traffic and memory of the cross-process losses on paper: what ``simulate_ranks.py`` plays, the docs tabulate.

Forward and backward of one step on one of W processes, n anchors and n keys each, width D, element size e:

- time of a product of one block, n x n: 2 n n D / rate; a pass over it is that once forward (1) and three times
  backward (S again, dq, dk).
- a message of b bytes takes latency + b / bandwidth; a collective is that of its ring algorithm.
- gather: collectives and products one after the other. ring: at each step the longer of the two.

Every rate, bandwidth and latency is the caller's assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD = 1, 3  # passes over a block of S


@dataclass(frozen=True)
class Machine:
    """rate: operations a second of one process; bandwidth: bytes a second of its link; latency: seconds a message."""

    rate: float
    bandwidth: float
    latency: float

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth


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
    """Bytes a process holds at most beyond its own embeddings and their gradients."""
    if strategy == "gather":
        return p.world * (p.keys + 2 * p.gradients)
    return 2 * p.keys + 3 * p.gradients


def seconds(p: Problem, strategy: str, machine: Machine) -> float:
    """Predicted time of a step."""
    product = p.block / machine.rate
    w = p.world
    if strategy == "gather":
        # all_gather of keys; MAX and SUM of the columns; all_gather of two vectors; reduce_scatter of gradients
        time = p.passes() * product
        time += (w - 1) * (machine.message(p.keys) + machine.message(p.gradients))
        if p.sums:
            time += 4 * (w - 1) * machine.message(8 * p.rows) + (w - 1) * machine.message(8 * p.rows)
        return time
    hops = w // 2 if p.symmetric else w - 1
    half = p.symmetric and w % 2 == 0
    own = 0.5 if p.symmetric else 1.0
    time = (FORWARD + BACKWARD) * own * product
    for step in range(1, hops + 1):
        part = 0.5 if half and step == hops else 1.0
        for passes, travelling in (
            (FORWARD, p.keys + (8 * p.rows if p.sums else 0)),
            (BACKWARD, p.keys + p.gradients + (8 * p.rows if p.sums else 0)),
        ):
            time += max(part * passes * product, machine.message(travelling))
    return time + machine.message(8 * p.rows if p.sums else 0) + machine.message(p.gradients)


def crossover(p: Problem, machine: Machine, free: float) -> str:
    """The way that is faster where its memory fits, and why."""
    if memory(p, "gather") > free:
        return "ring: a gather does not fit"
    gather, ring = (seconds(p, way, machine) for way in ("gather", "ring"))
    return "gather" if gather <= ring else "ring"

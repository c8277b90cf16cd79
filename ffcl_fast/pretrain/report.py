"""What a pretraining run leaves for people: a trace of its steps, TensorBoard events and curves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..train.checkpoint import write_atomically

TRACE = ("step", "loss", "samples_per_second", "peak_mib", "lr")  # of each point; steps are counted over all epochs
_EPOCH = ("epoch", "loss", "samples_per_second", "seconds", "peak_mib", "lr", "steps")

Record = dict[str, Any]


@dataclass
class Partial:
    """An epoch so far, over all processes: ``loss`` sums ``shares`` of the loss, one a step and process."""

    samples: int = 0
    steps: int = 0
    shares: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    trace: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TRACE})


def checked_partial(stored: dict[str, Any]) -> Partial:
    """A checkpoint's, {} being an epoch not begun. Raises ValueError or TypeError for what is none."""
    partial = Partial(**stored)
    counts = partial.samples, partial.steps, partial.shares
    if not all(type(n) is int and n >= 0 for n in counts) or not (_number(partial.loss) and _number(partial.seconds)):
        raise ValueError("its partial epoch has impossible numbers")
    _check_trace(partial.trace)
    return partial


def checked_history(stored: list[Any]) -> list[Record]:
    """A checkpoint's record of finished epochs. Raises ValueError for what is none."""
    for record in stored:
        if not isinstance(record, dict) or not all(_number(record.get(name)) for name in _EPOCH):
            raise ValueError("its history lacks what every epoch has")
        _check_trace(record.get("trace"))
    return stored


def _check_trace(trace: Any) -> None:
    if not isinstance(trace, dict) or set(trace) != set(TRACE):
        raise ValueError("its trace of an epoch is none")
    columns = list(trace.values())
    if not all(isinstance(c, list) and len(c) == len(columns[0]) and all(map(_number, c)) for c in columns):
        raise ValueError("its trace of an epoch is none")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Board:
    """TensorBoard events of a run; x is the number of optimiser steps, those of earlier epochs included."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was told of steps that a restart takes again is dropped on display
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def add(self, group: str, step: int, values: Record) -> None:
        for name, value in values.items():
            if _number(value) and name != "step":
                self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def points(history: Iterable[Record], name: str) -> list[float]:
    """One column of the trace over all epochs."""
    return [value for record in history for value in record["trace"][name]]


def curves(path: Path, history: list[Record], title: str, cpu: bool = True) -> None:
    """Loss, throughput and memory against steps, as PNG; on a CPU memory is all that a process had resident."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    shown = (
        ("loss", "loss"),
        ("samples_per_second", "samples a second, all processes"),
        ("peak_mib", "peak MiB a process, all of its life" if cpu else "peak MiB a GPU"),
    )
    steps = points(history, "step")
    ends = [record["trace"]["step"][-1] for record in history if record["trace"]["step"]]
    figure, axes = plt.subplots(1, len(shown), figsize=(10, 3), layout="constrained", dpi=150)
    try:
        for axis, (name, label) in zip(axes, shown, strict=True):
            values = points(history, name)
            axis.plot(steps, values, marker="o" if len(steps) < 40 else None, ms=3, lw=1.2)
            for end in ends[:-1] if len(ends) <= 50 else ():
                axis.axvline(end, color="0.8", lw=0.6, zorder=0)
            axis.set_xlabel("step (lines: ends of epochs)" if 1 < len(ends) <= 50 else "step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(label, fontsize=9)
            axis.grid(alpha=0.3)
            if name != "loss":
                axis.set_ylim(0, 1.1 * max(values, default=1.0))
        figure.suptitle(title)
        write_atomically(path, lambda scratch: figure.savefig(scratch))
    finally:
        plt.close(figure)

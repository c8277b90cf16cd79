"""What all processes must agree on before a loss starts, exchanged in one small collective.

A process whose arguments are wrong says so here in place of leaving the others to wait for it: the same text is raised
on every rank. 38 words a rank are exchanged; on an accelerator it costs one synchronisation with the host a step.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional import _checks
from . import STRATEGIES
from .exchange import Ring, _all_gather, told

_log = logging.getLogger("ffcl_fast.distributed")
_MORE = 3  # values of a loss's own that must be the same on every rank
_VALUES = ("scale", *(f"value{i}" for i in range(_MORE)))
_FIELDS = ("failed", "loss", "way", "rows", "keys", "dim", "dtype", "grads", "finite", "spare", *_VALUES)
_TEXT = 24  # words of the message: 192 bytes
_TOLERANCE = 1e-3  # of what each rank may have computed by itself


class RemoteError(ValueError):
    """Another process refused its arguments; the text names it and repeats its reason."""


@dataclass(frozen=True)
class Same:
    """A number that must be the same on every rank; unless ``exact`` as near as ranks that round differently are."""

    name: str
    value: float | Tensor
    exact: bool = True


@dataclass(frozen=True)
class Meeting:
    """What the processes told each other. ``rows``, ``keys``: of the anchors and the keys, one entry a process."""

    group: dist.ProcessGroup | None
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    strategy: str

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def ring(self) -> Ring:
        return Ring(self.group)

    def own(self, counts: Sequence[int]) -> slice:
        """This process's part of all rows, ``counts`` of them a process."""
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])


def meet(
    loss: str,
    prepare: Callable[[], tuple[Tensor, Tensor, Tensor]],
    group: dist.ProcessGroup | None,
    strategy: str,
    inputs: Sequence[tuple[str, object]],
    same: Callable[[], Sequence[Same]] = tuple,
) -> tuple[Tensor, Tensor, Tensor, Meeting]:
    """Check here, tell everyone, hear everyone: (q, k, scale, meeting).

    Args:
        loss: what runs; all processes must name the same.
        prepare: validates the arguments, raising TypeError or ValueError, and returns anchors (n, ...), keys (m, ...)
            and the scale.
        inputs: names and values whose elements must be finite.
        same: called after ``prepare``; what else must be the same on every rank, ``_MORE`` values at most.

    Raises:
        TypeError, ValueError: what ``prepare`` raised here, or that the processes do not fit together.
        RemoteError: it raised in another process.
        LostRank: a process did not come.
    """
    own: Exception | None = None
    words = dict.fromkeys(_FIELDS, 0)
    device, shared = None, [Same("scale (or 1 / temperature)", 0.0, exact=False)]
    try:
        q, k, scale = prepare()
        device = q.device
        shared = [Same(shared[0].name, scale, exact=False), *same()]
        words = _words(loss, strategy, q, k, shared, [x for _, x in inputs])
        if not words["finite"]:
            named = [*inputs, *((one.name, one.value) for one in shared)]
            bad = next(name for name, x in named if isinstance(x, Tensor) and not _finite(x))
            raise ValueError(f"{bad} holds NaN or infinity")
    except (TypeError, ValueError) as error:
        own, words["failed"] = error, 1
    table, texts = _exchange(list(words.values()), "" if own is None else f"{type(own).__name__}: {own}", device, group)
    facts = [dict(zip(_FIELDS, row, strict=True)) for row in table]
    for rank, (fact, text) in enumerate(zip(facts, texts, strict=True)):
        if fact["failed"]:
            if own is not None:
                raise own
            raise RemoteError(f"{loss} on rank {rank}: {text}")
    _compare(loss, facts, shared)
    meeting = Meeting(
        group, tuple(f["rows"] for f in facts), tuple(f["keys"] for f in facts), _chosen(strategy, facts, k)
    )
    return q, k, scale, meeting


def _words(
    loss: str, strategy: str, q: Tensor, k: Tensor, shared: Sequence[Same], inputs: Sequence[object]
) -> dict[str, int]:
    # one vector, so that an accelerator is waited for once
    extremes = [torch.stack(torch.aminmax(x.detach())) for x in inputs if isinstance(x, Tensor) and x.numel()]
    numbers = [s.value for s in shared if isinstance(s.value, Tensor)]
    vector = torch.cat([x.to(q.device, torch.float64) for x in (*extremes, *(x.detach().reshape(1) for x in numbers))])
    values = vector.tolist()
    read = iter(values[len(values) - len(numbers) :])
    same = [next(read) if isinstance(s.value, Tensor) else float(s.value) for s in shared]
    wants = (q.requires_grad, k.requires_grad, *(x.requires_grad for x in numbers)) if torch.is_grad_enabled() else ()
    return {
        "failed": 0,
        "loss": zlib.crc32(loss.encode()),
        "way": STRATEGIES.index(strategy),
        "rows": q.shape[0],
        "keys": k.shape[0],
        "dim": q.shape[-1],
        "dtype": _checks.FLOATING.index(q.dtype),
        "grads": sum(1 << i for i, want in enumerate(wants) if want),
        "finite": int(all(abs(v) < float("inf") for v in values)),
        "spare": _spare(q.device),
        **{name: _bits(x) for name, x in zip(_VALUES, same + [0.0] * (len(_VALUES) - len(same)), strict=True)},
    }


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _finite(x: Tensor) -> bool:
    return not x.numel() or all(bool(v.isfinite()) for v in torch.aminmax(x.detach()))


def _exchange(words, text: str, device, group) -> tuple[list[list[int]], list[str]]:
    raw = text.encode()[: 8 * _TEXT].ljust(8 * _TEXT, b"\0")
    mine = torch.tensor([*words, *struct.unpack(f"<{_TEXT}q", raw)], dtype=torch.int64)
    where = _device(device, group)
    everyone = torch.empty(dist.get_world_size(group) * len(mine), dtype=torch.int64, device=where)
    with told("agreeing on shapes", group):
        _all_gather(everyone, mine.to(where), group=group)
    table = everyone.view(-1, len(mine)).tolist()
    texts = [struct.pack(f"<{_TEXT}q", *row[-_TEXT:]).rstrip(b"\0").decode(errors="replace") for row in table]
    return [row[:-_TEXT] for row in table], texts


def _device(device: torch.device | None, group) -> torch.device:
    """Where the group can talk: the CPU if it has a backend for it, which spares an accelerator a copy."""
    cpu = torch.device("cpu")
    if device is not None and device.type == "cpu":
        return cpu
    if cpu in getattr(group or dist.group.WORLD, "_device_types", ()):
        return cpu
    return device or torch.device("cuda", torch.cuda.current_device())


def _compare(loss: str, facts: list[dict[str, int]], shared: Sequence[Same]) -> None:
    for name, shown, kind in (
        ("loss", None, ValueError),
        ("way", lambda i: repr(STRATEGIES[i]), ValueError),
        ("dtype", lambda i: str(_checks.FLOATING[i]), TypeError),
        ("dim", str, ValueError),
        ("grads", None, ValueError),
    ):
        other = next((rank for rank, fact in enumerate(facts) if fact[name] != facts[0][name]), None)
        if other is None:
            continue
        if name == "loss":
            raise kind(f"{loss}: ranks 0 and {other} are in different losses, or in one with different options")
        if name == "grads":
            raise kind(f"{loss}: ranks 0 and {other} want gradients of different arguments (requires_grad, no_grad)")
        what = {"way": "distributed (or dist_impl)", "dtype": "embeddings' dtype", "dim": "embeddings' width D"}[name]
        values = f"{shown(facts[0][name])} on rank 0, {shown(facts[other][name])} on rank {other}"
        raise kind(f"{loss}: the {what} must be the same on every rank: got {values}")
    for field, one in zip(_VALUES, shared, strict=False):
        numbers = [_number(fact[field]) for fact in facts]
        allowed = 0.0 if one.exact else _TOLERANCE * abs(numbers[0])
        other = next((r for r, x in enumerate(numbers) if abs(x - numbers[0]) > allowed), None)
        if other is not None:
            raise ValueError(
                f"{loss}: the {one.name} must be the same on every rank: got {numbers[0]:g} on rank 0,"
                f" {numbers[other]:g} on rank {other}"
            )


def _chosen(strategy: str, facts: list[dict[str, int]], k: Tensor) -> str:
    """``strategy``, or for "auto" the gather where all keys and a float32 gradient of them fit every process."""
    if strategy != "auto":
        return strategy
    needed = gather_bytes(sum(f["keys"] for f in facts), k[0].numel(), k.element_size())
    spare = min(f["spare"] for f in facts)
    chosen = "gather" if needed <= spare else "ring"
    _log.debug("%s: gathering takes %d bytes a process, %d can be spared", chosen, needed, spare)
    return chosen


def gather_bytes(keys: int, dim: int, element_size: int) -> int:
    """Bytes a process needs to hold all keys, their gradient in float32, and that as the collective sends it."""
    return keys * dim * (element_size + 8)


@functools.cache
def _spare(device: torch.device) -> int:
    """Bytes a process may spend on gathering: FFCL_GATHER_LIMIT, or a quarter of what was free at first use."""
    if os.environ.get("FFCL_GATHER_LIMIT"):
        return int(os.environ["FFCL_GATHER_LIMIT"])
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        free = 4 << 30
    return free // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

"""Which of its candidate tiles a kernel runs with: the table's first, or the one that was measured and stored on disk.

The table alone decides unless somebody measured: ``FFCL_TUNE=1`` times the candidates at the first call of a shape
class, outside CUDA-graph capture, and stores the best in ``FFCL_CACHE`` (default ``~/.cache/ffcl_fast``). A stored
choice is used from then on, tuning or not. So a training step is never held up by a measurement nobody asked for, and
the same machine runs the same configuration, hence gives the same bits, every time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

from . import config
from .config import Tile

_log = logging.getLogger("ffcl_fast.backends.triton")

_override: dict[str, Tile] = {}


def override(**tiles: Tile) -> contextlib.AbstractContextManager[None]:
    """Run kernels with the given tiles, whatever they leave out: ``override(forward=Tile(...), rows=Tile(...))``.
    For tests and measurements."""
    return _overriding({_name(op, ids): tile for op, tile in tiles.items() for ids in (False, True)})


@contextlib.contextmanager
def _overriding(tiles: dict[str, Tile]) -> Iterator[None]:
    before = dict(_override)
    _override.update(tiles)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def _name(op: str, ids: bool) -> str:
    return f"{op}/ids" if ids else op


def pick(op: str, q: Tensor, k: Tensor, ids: bool = False, measure: Callable[[], float] | None = None) -> Tile:
    """Tile of kernel `op` for these operands.

    ``measure()`` runs the whole operator once under :func:`override` and returns milliseconds; without it nothing is
    ever timed.
    """
    name = _name(op, ids)
    if name in _override:
        return _override[name]
    chip, operands, width = config.family(q.device), config.kind(q.dtype, config.precision(q)), q.shape[1]
    choices = config.candidates(op, chip, operands, width, ids)
    if len(choices) == 1 or chip == "interpret":
        return choices[0]
    known = _stored(q.device)
    # Asked for by `in` first: `get` of what is not there takes as long as a launch.
    tuning = measure and "FFCL_TUNE" in os.environ and os.environ["FFCL_TUNE"] == "1"
    tuning = tuning and not torch.cuda.is_current_stream_capturing()
    if not known and not tuning:
        return choices[0]
    key = f"{name}/{operands}/{width}/{_class(q.shape[0])}x{_class(k.shape[0])}"
    stored = known.get(key)
    # What a cache may say is which candidate: any other tile has been compiled and checked by nobody.
    if stored is not None and Tile(**stored) in choices:
        return Tile(**stored)
    return _tune(name, key, choices, measure, q.device) if tuning else choices[0]


def _class(n: int) -> int:
    """Shape class of a size: the power of two above it, within what changes the best tile."""
    return min(1 << 17, max(1 << 9, config.next_power_of_2(n)))


def _tune(name: str, key: str, choices: list[Tile], measure: Callable[[], float], device: torch.device) -> Tile:
    times = []
    for tile in choices:
        with _overriding({name: tile}):
            try:
                times.append(measure())
            except triton.runtime.errors.OutOfResources as error:
                _log.debug("%s: %s does not fit: %s", key, tile, error)
                times.append(float("inf"))
    tile = choices[times.index(min(times))]
    _log.debug("%s: %s, of %s ms", key, tile, times)
    _stored(device)[key] = asdict(tile)
    _write(device, key)
    return tile


@functools.cache
def source_hash() -> str:
    """Version of the kernels: a hash of this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file(device: torch.device) -> Path:
    """Where this device's measured choices are kept."""
    root = os.environ.get("FFCL_CACHE") or Path.home() / ".cache" / "ffcl_fast"
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")
    return Path(root) / f"{name}-triton{triton.__version__}-{source_hash()}.json"


@functools.cache
def _stored(device: torch.device) -> dict[str, dict]:
    return _read(cache_file(device))


def _read(path: Path) -> dict[str, dict]:
    try:
        found = json.loads(path.read_text())
        return {key: asdict(Tile(**tile)) for key, tile in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("cannot read the tuning results in %s: %s", path, error)
        return {}


def _write(device: torch.device, key: str) -> None:
    path, stored = cache_file(device), _stored(device)
    stored |= _read(path) | {key: stored[key]}  # other processes, one a GPU, have written since it was read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                json.dump(stored, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        _log.warning("cannot store tuning results in %s: %s", path, error)

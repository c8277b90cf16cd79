"""Checkpoints that survive a kill at any moment: whole folders that appear by one rename, each with its checksums.

    checkpoints/global-0003/weights.safetensors   the network
                            state.pt              optimiser and schedule (loaded with weights_only=True)
                            manifest.json         stage, epoch, step, history, best epoch; size and crc32 of the others
                global-0003-000500/               the same, 500 steps into epoch 4

               global.safetensors             what the stage handed on, once it is finished

Kept are the newest, the one before it (should the newest be damaged) and the best of their stages.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError, first_line

_WEIGHTS, _STATE, _MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
_FOLDER = re.compile(r"([a-z]+)-([0-9]+)(?:-([0-9]+))?")


@dataclass
class Progress:
    """Where a run stands: after ``epoch`` whole epochs of ``stage`` and ``step`` batches of the next one, ``partial``
    the sums of those. ``history``: stage -> one dict an epoch; ``best``: stage -> epoch of the best validation.

    No random state is in it: every draw depends on seed, stage, epoch and sample or step alone.
    """

    stage: str
    epoch: int = 0
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    best: dict[str, int] = field(default_factory=dict)
    step: int = 0
    partial: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.stage}-{self.epoch:04d}" + (f"-{self.step:06d}" if self.step else "")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, rename it to ``path``.

    Whatever goes wrong, ``path`` is either as it was or complete.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(scratch)
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """``text`` to ``path``, atomically."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_weights(path: Path, network: nn.Module) -> None:
    """The network's tensors as safetensors, atomically."""
    from safetensors.torch import save_model

    write_atomically(path, lambda scratch: _told(path, save_model, network, str(scratch)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """``state`` for :func:`torch.load`, atomically."""
    write_atomically(path, lambda scratch: _told(path, torch.save, state, scratch))


def load_state(path: Path, parts: dict[str, type]) -> dict[str, Any]:
    """:func:`save_state`'s ``state``, loaded without executing code; ``parts``: what it must hold.

    Raises UserError where it is damaged or not such a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a forged file makes the restricted unpickler say
        raise UserError(f"checkpoint {path}: not readable ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path}: holds a {type(state).__name__}, not a training's state")
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise UserError(f"checkpoint {path}: holds no {name} of a training")
    optimizer = state.get("optimizer")
    if isinstance(optimizer, dict) and not {"state", "param_groups"} <= set(optimizer):
        raise UserError(f"checkpoint {path}: its optimizer is not PyTorch's")
    return state


def _told(path: Path, write: Callable[..., Any], *arguments: Any) -> None:
    """``write(*arguments)``; a full disk, which these libraries tell as errors of their own, is an OSError."""
    try:
        write(*arguments)
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"cannot be written ({first_line(error)})", str(path)) from error


def load_weights(path: Path, network: nn.Module) -> None:
    """Fill ``network`` from :func:`save_weights`'s file. Raises UserError where it does not fit or is damaged."""
    from safetensors.torch import load_model

    try:
        load_model(network, path)
    except Exception as error:  # safetensors, OS and shape errors alike
        raise UserError(f"checkpoint {path}: cannot be read into this network ({first_line(error)})") from None


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


class Checkpoints:
    """The checkpoints of one run, in ``directory``."""

    def __init__(self, directory: Path, log: Callable[[str], None]) -> None:
        self.directory = directory
        self.log = log

    def save(self, progress: Progress, network: nn.Module, state: dict[str, Any]) -> None:
        """Write the checkpoint of ``progress`` and prune those that nothing needs any more."""
        self.directory.mkdir(parents=True, exist_ok=True)
        scratch = self.directory / f".{progress.folder}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            save_weights(scratch / _WEIGHTS, network)
            save_state(scratch / _STATE, state)
            files = {name: _fingerprint(scratch / name) for name in (_WEIGHTS, _STATE)}
            write_text(scratch / _MANIFEST, json.dumps({**asdict(progress), "files": files}, indent=1))
            target = self.directory / progress.folder
            shutil.rmtree(target, ignore_errors=True)  # left by an earlier try at the same epoch that proved damaged
            os.replace(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._prune(progress)

    def latest(self) -> Progress | None:
        """The newest undamaged checkpoint, or None where there is none at all; each damaged one is reported.

        Raises UserError where there are checkpoints but all are damaged.
        """
        found = self._all()
        for folder in reversed(found):
            problem = _damage(folder)
            if problem is None:
                return _read_manifest(folder)[0]
            self.log(f"checkpoint {folder}: damaged ({problem}); trying the one before it")
        if found:
            raise UserError(f"checkpoints {self.directory}: all {len(found)} are damaged; start anew, with a new name")
        return None

    def load(self, stage: str, epoch: int, network: nn.Module, step: int = 0) -> dict[str, Any]:
        """Fill ``network`` from that moment's checkpoint and return the optimiser and schedule state. Raises
        :class:`Damaged` before the network is touched."""
        folder = self.directory / Progress(stage, epoch, step=step).folder
        problem = _damage(folder)
        if problem is not None:
            raise Damaged(f"checkpoint {folder}: damaged ({problem})")
        load_weights(folder / _WEIGHTS, network)
        return load_state(folder / _STATE, {"optimizer": dict, "schedule": dict})

    def clear(self) -> None:
        """Delete all: the run is finished, and :meth:`finish_stage` has stored each stage's weights."""
        for folder in self._all():
            shutil.rmtree(folder, ignore_errors=True)

    def stage_weights(self, stage: str) -> Path:
        """The file with the weights that a finished stage ended with."""
        return self.directory / f"{stage}.safetensors"

    def finish_stage(self, stage: str, network: nn.Module) -> None:
        """Store the weights that ``stage`` hands on."""
        save_weights(self.stage_weights(stage), network)

    def _all(self) -> list[Path]:
        """Oldest first, by numbers: as text, epoch 10000 would come before 9999."""
        from .config import STAGES

        found = {}
        for folder in self.directory.glob("*-*"):
            name = _FOLDER.fullmatch(folder.name)
            if name and name[1] in STAGES and folder.is_dir():
                found[STAGES.index(name[1]), int(name[2]), int(name[3] or 0)] = folder
        return [found[moment] for moment in sorted(found)]

    def _prune(self, progress: Progress) -> None:
        # each of the newest two needs its own stage's best: that is what its stage hands on
        found = self._all()
        keep = {folder.name for folder in found[-2:]}
        stages = {name.partition("-")[0] for name in keep}
        keep |= {Progress(stage, best).folder for stage, best in progress.best.items() if stage in stages}
        for folder in found:
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, int]:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _read_manifest(folder: Path) -> tuple[Progress, dict[str, dict[str, int]]]:
    values = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    files = values.pop("files")
    progress = Progress(**values)
    _check(progress)
    return progress, files


def _check(progress: Progress) -> None:
    """ValueError for values that no run stores: right checksums do not tell who wrote the manifest."""
    if not all(type(number) is int and number >= 0 for number in (progress.epoch, progress.step)):
        raise ValueError("epoch and step are not whole numbers")
    history, best, partial = progress.history, progress.best, progress.partial
    if not all(isinstance(part, dict) for part in (history, best, partial)):
        raise ValueError("history, best or partial is not a mapping")
    if not all(isinstance(r, list) and all(isinstance(record, dict) for record in r) for r in history.values()):
        raise ValueError("history is not a list of epochs for each stage")
    for stage, epoch in best.items():
        trained = len(history[stage]) if stage in history else progress.epoch
        if type(epoch) is not int or not 1 <= epoch <= trained:
            raise ValueError(f"the best epoch of {stage} is none that was trained")
    means = [partial[name] for name in ("total", "window") if name in partial]
    if not all(isinstance(m, dict) and isinstance(m.get("sums"), dict) and type(m.get("count")) is int for m in means):
        raise ValueError("partial holds no sums of an epoch")
    if not isinstance(partial.get("trace", []), list):
        raise ValueError("partial holds no trace of an epoch")


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        progress, files = _read_manifest(folder)
        if progress.folder != folder.name:
            return f"{_MANIFEST} is of {progress.folder}"
        for name in (_WEIGHTS, _STATE):
            if _fingerprint(folder / name) != files[name]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None

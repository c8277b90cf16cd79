"""One training run from a :class:`Config` to a finished folder under ``runs/``."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ffcl_fast

from . import parallel, report
from .batches import derive_seed
from .checkpoint import Checkpoints, Progress, write_text
from .config import Config, load_config
from .data import Data, prepare
from .errors import Interrupted, UserError
from .model import Classifier, block_names, build, check_backbone
from .scoring import CHECKPOINTS, CONFIG, METRICS, probabilities, scores
from .stages import DownstreamStage, GlobalStage, LocalStage, Stage, Trainer

CURVES = "learning_curves.png"
_MOVABLE = ("workers", "data_dir", "device", "out", "name")  # settings that a resumed run may change


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what ``metrics.json`` in it says, and whether this process wrote it."""

    directory: Path
    metrics: dict[str, Any]
    first: bool = True


def train(
    config: Config,
    *,
    backbone: nn.Module | None = None,
    layers: Sequence[str] | None = None,
    resume: str | Path | None = None,
    data: Data | None = None,
    pictures: bool = True,
    log: Callable[[str], None] = print,
    bars: bool = False,
) -> Run:
    """Run the stages of ``config`` and write ``<out>/<name>/``; draws from PyTorch's global generator.

    backbone: a module of the caller's own, float32 (N, 1, S, S) in [0, 1] to (N, F), in place of ``config.backbone``.
    layers: names of its modules that the local stage trains, in order of depth; by default its blocks.
    resume: folder of an unfinished run to go on with, from its last stored epoch to bit-identical weights (on a CPU);
        ``config`` is then that run's own, see :func:`resumed_config`.
    data: what :func:`ffcl_fast.train.data.prepare` made of these settings before, to spare decoding it again.
    pictures: draw the learning curves. log: called with each line for the user. bars: show progress bars on a terminal.

    Raises UserError for wrong data, options, names or checkpoints; earlier runs are never written to.
    """
    if resume is not None and is_finished(Path(resume)):
        raise UserError(f"run {resume}: is finished already")
    if resume is None:  # by every process, and before they wait for each other
        check_place(Path(config.out), config.name)
    fabric = parallel.fabric_for(config)
    if 0 < config.epoch_samples < fabric.world_size:
        wanted = f"0 or at least one for each of {fabric.world_size} processes"
        raise UserError(f"epoch_samples: expected {wanted}, got {config.epoch_samples}")
    first = fabric.is_global_zero  # only the first process writes and speaks
    log, bars = (log, bars) if first else ((lambda line: None), False)
    device = fabric.device
    began = time.time()
    if backbone is None:
        check_backbone(config)
    if data is None:
        with fabric.rank_zero_first(local=True):  # it unpacks or downloads, the others find it done
            data = prepare(config, _decode_bar(bars))
    _greet(config, data, device, log)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    network = build(config, data.image_size, len(data.classes), backbone, log=log).to(device)
    parallel.same_weights(network)
    _speed_up(network, config, device, layers)
    stages = {name: _stage(name, network, config, data, layers) for name in config.stages}
    with ExitStack() as stack:
        directory = Path(resume) if resume is not None else _new_directory(config, data, stack) if first else None
        directory = fabric.broadcast(directory)
        if first and resume is not None:
            stack.callback(lock(directory))
        checkpoints = Checkpoints(directory / CHECKPOINTS, log)
        progress = fabric.broadcast((checkpoints.latest() or Progress(config.stages[0])) if first else None)
        board = stack.enter_context(report.Board(directory, progress)) if first else None
        base = {
            "status": "running",
            "name": directory.name,
            "data": data.summary(),
            "backbone": config.backbone if backbone is None else type(backbone).__name__,
            "own_backbone": backbone is not None,
            "parameters": sum(p.numel() for p in network.parameters()),
            "config": config.as_dict(),
            "versions": {
                "ffcl_fast": ffcl_fast.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": {"device": str(device), "threads": torch.get_num_threads()},
        }

        def on_epoch(progress: Progress, record: dict[str, Any]) -> None:
            if not first:
                return
            board.epoch(progress.stage, record)
            report.write_metrics(directory / METRICS, base, progress)
            log(report.epoch_line(progress.stage, record))

        trainer = Trainer(config, data, network, fabric, checkpoints, on_epoch, _epoch_bar(bars))
        try:
            for name in config.stages[config.stages.index(progress.stage) :]:
                if name != progress.stage:
                    progress.stage, progress.epoch, progress.step, progress.partial = name, 0, 0, {}
                trainer.fit(stages[name], progress)
                if first:
                    checkpoints.finish_stage(name, network)
        except KeyboardInterrupt:
            raise Interrupted(directory) from None
        metrics = _finish(base, progress, network, data, board, directory, config, pictures, began) if first else None
        metrics = fabric.broadcast(metrics)
        if first:
            checkpoints.clear()
    return Run(directory, metrics, first)


def _finish(
    base: dict[str, Any],
    progress: Progress,
    network: Classifier,
    data: Data,
    board: report.Board,
    directory: Path,
    config: Config,
    pictures: bool,
    began: float,
) -> dict[str, Any]:
    """Test once, draw, and write the final ``metrics.json``, which is returned."""
    base["status"] = "finished"
    base["seconds"] = time.time() - began
    if "downstream" in config.stages:
        probability = probabilities(network, data.test, config.batch_size)
        base["test"] = scores(probability, data.test.labels)
        board.test(base["test"])
    if pictures:
        report.learning_curves(directory / CURVES, base, progress)
    return report.write_metrics(directory / METRICS, base, progress)


def _speed_up(network: Classifier, config: Config, device: torch.device, layers: Sequence[str] | None) -> None:
    """The memory format and compiled blocks that ``config`` asks for; numbers and names of weights stay."""
    last = config.memory_format == "channels_last" or (config.memory_format == "auto" and device.type == "cuda")
    if last:
        network.to(memory_format=torch.channels_last)
    if config.compile == "blocks":
        for name in block_names(network.backbone, layers):
            block = network.backbone.get_submodule(name)
            block.forward = torch.compile(block.forward)  # its hooks, where the local stage cuts, stay outside


def resumed_config(directory: Path, flags: dict[str, Any]) -> Config:
    """The config of the run in ``directory``, with flags that only move it to another machine or place.

    Raises UserError for a folder that is no run, and for flags that would make it another run.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"resume {directory}: no run of ffcl train is there (it has no {CONFIG})")
    stored = load_config({}, directory / CONFIG)
    config = load_config(flags, directory / CONFIG)
    changed = [key for key, value in config.as_dict().items() if key not in _MOVABLE and value != stored.as_dict()[key]]
    if changed:
        raise UserError(
            f"{changed[0]}: a resumed run keeps its own, {getattr(stored, changed[0])!r}; leave the flag out"
        )
    return config


def _free_the_name(directory: Path) -> Callable[..., None]:
    """What an ExitStack calls at the end: deletes a new run's folder where a mistake of the user's was found before
    anything was stored, so that the name can be given again. All else (Ctrl-C, a full disk, a killed worker) keeps it,
    since that run can be resumed."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) and not any((directory / CHECKPOINTS).glob("*/manifest.json")):
            shutil.rmtree(directory, ignore_errors=True)

    return leave


def is_finished(directory: Path) -> bool:
    """Whether ``metrics.json`` there says so."""
    try:
        return json.loads((directory / METRICS).read_text(encoding="utf-8"))["status"] == "finished"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def lock(directory: Path) -> Callable[[], None]:
    """Keep other processes out of a run's folder until the returned function is called (or this process ends)."""
    handle = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"run {directory}: another process is training it") from None
    return lambda: os.close(handle)


def _stage(name: str, network: Classifier, config: Config, data: Data, layers: Sequence[str] | None) -> Stage:
    if name == "local":
        return LocalStage(network, config, layers)
    if name == "global":
        return GlobalStage(network, config)
    return DownstreamStage(network, config, data.train)


def _new_directory(config: Config, data: Data, held: ExitStack) -> Path:
    """A folder that did not exist before, with its settings and locked while ``held``: no run is written over, and none
    is ever without its settings, whenever it is killed, since it could not be resumed."""
    out = Path(config.out)
    name = config.name
    if name is None:
        name = f"{data.name}-{config.backbone}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        name = re.sub(r"[^\w.-]+", "-", name).lstrip(".")
        taken, base = 1, name
        while (out / name).exists():
            taken += 1
            name = f"{base}-{taken}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / name).exists():
            raise FileExistsError
        with tempfile.TemporaryDirectory(dir=out, prefix=".ffcl-") as scratch:
            whole = Path(scratch, "run")
            whole.mkdir()
            held.callback(lock(whole))  # before anybody else can find it
            write_text(whole / CONFIG, report.yaml_text(config.as_dict()))
            whole.rename(out / name)
    except FileExistsError:
        raise _taken(out, name) from None
    except OSError as error:
        if (out / name).exists():  # since a moment ago
            raise _taken(out, name) from None
        raise UserError(f"out {out}: cannot be written ({error.strerror})") from None
    held.push(_free_the_name(out / name))
    return out / name


def check_place(out: Path, name: str | None = None) -> None:
    """UserError for a name that is taken or a folder that cannot be written, before anything is read or decoded."""
    if (out.exists() and not out.is_dir()) or (name is not None and (out / name).exists()):
        raise _taken(out, name or "")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".ffcl-"):
            pass
    except OSError as error:
        raise UserError(f"out {out}: cannot be written ({error.strerror})") from None


def _taken(out: Path, name: str) -> UserError:
    if not out.is_dir():
        return UserError(f"out {out}: is not a folder")
    can = (out / name / CONFIG).is_file() and not is_finished(out / name)
    hint = f", or go on with it: --resume {out / name}" if can else ""
    return UserError(f"run {out / name}: exists already and is left as it is; choose another --name{hint}")


def _greet(config: Config, data: Data, device: torch.device, log: Callable[[str], None]) -> None:
    for note in data.notes:
        log(note)
    sizes = f"{len(data.train)} train, {len(data.val)} validation, {len(data.test)} test"
    log(f"{data.name}: {sizes} images of {data.image_size} x {data.image_size}, {len(data.classes)} classes")
    log(f"{config.backbone} on {device}, stages {', '.join(config.stages)}, seed {config.seed}")


def _epoch_bar(shown: bool) -> Callable[[int, str], Any]:
    from tqdm import tqdm

    # None: only on a terminal; log files get one line an epoch instead
    return lambda total, text: tqdm(
        total=total, desc=text, unit="img", leave=False, dynamic_ncols=True, disable=None if shown else True
    )


def _decode_bar(shown: bool) -> Callable:
    from tqdm import tqdm

    return lambda batches, total, text: tqdm(
        batches, total=total, desc=text, unit="batch", leave=False, dynamic_ncols=True, disable=None if shown else True
    )

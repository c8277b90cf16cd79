"""One pretraining run under torchrun or alone, from a :class:`Config` to a finished folder under ``runs/``.

Rank 0 writes; every epoch, and every ``--checkpoint-every`` steps of it, ends in a checkpoint that appears by one
rename. A process that is lost ends the others with an error within ``--timeout`` seconds, and torchrun's
``--max-restarts`` then goes on from the last checkpoint.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ffcl_fast

from .. import distributed as processes
from ..distributed.exchange import LostRank, of_backend
from ..train.batches import derive_seed
from ..train.checkpoint import load_state, save_state, save_weights, write_text
from ..train.config import Config as TrainConfig
from ..train.errors import UserError, first_line
from ..train.model import check_backbone
from ..train.parallel import join, restarts
from ..train.report import yaml_text
from ..train.run import lock
from .config import CONFIG, MOVABLE, Config
from .data import Batch, Source, open_source
from .model import Pretraining
from .report import TRACE, Board, Partial, Record, checked_history, checked_partial, curves

LAST, WEIGHTS, METRICS, CURVES = "last.pt", "backbone.safetensors", "metrics.json", "curves.png"
_PREPARATION = datetime.timedelta(hours=2)  # that processes wait while one reads the data; a dead one shows at once
_TELL = 30  # seconds at least between two lines for the user within an epoch


def pretrain(config: Config, *, resume: bool = False, log: Callable[[str], None] = print) -> Path:
    """Run ``config`` and return the run's folder. Joins the process group that torchrun describes, where it does.

    resume: go on with an unfinished run of that name; after a restart by torchrun this is understood.
    Raises UserError for wrong data, settings or names, LostRank where another process is gone.
    """
    device = _device(config)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ours = join(backend, datetime.timedelta(seconds=config.timeout))
    rank, world = processes.rank(), processes.world_size()
    resume = resume or restarts() > 0
    folder = Path(config.out) / config.run_name
    with ExitStack() as held:
        if ours:
            held.callback(_leave)
        try:
            patient = dist.new_group(timeout=_PREPARATION, backend="gloo") if world > 1 else None
            source = _opened(folder, config, resume, rank, patient)
            state = _shared(lambda: _prepared(folder, config, resume, held), rank, patient)
            training = _Training(config, source, device, rank, world, folder, log if rank == 0 else lambda line: None)
            held.callback(training.close)
            training.run(state)
            return folder
        except RuntimeError as error:  # of a collective between losses: DistributedDataParallel's, a broadcast
            if isinstance(error, LostRank) or not of_backend(error):
                raise
            raise LostRank(
                f"rank {rank} of {world} heard no more from another one, which has died, has raised, or did not come"
                f" within {config.timeout} s ({str(error).partition(chr(10))[0]})"
            ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(config: Config) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda: this machine or this PyTorch has none")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _opened(folder: Path, config: Config, resume: bool, rank: int, group: Any) -> Source:
    """Rank 0 first: it unpacks or downloads what the others then find."""

    def first() -> Source:
        _check_name(folder, resume)  # before minutes of reading
        check_backbone(TrainConfig(backbone=config.backbone))
        source = open_source(config)
        if not source.steps(processes.world_size()):
            raise UserError(
                f"data {config.data}: {source.samples} samples an epoch are too few for {processes.world_size()}"
                " processes, two for each"
            )
        return source

    source = _shared(first, rank, group, send=False)
    return source if rank == 0 else open_source(config)


def _shared(make: Callable[[], Any], rank: int, group: Any, send: bool = True) -> Any:
    """What ``make`` returns on rank 0, sent to all of ``group`` if ``send``; its UserError is raised on all."""
    result, problem = None, None
    if rank == 0:
        try:
            result = make()
        except UserError as error:
            problem = str(error)
    if processes.world_size() > 1:
        box = [(result if send else None, problem)]
        dist.broadcast_object_list(box, group=group)
        result, problem = (box[0][0] if rank and send else result), box[0][1]
    if problem is not None:
        raise UserError(problem)
    return result


def _check_name(folder: Path, resume: bool) -> None:
    if resume and not folder.exists() and not restarts():
        raise UserError(f"resume: there is no run {folder}")
    if folder.exists() and not resume:
        raise UserError(f"run {folder}: exists already; choose another --name, or go on with it: --resume")


def _prepared(folder: Path, config: Config, resume: bool, held: ExitStack) -> dict[str, Any] | None:
    """Rank 0's part: a new folder, or the state of the one to go on with; nobody else may train it while ``held``."""
    _check_name(folder, resume)
    if not folder.exists():
        held.push(_free_the_name(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {config.out}: cannot be written ({error.strerror})") from None
    held.callback(lock(folder))
    if not (folder / LAST).exists():
        write_text(folder / CONFIG, yaml_text(config.as_dict()))
        return None
    parts = {"config": dict, "model": dict, "optimizer": dict, "partial": dict, "history": list}
    state = load_state(folder / LAST, parts)
    changed = [k for k, v in config.as_dict().items() if k not in MOVABLE and state["config"].get(k) != v]
    if changed:
        raise UserError(f"{changed[0]}: a resumed run keeps its own, {state['config'].get(changed[0])!r}")
    return state


def _free_the_name(folder: Path) -> Callable[..., None]:
    """What an ExitStack calls: deletes a new run's folder where a mistake of the user's was found before anything was
    stored, so that the name can be given again."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) and not (folder / LAST).exists():
            shutil.rmtree(folder, ignore_errors=True)

    return leave


class _Training:
    def __init__(self, config: Config, source: Source, device, rank: int, world: int, folder: Path, log) -> None:
        self.config, self.source, self.device = config, source, device
        self.rank, self.world, self.folder, self.log = rank, world, folder, log
        self.model = Pretraining(config, source.image_size).to(device)
        self.backbone = self.model.images.backbone
        if world > 1:
            if device.type == "cuda":
                self.model.images = nn.SyncBatchNorm.convert_sync_batchnorm(self.model.images)
            for name in ("images", "texts"):
                module = getattr(self.model, name)
                if module is not None:
                    setattr(self.model, name, DistributedDataParallel(module))
        self.together = config.batch_size * world
        self.lr = config.lr * (self.together / 256) ** 0.5
        # Matrices and filters decay; biases, BatchNorm's parameters and CLIP's scale do not.
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr)
        self.steps = source.steps(world)
        self.history: list[Record] = []
        self.partial = Partial()
        self.board: Board | None = None
        self.told = time.perf_counter()

    def run(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self._load(state)
        self.schedule = self._scheduled()
        first = len(self.history)
        if first == self.config.epochs:
            self.log(f"{self.folder} is finished already")
        elif state is not None:
            within = f" and {self.partial.steps} steps" if self.partial.steps else ""
            self.log(f"going on after epoch {first}{within} of {self.config.epochs}")
        self.log(
            f"{self.config.method} on {self.config.data}, {self.config.backbone}, {self.world} processes of"
            f" {self.config.batch_size} samples, {self.steps} steps an epoch on {self.device}"
        )
        self.board = Board(self.folder, self.step) if self.rank == 0 else None
        for number in range(first, self.config.epochs):
            record = self._epoch(number)
            self.history.append(record)
            self.partial = Partial()
            self._save()
            if self.board is not None:
                self.board.add("epoch", self.step, record)
            self.log(
                f"epoch {number + 1}/{self.config.epochs}: loss {record['loss']:.4f},"
                f" {record['samples_per_second']:.0f} samples/s, peak {record['peak_mib']:.0f} MiB a process"
            )
        if self.board is not None:
            save_weights(self.folder / WEIGHTS, self.backbone)
            self._metrics("finished")
            title = f"{self.config.method} on {self.config.data}"
            curves(self.folder / CURVES, self.history, title, self.device.type == "cpu")
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Its thread must not write into a folder that is gone."""
        if self.board is not None:
            self.board.close()

    @property
    def step(self) -> int:
        """Optimiser steps so far, of all epochs, as many processes as there were."""
        return sum(record["steps"] for record in self.history) + self.partial.steps

    def _scheduled(self) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate's course, from where the epochs stand: it depends on no earlier number of processes."""
        done = len(self.history) * self.steps + self.partial.samples // self.together
        total = self.steps * self.config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.lr
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _factor(step, self.steps, total), last_epoch=done - 1
        )

    def _epoch(self, number: int) -> Record:
        self.model.train()
        remaining = self.source.steps(self.world, self.partial.samples)
        every = self.config.log_every or max(1, min(50, self.steps // 10))
        window = _Window(self.device)
        for batch in self.source.epoch(number, self.rank, self.world, self.partial.samples):
            batch = Batch(*(x.to(self.device, non_blocking=True) for x in (batch.first, batch.second, batch.labels)))
            torch.manual_seed(derive_seed(self.config.seed, "step", number, window.at(self.partial), self.rank))
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self._checked_step(batch)
            self.optimizer.step()
            self.schedule.step()
            self.model.clamp_()
            window.add(loss, len(batch.labels))
            remaining -= 1
            due = self.config.checkpoint_every and window.at(self.partial) % self.config.checkpoint_every == 0
            if due or not remaining or window.at(self.partial) % every == 0:
                self._log_steps(window)
                if due and remaining:
                    self._save()
                window = _Window(self.device)
        done = self.partial
        record: Record = {
            "epoch": number + 1,
            "loss": done.loss / max(1, done.shares),  # the mean over processes and steps
            "samples_per_second": done.samples / max(1e-9, done.seconds),
            "seconds": done.seconds,
            "peak_mib": max(done.trace["peak_mib"], default=0.0),
            "lr": float(self.schedule.get_last_lr()[0]),
            "steps": done.steps,
            "processes": self.world,
            "trace": done.trace,
        }
        if self.model.log_scale is not None:
            record["scale"] = float(self.model.log_scale.detach().exp())
        return record

    def _checked_step(self, batch: Batch) -> torch.Tensor:
        try:
            return self.model.step(batch)
        except ValueError as error:  # embeddings that are not finite; a chunk too small for BatchNorm
            raise UserError(f"epoch {len(self.history) + 1}: {first_line(error)}") from error

    def _log_steps(self, window: _Window) -> None:
        """The window's loss and throughput over all processes, told and added to the epoch so far."""
        sums = torch.tensor([window.loss.item(), window.steps, window.samples], dtype=torch.float64)
        seconds = time.perf_counter() - window.began  # after the device has finished
        peak = torch.tensor([_peak_mib(self.device)], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        total, shares, samples = sums.tolist()
        done = self.partial
        done.steps += window.steps
        done.shares, done.samples = done.shares + int(shares), done.samples + int(samples)
        done.loss, done.seconds = done.loss + total, done.seconds + seconds
        point = dict(zip(TRACE, (self.step, total / shares, samples / seconds, float(peak),
                                 float(self.schedule.get_last_lr()[0])), strict=True))  # fmt: skip
        if not math.isfinite(point["loss"]):
            raise UserError(f"lr: the loss is {point['loss']} after step {self.step}; try a smaller --lr")
        for name, value in point.items():
            done.trace[name].append(value)
        if self.board is not None:
            self.board.add("step", self.step, point)
        if time.perf_counter() - self.told > _TELL:
            self.told = time.perf_counter()
            self.log(
                f"epoch {len(self.history) + 1}/{self.config.epochs}, step {done.steps}/{self.steps}:"
                f" loss {point['loss']:.4f}, {point['samples_per_second']:.0f} samples/s"
            )

    def _plain(self) -> dict[str, Any]:
        """The model's state under the names it has in one process, so that any number can go on with it."""
        return {name.replace(".module.", ".", 1): value for name, value in self.model.state_dict().items()}

    def _load(self, state: dict[str, Any]) -> None:
        wrapped = {name.replace(".module.", ".", 1): name for name in self.model.state_dict()}
        try:
            self.model.load_state_dict({wrapped[name]: value for name, value in state["model"].items()})
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.partial = checked_history(state["history"]), checked_partial(state["partial"])
        except Exception as error:  # whatever PyTorch says to a forged file
            raise UserError(f"checkpoint {self.folder / LAST}: does not fit this run ({first_line(error)})") from None

    def _save(self) -> None:
        if self.rank:
            return
        state = {
            "config": self.config.as_dict(),
            "model": self._plain(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "partial": asdict(self.partial),
        }
        save_state(self.folder / LAST, state)
        self._metrics("running")

    def _metrics(self, status: str) -> None:
        metrics = {
            "status": status,
            "config": self.config.as_dict(),
            "processes": self.world,
            "device": str(self.device),
            "versions": {"ffcl_fast": ffcl_fast.__version__, "torch": torch.__version__},
            "epochs": self.history,
        }
        write_text(self.folder / METRICS, json.dumps(metrics, indent=1))


class _Window:
    """What one process has done since the last record; reading ``loss`` waits for the device, adding to it does not."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = self.samples = 0
        self.began = time.perf_counter()

    def add(self, loss: torch.Tensor, samples: int) -> None:
        self.loss += loss.detach()
        self.steps, self.samples = self.steps + 1, self.samples + samples

    def at(self, done: Partial) -> int:
        """Steps of the epoch, those before the last record included."""
        return done.steps + self.steps


def _factor(step: int, warm: int, total: int) -> float:
    """Of the learning rate: rising over the first ``warm`` steps, then falling along a cosine."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

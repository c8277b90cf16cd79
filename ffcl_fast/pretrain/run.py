"""One pretraining run under torchrun or alone, from a :class:`Config` to a finished folder under ``runs/``.

Rank 0 writes; every epoch ends in a checkpoint that appears by one rename. A process that is lost ends the others with
an error within ``--timeout`` seconds, and torchrun's ``--max-restarts`` then goes on from the last checkpoint.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed as processes
from ..distributed.exchange import LostRank, of_backend
from ..train import report
from ..train.checkpoint import load_state, save_state, save_weights, write_atomically, write_text
from ..train.errors import UserError, first_line
from ..train.parallel import join, restarts
from .config import Config
from .data import Batch, Source, open_source
from .model import Pretraining

LAST, WEIGHTS, METRICS, CONFIG, CURVES = "last.pt", "backbone.safetensors", "metrics.json", "config.yaml", "curves.png"
_PREPARATION = datetime.timedelta(hours=2)  # that processes wait while one reads the data; a dead one shows at once
_MOVABLE = ("workers", "data_dir", "device", "out", "name", "timeout", "distributed")


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
    try:
        patient = dist.new_group(timeout=_PREPARATION, backend="gloo") if world > 1 else None
        source = _opened(folder, config, resume, rank, patient)
        state = _shared(lambda: _prepared(folder, config, resume), rank, patient)
        training = _Training(config, source, device, rank, world, folder, log if rank == 0 else lambda line: None)
        training.run(state)
        return folder
    except RuntimeError as error:  # of a collective between losses: DistributedDataParallel's, a broadcast
        if isinstance(error, LostRank) or not of_backend(error):
            raise
        raise LostRank(
            f"rank {rank} of {world} heard no more from another one, which has died, has raised, or did not come within"
            f" {config.timeout} s ({str(error).partition(chr(10))[0]})"
        ) from error
    finally:
        if ours and dist.is_initialized():
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
        return open_source(config)

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


def _prepared(folder: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """Rank 0's part: a new folder, or the state of the one to go on with."""
    _check_name(folder, resume)
    if not (folder / LAST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, report.yaml_text(config.as_dict()))
        return None
    parts = {"config": dict, "model": dict, "optimizer": dict, "schedule": dict, "history": list}
    state = load_state(folder / LAST, parts)
    changed = [k for k, v in config.as_dict().items() if k not in _MOVABLE and state["config"].get(k) != v]
    if changed:
        raise UserError(f"{changed[0]}: a resumed run keeps its own, {state['config'].get(changed[0])!r}")
    return state


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
        together = config.batch_size * world
        self.lr = config.lr * (together / 256) ** 0.5
        # Matrices and filters decay; biases, BatchNorm's parameters and CLIP's scale do not.
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr)
        self.steps = source.steps(world)
        total = self.steps * config.epochs

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _factor(step, self.steps, total))
        self.history: list[dict[str, float]] = []

    def run(self, state: dict[str, Any] | None) -> None:
        first = 0
        if state is not None:
            self._load(state)
            first = len(self.history)
            self.log(f"going on after epoch {first} of {self.config.epochs}")
        self.log(
            f"{self.config.method} on {self.config.data}, {self.config.backbone}, {self.world} processes of"
            f" {self.config.batch_size} samples, {self.steps} steps an epoch on {self.device}"
        )
        board = _Board(self.folder, first) if self.rank == 0 else None
        for number in range(first, self.config.epochs):
            record = self._epoch(number)
            self.history.append(record)
            self._save()
            if board is not None:
                board.add(number + 1, record)
            self.log(
                f"epoch {number + 1}/{self.config.epochs}: loss {record['loss']:.4f},"
                f" {record['samples_per_second']:.0f} samples/s, peak {record['peak_mib']:.0f} MiB a process"
            )
        if self.rank == 0:
            board.close()
            save_weights(self.folder / WEIGHTS, self.backbone)
            self._metrics("finished")
            title = f"{self.config.method} on {self.config.data}"
            curves(self.folder / CURVES, self.history, title, self.device.type == "cpu")
        if self.world > 1:
            dist.barrier()

    def _epoch(self, number: int) -> dict[str, float]:
        self.model.train()
        losses, counted = torch.zeros((), dtype=torch.float64, device=self.device), [0, 0]  # samples, steps
        began = time.perf_counter()
        for batch in self.source.epoch(number, self.rank, self.world):
            batch = Batch(*(x.to(self.device, non_blocking=True) for x in (batch.first, batch.second, batch.labels)))
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss = self.model.step(batch)
            self.optimizer.step()
            self.schedule.step()
            self.model.clamp_()
            losses += loss.detach()  # read once an epoch: a step must not wait for the device
            counted = [counted[0] + len(batch.labels), counted[1] + 1]
        total = torch.tensor([losses.item(), *counted], dtype=torch.float64)
        seconds = time.perf_counter() - began
        peak = torch.tensor([_peak_mib(self.device)], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        record: dict[str, float] = {
            "epoch": number + 1,
            "loss": float(total[0] / total[2]),  # the mean over processes and steps
            "samples_per_second": float(total[1]) / seconds,
            "seconds": seconds,
            "peak_mib": float(peak),
            "lr": float(self.schedule.get_last_lr()[0]),
        }
        if self.model.log_scale is not None:
            record["scale"] = float(self.model.log_scale.detach().exp())
        return record

    def _plain(self) -> dict[str, Any]:
        """The model's state under the names it has in one process, so that any number can go on with it."""
        return {name.replace(".module.", ".", 1): value for name, value in self.model.state_dict().items()}

    def _load(self, state: dict[str, Any]) -> None:
        wrapped = {name.replace(".module.", ".", 1): name for name in self.model.state_dict()}
        try:
            self.model.load_state_dict({wrapped[name]: value for name, value in state["model"].items()})
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.history = [{name: float(value) for name, value in record.items()} for record in state["history"]]
            if not all({"epoch", "loss", "samples_per_second", "peak_mib"} <= set(record) for record in self.history):
                raise ValueError("its history lacks what every epoch has")
        except Exception as error:  # whatever PyTorch says to a forged file
            raise UserError(f"checkpoint {self.folder / LAST}: does not fit this run ({first_line(error)})") from None

    def _save(self) -> None:
        if self.rank:
            return
        state = {
            "config": self.config.as_dict(),
            "model": self._plain(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "history": self.history,
        }
        save_state(self.folder / LAST, state)
        self._metrics("running")

    def _metrics(self, status: str) -> None:
        metrics = {
            "status": status,
            "config": self.config.as_dict(),
            "processes": self.world,
            "device": str(self.device),
            "epochs": self.history,
        }
        write_text(self.folder / METRICS, json.dumps(metrics, indent=1))


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


class _Board:
    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def add(self, epoch: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def curves(path: Path, history: list[dict[str, float]], title: str, cpu: bool = True) -> None:
    """Loss, throughput and memory against epochs, as PNG; on a CPU memory is all that a process had resident."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    shown = (
        ("loss", "loss"),
        ("samples_per_second", "samples a second, all processes"),
        ("peak_mib", "peak MiB a process, all of its life" if cpu else "peak MiB a GPU"),
    )
    figure, axes = plt.subplots(1, len(shown), figsize=(10, 3), layout="constrained", dpi=150)
    try:
        for axis, (name, label) in zip(axes, shown, strict=True):
            axis.plot([r["epoch"] for r in history], [r[name] for r in history], marker="o", ms=3)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(label, fontsize=9)
            axis.grid(alpha=0.3)
            if name != "loss":
                axis.set_ylim(0, 1.1 * max(r[name] for r in history))
        figure.suptitle(title)
        write_atomically(path, lambda scratch: figure.savefig(scratch))
    finally:
        plt.close(figure)

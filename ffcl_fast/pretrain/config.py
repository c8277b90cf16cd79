"""Settings of a pretraining run. Imports no torch, so that ``ffcl --help`` stays quick."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..train.config import read_yaml, unknown_setting
from ..train.errors import UserError

METHODS = ("simclr", "supcon", "clip")
CONFIG = "config.yaml"  # in a run's folder: its settings
# Settings that a resumed run may change.
MOVABLE = ("workers", "data_dir", "device", "out", "name", "timeout", "distributed", "log_every", "checkpoint_every")


def _option(default: Any, text: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Config:
    """Raises :class:`UserError` that names the setting for an impossible value."""

    data: str = _option(
        "digits", "digits, a MedMNIST name, an image folder or .tar with train/ and test/, or WebDataset shards: a"
        " pattern as 'shards-{000..099}.tar' or a folder of .tar files, samples of an image and .cls or .txt",
    )  # fmt: skip
    data_dir: str = _option("", "where MedMNIST files lie (else $FFCL_DATA, ../shared/data, ~/.medmnist)")
    method: str = _option("simclr", "simclr: two views; supcon: and labels; clip: images and captions", choices=METHODS)
    backbone: str = _option("resnet18", "a torchvision or timm model")
    image_size: int = _option(0, "pixels a side; 0: that of the data, 64 for folders and shards", low=0, high=2048)
    width: int = _option(128, "width D of the embeddings", low=1, high=4096)
    temperature: float = _option(0.2, "temperature; clip learns it from there", above=0.0)
    batch_size: int = _option(256, "samples a step and process", low=1)
    chunk_size: int = _option(0, "samples encoded at a time by cached_step; 0: the whole batch at once", low=0)
    distributed: str = _option("auto", "way of the loss between processes", choices=("auto", "gather", "ring"))
    epochs: int = _option(10, "passes over the training images", low=1)
    epoch_samples: int = _option(0, "samples an epoch over all processes; 0: all; needed for shards", low=0)
    lr: float = _option(
        1e-3,
        "AdamW's learning rate for 256 samples a step over all processes, scaled by the square root of their number;"
        " after one epoch of warm-up it falls along a cosine",
        above=0.0,
    )
    weight_decay: float = _option(1e-4, "AdamW's weight decay", low=0.0)
    precision: str = _option("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16"))
    seed: int = _option(0, "seed of everything random", low=0, high=2**32 - 1)
    workers: int = _option(0, "processes that decode and augment, for each process that trains", low=0, high=256)
    device: str = _option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    log_every: int = _option(
        0, "steps between two records of loss and throughput; 0: ten or more an epoch, at most 50 steps", low=0
    )
    checkpoint_every: int = _option(0, "steps between checkpoints within an epoch; 0: at epochs' ends only", low=0)
    timeout: int = _option(120, "seconds until a silent process counts as lost", low=1)
    out: str = _option("runs", "folder that holds the runs")
    name: str = _option("", "name of this run; default: method, data and seed")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if set(self.name) & set("/\\\0") or self.name in (".", ".."):
            raise UserError(f"name: expected a plain folder name, got {self.name!r}")

    @property
    def run_name(self) -> str:
        """The run's folder; without a time in it, so that a restarted process finds it again."""
        data = self.data.rstrip("/").rpartition("/")[2]
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in data).strip(".-")
        return self.name or f"{self.method}-{plain}-s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    kind: Any = type(field.default)
    limits = field.metadata
    try:
        if isinstance(value, bool) or (kind is str) != isinstance(value, str) and kind is str:
            raise ValueError
        number = kind(value)
        if kind is not str and not math.isfinite(number) or kind is int and number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        name = {int: "a whole number", float: "a number", str: "text"}[kind]
        raise UserError(f"{field.name}: expected {name}, got {value!r}") from None
    if "choices" in limits and number not in limits["choices"]:
        raise UserError(f"{field.name}: expected one of {', '.join(limits['choices'])}, got {value!r}")
    if kind is not str:
        low, high, above = (limits.get(key) for key in ("low", "high", "above"))
        if (
            low is not None
            and number < low
            or high is not None
            and number > high
            or above is not None
            and number <= above
        ):
            bounds = [f"{w} {v}" for w, v in ((">=", low), ("<=", high), ("above", above)) if v is not None]
            raise UserError(f"{field.name}: expected a number {' and '.join(bounds)}, got {value!r}")
    return number


def resumed_config(run: str, flags: Mapping[str, Any]) -> Config:
    """The settings of the run in the folder ``run``, or of that name in ``--out``, with flags that only move it.

    Raises UserError for a folder that is no run, and for flags that would make it another run.
    """
    if "name" in flags:
        raise UserError("name: cannot be given with --resume RUN, which names the run")
    directory = Path(run)
    if not (directory / CONFIG).is_file() and (Path(flags.get("out", Config.out)) / run / CONFIG).is_file():
        directory = Path(flags.get("out", Config.out)) / run
    if not (directory / CONFIG).is_file():
        raise UserError(f"resume: there is no run {directory} (it has no {CONFIG})")
    if directory.name in ("", ".."):
        directory = directory.resolve()
    stored = read_yaml(directory / CONFIG)
    known = [field.name for field in dataclasses.fields(Config)]
    for name in stored:
        if name not in known:
            raise UserError(f"config {directory / CONFIG}: {unknown_setting(name, known)}")
    try:
        first = Config(**stored).as_dict()
    except UserError as error:
        raise UserError(f"config {directory / CONFIG}: {error}") from None
    config = Config(**{**stored, **flags, "out": str(directory.parent), "name": directory.name})
    changed = [name for name, value in config.as_dict().items() if name not in MOVABLE and value != first[name]]
    if changed:
        raise UserError(f"{changed[0]}: a resumed run keeps its own, {first[changed[0]]!r}; leave the flag out")
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and ``--resume``."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        const=True,
        help="go on with an unfinished run: its folder, or its name in --out, with the settings it began with; without"
        " RUN the flags must be those it began with",
    )
    for field in dataclasses.fields(Config):
        choices = field.metadata.get("choices")
        metavar = "|".join(choices) if choices else {int: "N", float: "X"}.get(type(field.default), field.name.upper())
        default = f" (default: {field.default})" if field.default != "" else ""
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=(field.metadata["help"] + default).replace("%", "%%"),
        )

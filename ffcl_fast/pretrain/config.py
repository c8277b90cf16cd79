"""Settings of a pretraining run. Imports no torch, so that ``ffcl --help`` stays quick."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..train.errors import UserError

METHODS = ("simclr", "supcon", "clip")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and ``--resume``."""
    parser.add_argument("--resume", action="store_true", help="go on with the run of that name from its last epoch")
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

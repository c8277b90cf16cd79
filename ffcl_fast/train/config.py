"""Every setting of a training run: one dataclass that the command line, YAML files and the Python API share.

Values come from, in rising priority: the defaults below, the preset, a YAML file, the command line. Nothing here
imports torch, so that ``ffcl --help`` stays quick.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, closest, did_you_mean

STAGES = ("local", "global", "downstream")
# These compare two views of each sample with the rest of the batch.
CONTRASTIVE = ("info_nce", "nt_xent", "sup_con", "clip", "siglip")
GOODNESS = ("sum_squares", "mean_squares")
OBJECTIVES = ("logistic", "silu", "symba", "two_threshold")  # ffcl_fast.functional.OBJECTIVES, which needs torch

LARGEST_FILE = 1 << 18  # characters of a YAML file that are read
LONGEST_NAME = 255  # bytes of a folder's name, as most file systems have it

# What a preset sets; every value can still be overridden. `quick` is sized for 2 CPU cores and under 5 minutes,
# `paper` for the settings seen in the authors' notebook (shared description: batch 10, 64 x 64, 50 epochs, seed 48).
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "paper": {
        "epochs_local": 50,
        "epochs_global": 50,
        "epochs_downstream": 50,
        "epoch_samples": 0,
        "batch_size": 10,
        "image_size": 64,
        "stem": "own",
        "seed": 48,
    },
}


def _option(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help text and its limits (``choices``, ``low``, ``high``, ``above``)."""
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Config:
    """Settings of one run. Raises :class:`UserError` that names the setting for an impossible value."""

    preset: str = _option("quick", "set of defaults: quick (minutes on 2 cores) or paper", choices=tuple(PRESETS))
    data: str | None = _option(
        None, "digits, a MedMNIST name (pneumoniamnist, ...), an image folder or .tar with train/ and test/"
    )
    data_dir: str | None = _option(None, "where MedMNIST files lie (else $FFCL_DATA, ../shared/data, ~/.medmnist)")
    image_size: int | None = _option(None, "pixels a side; default by data set: 8, 28 or 64", low=4, high=2048)
    augment: str = _option(
        "auto",
        "flips (FFCL: flips and quarter turns), shift (small affine, for digits), none, or auto by data set",
        choices=("auto", "flips", "shift", "none"),
    )
    backbone: str = _option("resnet18", "a torchvision or timm model; 'timm/NAME' or 'torchvision/NAME' to be exact")
    stem: str = _option(
        "auto",
        "own (the backbone's), small (3x3 stride 1, no pooling), or auto: small up to 16 pixels",
        choices=("auto", "own", "small"),
    )
    init: str = _option(
        "random", "random, imagenet (downloads), or a .safetensors / .pth / .pt weight file (no network)"
    )
    stages: tuple[str, ...] = _option(STAGES, "stages to run, separated by commas", choices=STAGES)
    local_layers: str = _option(
        "blocks", "layers of the local stage: residual blocks or leaf modules", choices=("blocks", "leaves")
    )
    local_schedule: str = _option(
        "together",
        "all layers on every batch (together), or epochs_local for each layer after the one before it (greedy)",
        choices=("together", "greedy"),
    )
    local_loss: str = _option(
        "pair_cosine",
        "each layer's loss: FFCL's pair cosine, a goodness of positive and negative pairs, or a contrastive loss",
        choices=("pair_cosine", *GOODNESS, *CONTRASTIVE),
    )
    global_loss: str = _option("pair_cosine", "the output's loss", choices=("pair_cosine", *CONTRASTIVE))
    pairs: str = _option(
        "uniform",
        "partner of an image: any image (uniform, as FFCL), or equally often of its own class (balanced)",
        choices=("uniform", "balanced"),
    )
    margin: float = _option(0.0, "margin of the pair cosine loss", low=-1.0, high=1.0)
    goodness_objective: str = _option("logistic", "what is minimised of a goodness", choices=OBJECTIVES)
    threshold: float | None = _option(
        None, "threshold of a goodness; default 2 for the mean, the layer's size for the sum of squares"
    )
    temperature: float | None = _option(
        None, "of a contrastive loss; default 0.1 info_nce and siglip, 0.5 nt_xent, 0.07 sup_con and clip", above=0.0
    )
    view_augment: str = _option(
        "crops",
        "the two views of a contrastive loss: crops (random crop and flips), or as --augment (same)",
        choices=("crops", "same"),
    )
    downstream: str = _option(
        "finetune", "train all of the network, or only the head on its output (frozen)", choices=("finetune", "frozen")
    )
    downstream_loss: str = _option(
        "auto",
        "focal, plain or weighted cross-entropy (binary for two classes); auto: focal for two classes, else plain",
        choices=("auto", "focal", "plain", "weighted"),
    )
    focal_alpha: float = _option(0.8, "focal loss: scale", above=0.0)
    focal_gamma: float = _option(3.0, "focal loss: exponent", low=0.0)
    epochs_local: int = _option(2, "epochs of the local stage at most", low=1)
    epochs_global: int = _option(2, "epochs of the global stage at most", low=1)
    epochs_downstream: int = _option(8, "epochs of the downstream stage at most", low=1)
    epoch_samples: int = _option(1536, "training samples an epoch at most, drawn anew each epoch; 0 = all", low=0)
    validation_samples: int = _option(
        0, "validation samples after an epoch at most, the same each time; 0 = all", low=0
    )
    patience: int = _option(5, "epochs without a better validation loss before a stage stops", low=1)
    batch_size: int = _option(32, "samples (pairs, in the first two stages) a step, in each process", low=1)
    lr: float = _option(1e-4, "Adam's learning rate, falling to 0 along a cosine", above=0.0)
    weight_decay: float = _option(1e-5, "Adam's weight decay", low=0.0)
    checkpoint_steps: int = _option(
        500, "batches between checkpoints within an epoch; 0 = at the ends of epochs only", low=0
    )
    seed: int = _option(0, "seed of everything random", low=0, high=2**32 - 1)
    workers: int | None = _option(None, "processes that decode and augment; default by machine", low=0, high=256)
    device: str = _option("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    precision: str = _option("auto", "fp32, bf16 (autocast), or auto: bf16 on a GPU", choices=("auto", "fp32", "bf16"))
    memory_format: str = _option(
        "auto", "of images and weights; auto: channels_last on a GPU", choices=("auto", "contiguous", "channels_last")
    )
    compile: str = _option(
        "none", "torch.compile each block (needs a C++ compiler on a CPU)", choices=("none", "blocks")
    )
    out: str = _option("runs", "folder that holds the runs")
    name: str | None = _option(None, "name of this run; default: data, backbone, seed and time")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        order = [STAGES.index(stage) for stage in self.stages]
        if not order or order != sorted(set(order)):
            given = ",".join(self.stages)
            raise UserError(f"stages: expected some of {', '.join(STAGES)}, in this order, got {given!r}")
        if self.name is not None and (self.name in ("", ".", "..") or set(self.name) & set("/\\\0")):
            raise UserError(f"name: expected a plain folder name, got {shown(self.name)}")
        size = len((self.name or "").encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise UserError(f"name: expected at most {LONGEST_NAME} bytes, got {size}: {shown(self.name)}")

    def epochs(self, stage: str) -> int:
        """Epochs at most of a stage."""
        return getattr(self, f"epochs_{stage}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``config.yaml``."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_HINTS = typing.get_type_hints(Config)


def base_type(name: str) -> tuple[type, bool]:
    """``(type, may be None)`` of a setting; a tuple of names counts as ``tuple``."""
    hint = _HINTS[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return typing.get_origin(hint) or hint, False


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """``value`` in the field's own type, or a UserError that names the field."""
    name, (kind, optional), limits = field.name, base_type(field.name), field.metadata
    if value is None and optional:
        return None
    wrong = UserError(f"{name}: expected {_wanted(kind, limits)}, got {shown(value)}")
    if kind is tuple:
        value = value.split(",") if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise wrong
        value = tuple(v.strip() for v in value)
        if not set(value) <= set(limits["choices"]):
            raise wrong
        return value
    if kind in (int, float):
        number = _number(value, kind)
        if number is None or not _inside(number, limits):
            raise wrong
        return number
    if not isinstance(value, str) or ("choices" in limits and value not in limits["choices"]):
        raise wrong
    return value


def _number(value: Any, kind: type) -> int | float | None:
    # YAML 1.1 reads 1e-4 as text, so text that is a number counts as one; true and false do not
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if kind is float or isinstance(value, float) else int(value)
        if not math.isfinite(number) or (kind is int and number != int(number)):
            return None
        return kind(number)
    except (ValueError, OverflowError):  # the second of a whole number that no float can hold
        return None


def shown(value: Any) -> str:
    """``value`` for a message, whatever a file held."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else text[:200] + " ..."


def _inside(number: float, limits: Mapping[str, Any]) -> bool:
    return limits.get("low", -math.inf) <= number <= limits.get("high", math.inf) and number > limits.get(
        "above", -math.inf
    )


def _wanted(kind: type, limits: Mapping[str, Any]) -> str:
    if "choices" in limits:
        return ("some of " if kind is tuple else "one of ") + ", ".join(limits["choices"])
    text = {int: "a whole number", float: "a number", str: "text"}[kind]
    bounds = [
        f"{word} {limits[key]}" for key, word in (("above", "above"), ("low", ">="), ("high", "<=")) if key in limits
    ]
    return " ".join([text, " and ".join(bounds)]).strip()


@functools.cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe one lets the last of equal keys win; this one refuses them, as YAML itself does."""

        def compose_mapping_node(self, anchor: Any) -> Any:  # before merged keys (<<) come in, which may be equal
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        problem = f"key {shown(key.value)} is given twice"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                    seen.add((key.tag, key.value))
            return node

    return Loader


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one. Raises UserError for anything else."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise UserError(f"config {path}: larger than {LARGEST_FILE >> 10} KiB, which no settings need")
        values = yaml.load(text, _loader())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except RecursionError:
        raise UserError(f"config {path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the second of dates and numbers that cannot be
        raise UserError(f"config {path}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected 'setting: value' lines, got a {type(values).__name__}")
    return values


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises UserError for an unreadable file or an unknown setting."""
    values = read_yaml(path)
    for key in values:
        if key not in FIELDS:
            raise UserError(f"config {path}: {unknown_setting(key, FIELDS)}")
    return values


def unknown_setting(name: object, known: Collection[str]) -> str:
    """What is said of a setting that does not exist, with those that may have been meant."""
    hint = did_you_mean(closest(name, known) if isinstance(name, str) else ())
    return f"unknown setting {shown(name)}{hint or '; settings are ' + ', '.join(known)}"


def load_config(flags: Mapping[str, Any], file: str | Path | None = None) -> Config:
    """Flags over file over preset over defaults; ``flags`` holds only what the user typed."""
    given = {**(read_file(file) if file is not None else {}), **flags}
    preset = given.get("preset", Config.preset)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {shown(preset)}")
    return Config(**{**PRESETS[preset], **given})

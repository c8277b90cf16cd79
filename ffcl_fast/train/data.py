"""What a run trains on: three splits of grey images, whatever they came from.

``prepare`` is the only entry. Images are decoded once, into one uint8 array a split, so that epochs cost no decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .errors import UserError
from .kinds import kind_of

SMALLEST_VALIDATION = 100  # fewer images than this cannot choose a checkpoint (the published X-ray split has 16)
VALIDATION_SHARE = 10  # one part in this many of train is held out where there is no usable validation split


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, 1, S, S); labels: int64 (N,), an index into the class names."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Split:
        rows = torch.from_numpy(np.ascontiguousarray(index))
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Data:
    """A data set ready to train on; ``notes`` are lines for the user, ``augment`` the augmentation that suits it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    augment: str
    image_size: int
    notes: tuple[str, ...] = ()

    @property
    def binary(self) -> bool:
        return len(self.classes) == 2

    def summary(self) -> dict:
        """For ``metrics.json``: sizes of the splits and of their classes."""
        count = {
            part: torch.bincount(getattr(self, part).labels, minlength=len(self.classes)).tolist()
            for part in ("train", "val", "test")
        }
        return {"name": self.name, "classes": list(self.classes), "image_size": self.image_size, "images": count}


def prepare(config: Config, progress: Callable | None = None) -> Data:
    """Load what ``config.data`` names. ``progress(iterable, total, text)`` may wrap the decoding loop.

    Raises UserError for a path, file, class or image that is missing or damaged.
    """
    from . import folder, sources

    name, kind = config.data, kind_of(config.data, config.data_dir)
    if name is None:
        note = "no --data given: training on scikit-learn's embedded digits (nothing to download)"
        data = sources.digits(config, (note,))
    elif kind == "digits":
        data = sources.digits(config)
    elif kind == "medmnist":
        data = sources.medmnist_data(config, name)
    else:
        data = folder.load(config, Path(name), progress)
    for part in ("train", "val", "test"):
        present = torch.bincount(getattr(data, part).labels, minlength=len(data.classes))
        missing = [c for c, n in zip(data.classes, present.tolist(), strict=True) if n == 0]
        if missing:
            raise UserError(f"data {data.name}: no image of class {missing[0]!r} in {part}")
    return data


def hold_out(labels: np.ndarray, groups: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``(train, validation)`` indices: a tenth held out, stratified by class, no group on both sides.

    Raises UserError where a class has too few groups for both sides to have it.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    fewest = min(len(np.unique(codes[labels == c])) for c in np.unique(labels))
    if fewest < 2:
        raise UserError("data: a class has images of one patient only in train, so none can be held out to validate")
    # without groups to respect, the plain split is the same and hundreds of times faster
    grouped = len(names) < len(labels)
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    folds = kind(n_splits=min(VALIDATION_SHARE, fewest), shuffle=True, random_state=seed)
    train, val = next(folds.split(codes, labels, codes if grouped else None))
    return np.sort(train), np.sort(val)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 1, H, W) to (N, 1, size, size), antialiased; unchanged where it has that size already."""
    if images.shape[-2:] == (size, size):
        return images
    from torchvision.transforms.v2 import functional as vision

    return vision.resize(images, [size, size], antialias=True)

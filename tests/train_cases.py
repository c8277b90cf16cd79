"""Small backbones, data and settings that let the trainer's tests run in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ffcl_fast.train import Config, checkpoint
from ffcl_fast.train.local import GOODNESS


class Block(nn.Module):
    """A residual block with a strided shortcut."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.downsample = nn.Conv2d(inside, outside, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + self.downsample(x))


class TinyNet(nn.Module):
    """Stem, two residual blocks, pooling: (N, 1, S, S) to (N, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.drop = nn.Dropout(0.1)  # so that reproducibility covers the networks' own random numbers
        self.stages = nn.Sequential(Block(4, 8), Block(8, 16))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.stages(self.drop(torch.relu(self.stem(x))))).flatten(1)


def layer_records(*layers: str) -> set[str]:
    """What a validation of the local stage records of these layers."""
    return {"loss", *layers, *(GOODNESS + name for name in layers)}


def tiny(out: Path, **settings: object) -> Config:
    """Settings of a run of a second or two on the digits."""
    small = {
        "data": "digits",
        "epochs_local": 2,
        "epochs_global": 2,
        "epochs_downstream": 2,
        "epoch_samples": 96,
        "batch_size": 32,
        "lr": 1e-3,
        "workers": 0,
        "device": "cpu",
        "out": str(out),
    }
    return Config(**{**small, **settings})


def write_medmnist(path: Path, random: np.random.Generator, **replaced: np.ndarray | None) -> Path:
    """A file of MedMNIST's keys whose classes differ in brightness; ``replaced`` arrays take the place of its own."""
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 120), ("val", 104), ("test", 40)):
        labels = np.arange(count) % 2
        noise = random.integers(0, 100, (count, 28, 28))
        noise[:, :14] += 100 * labels[:, None, None]
        arrays[f"{split}_images"] = noise.astype(np.uint8)
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    arrays |= replaced
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_image_folder(root: Path, random: np.random.Generator, patients: int = 24, val: bool = False) -> Path:
    """Grey JPEGs in the X-rays' layout and naming, three a patient, PNEUMONIA brighter in its upper half."""
    for split, count in (("train", patients), ("test", 6), *([("val", 2)] if val else [])):
        for label, name in enumerate(("NORMAL", "PNEUMONIA")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                for view in range(3):
                    stem = f"person{number}_virus_{view}" if label else f"IM-{number:04d}-{view:04d}"
                    pixels = random.integers(0, 100, (20, 24))
                    pixels[:10] += 100 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{stem}.jpeg")
    return root


def forge_state(folder: Path, state: object) -> None:
    """Another state.pt, with the checksum that one who forges it would give it."""
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoint._fingerprint(folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))

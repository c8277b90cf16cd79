"""Data sets that come in one array: scikit-learn's digits and the MedMNIST family."""

from __future__ import annotations

import importlib.resources
import os
import socket
import zipfile
from pathlib import Path

import numpy as np
import torch

from .config import Config
from .data import SMALLEST_VALIDATION, Data, Split, hold_out, resized
from .errors import UserError

DIGITS_SIZE = 8  # pixels a side, as published
LARGEST_ARRAY = 8 << 30  # bytes an .npz may unpack to before it is refused
_SPLITS = ("train", "val", "test")


def digits(config: Config, notes: tuple[str, ...] = ()) -> Data:
    """scikit-learn's 1797 embedded 8 x 8 digits: a fifth is test, the same fifth for every seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    images = torch.from_numpy(np.round(raw.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    size = config.image_size or DIGITS_SIZE
    whole = Split(resized(images, size), torch.from_numpy(raw.target.astype(np.int64)))
    rest, test = train_test_split(np.arange(len(whole)), test_size=0.2, random_state=0, stratify=raw.target)
    train, val = hold_out(raw.target[rest], [str(i) for i in rest], seed=0)
    return Data(
        name="digits",
        classes=tuple(str(c) for c in raw.target_names),
        train=whole.take(rest[train]),
        val=whole.take(rest[val]),
        test=whole.take(test),
        augment="shift",
        image_size=size,
        notes=notes,
    )


def medmnist_data(config: Config, name: str) -> Data:
    """A MedMNIST data set through the ``medmnist`` package's own loader; a local file wins over a download."""
    import medmnist

    flag, _, size_text = name.partition("_")
    info = medmnist.INFO[flag]
    path = _find_or_download(config, name, info)
    _check_archive(path, len(info["label"]))
    loader = getattr(medmnist, info["python_class"])
    native = int(size_text or 28)
    size = config.image_size or native
    parts = {}
    for split in _SPLITS:
        # not the package's __len__: it insists on the published count, and subsets are welcome here
        loaded = loader(split=split, root=str(path.parent), download=False, size=native)
        images = torch.from_numpy(_grey(loaded.imgs)).unsqueeze(1)
        parts[split] = Split(resized(images, size), torch.from_numpy(loaded.labels.reshape(-1).astype(np.int64)))
    notes = [f"data: {path}"]
    if len(parts["val"]) < SMALLEST_VALIDATION:
        labels = parts["train"].labels.numpy()
        train, val = hold_out(labels, [str(i) for i in range(len(labels))], seed=0)
        parts["train"], parts["val"] = parts["train"].take(train), parts["train"].take(val)
        notes.append(f"validation: {len(val)} images held out of train")
    classes = tuple(info["label"][str(i)] for i in range(len(info["label"])))
    return Data(name, classes, augment="flips", image_size=size, notes=tuple(notes), **parts)


def data_folders(data_dir: str | None) -> list[Path]:
    """Where local data files are looked for, best first."""
    package = Path(str(importlib.resources.files("ffcl_fast")))
    asked = [data_dir] if data_dir else [os.environ[v] for v in ("FFCL_DATA",) if os.environ.get(v)]
    usual = [] if data_dir else [Path("../shared/data"), package.parent.parent / "shared" / "data", _home()]
    return [Path(folder) for folder in [*asked, *usual]]


def _home() -> Path:
    return Path.home() / ".medmnist"


def _find_or_download(config: Config, name: str, info: dict) -> Path:
    folders = data_folders(config.data_dir)
    for folder in folders:
        path = folder / f"{name}.npz"
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"data {path}: a symbolic link that leads out of {folder}; copy the file in")
            return path
    import medmnist

    root = folders[0] if config.data_dir else _home()
    waited = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        root.mkdir(parents=True, exist_ok=True)
        size = int(name.partition("_")[2] or 28)
        getattr(medmnist, info["python_class"])(split="test", root=str(root), download=True, size=size)
    except (RuntimeError, OSError):
        looked = ", ".join(str(folder) for folder in folders)
        raise UserError(
            f"data {name}: {name}.npz is in none of {looked} and could not be downloaded;"
            " put it in one of them, name its folder with --data-dir, or try --data digits"
        ) from None
    finally:
        socket.setdefaulttimeout(waited)
    return root / f"{name}.npz"


def _memory() -> int:
    """Half of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _check_archive(path: Path, classes: int) -> None:
    """MedMNIST's md5 says nothing of rebuilt copies, so keys, types, shapes and labels are checked instead."""
    wanted = [f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels")]
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(member.file_size for member in packed.infolist())
            if size > min(LARGEST_ARRAY, _memory()):
                limit = "half of this machine's memory" if size <= LARGEST_ARRAY else f"{LARGEST_ARRAY >> 30} GiB"
                raise UserError(f"data {path}: unpacks to {size:,} bytes, more than {limit}")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in wanted if key not in arrays.files]
            if missing:
                raise UserError(f"data {path}: has no array {missing[0]!r}")
            for split in _SPLITS:
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
                if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
                    shape = f"{images.dtype} {images.shape}"
                    raise UserError(f"data {path}: {split}_images is {shape}, not uint8 (N, H, W)")
                if labels.dtype.kind not in "iu" or labels.size != len(images):
                    raise UserError(f"data {path}: {split}_labels is not one whole number an image")
                if labels.min() < 0 or labels.max() >= classes:
                    raise UserError(f"data {path}: {split}_labels has values outside 0 ... {classes - 1}")
    # an array whose header promises more than memory holds is a MemoryError
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"data {path}: not a readable .npz file ({error})") from None


def _grey(images: np.ndarray) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) uint8 to (N, H, W), by the ITU-R 601-2 luma weights that Pillow uses."""
    if images.ndim == 3:
        return images
    return np.round(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)

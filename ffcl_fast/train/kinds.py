"""What the setting ``data`` names. Only MedMNIST's list of sets imports torch: other wrong names are told at once."""

from __future__ import annotations

import os

from .errors import UserError


def kind_of(name: str | None, data_dir: str | None = None) -> str:
    """``digits``, ``medmnist`` or ``path``: what the setting ``data`` names.

    Raises UserError where that is nothing, or nothing to train on: 3-D or multi-label images, a ``data_dir`` that does
    not exist.
    """
    if name in (None, "digits"):
        return "digits"
    if is_medmnist(name):
        _check_medmnist(name, data_dir)
        return "medmnist"
    if name.endswith(".npz") and os.path.isfile(name):
        place, file = os.path.split(name)
        if is_medmnist(file[:-4]):
            raise UserError(f"data {name}: give MedMNIST's by name: --data {file[:-4]} --data-dir {place or '.'}")
        raise UserError(
            f"data {name}: .npz files are MedMNIST's, under their own names (pneumoniamnist.npz, ...); rename it, then"
            f" give --data NAME --data-dir {place or '.'}, or give a folder or .tar of images"
        )
    if os.path.exists(name):
        return "path"
    raise UserError(f"data {name!r}: no such file or folder, nor digits, nor a MedMNIST name (pneumoniamnist, ...)")


def is_medmnist(name: str) -> bool:
    """Whether ``name`` is a MedMNIST data set, ``pneumoniamnist`` or with a size as in ``pneumoniamnist_224``."""
    if "mnist" not in name or "/" in name or os.path.exists(name):
        return False
    import medmnist

    return name.partition("_")[0] in medmnist.INFO


def _check_medmnist(name: str, data_dir: str | None) -> None:
    import medmnist

    flag, underscore, size = name.partition("_")
    if underscore and size not in ("64", "128", "224"):
        raise UserError(f"data {name}: MedMNIST has the sizes 28 ({flag}), 64, 128 and 224 ({flag}_224)")
    if "3d" in flag or medmnist.INFO[flag]["task"] == "multi-label, binary-class":
        raise UserError(f"data {name}: {'3-D' if '3d' in flag else 'multi-label'} data sets are not supported")
    if data_dir and not os.path.isdir(data_dir):
        raise UserError(f"data_dir {data_dir!r}: no such folder")

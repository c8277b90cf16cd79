"""Weight files of any origin into a backbone, without ever unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError, first_line


def require(path: str | Path) -> None:
    """UserError where there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"init {path}: no such file (expected random, imagenet or a weight file)")


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, or in a PyTorch file that holds nothing but tensors.

    Raises UserError for a file that is missing, damaged or would need unpickling of code.
    """
    path = Path(path)
    require(path)
    state: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own family of errors on damaged bytes
        raise UserError(f"init {path}: not a readable weight file ({first_line(error)})") from None
    for key in ("state_dict", "model"):  # how training scripts commonly wrap them
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"init {path}: expected named tensors, got {type(state).__name__}")
    return state


def load_into(backbone: nn.Module, path: str | Path) -> str:
    """Copy every tensor that fits by name and shape; a first convolution for colour and a head do not. Returns a line
    that says how many were found, and which were not.

    Where the names are another library's but the file lists the same shapes in the same order (as the EfficientNets of
    PyPI do beside timm's), tensors are matched by their place.

    Raises UserError where less than half of the backbone's tensors find a match: then it is the wrong file.
    """
    own = backbone.state_dict()
    given = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in read(path).items()}
    fits = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if 2 * len(fits) < len(own):
        fits = _by_place(own, given) or fits
    if 2 * len(fits) < len(own):
        raise UserError(f"init {path}: only {len(fits)} of the backbone's {len(own)} tensors are in it")
    backbone.load_state_dict(fits, strict=False)
    line = f"init {path}: {len(fits)} of the backbone's {len(own)} tensors found in it"
    fresh = [name for name in own if name not in fits]
    if fresh:
        line += f", as drawn: {_some(fresh)}"
    used = set(map(id, fits.values()))
    unused = [name for name, value in given.items() if id(value) not in used]
    return line + (f"; not used of the file: {_some(unused)}" if unused else "")


def _some(names: list[str]) -> str:
    """The first three names and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _by_place(own: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``given`` under the names of ``own``, or nothing where their shapes are not the same in turn.

    One may differ: the first convolution, for one channel here. What the file has beyond, its head, is left out.
    """
    pairs = list(zip(own.items(), given.values(), strict=False))
    fits = {name: value for (name, mine), value in pairs if mine.shape == value.shape}
    return fits if len(pairs) == len(own) and len(fits) >= len(own) - 1 else {}

"""Contrastive pretraining over any number of processes, behind ``ffcl pretrain``: SimCLR, SupCon or CLIP-style.

    torchrun --nproc-per-node 2 -m ffcl_fast.pretrain --data ../shared/data/chest_xray_224.tar --method simclr

The backbone it leaves, ``backbone.safetensors``, is what ``ffcl train --init`` takes.
"""

from __future__ import annotations

from .config import Config

__all__ = ["Config", "pretrain"]


def __getattr__(name: str):
    if name == "pretrain":  # torch and torchvision take seconds to import
        from .run import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

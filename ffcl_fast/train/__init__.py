"""Forward-Forward Contrastive Learning (Ahamed, Chen, Imran 2023): the trainer behind ``ffcl train``.

from ffcl_fast.train import Config, train
run = train(Config(data="pneumoniamnist", seed=1))
print(run.metrics["test"]["accuracy"], run.directory)
"""

from __future__ import annotations

from .config import Config, load_config
from .errors import UserError

__all__ = ["Config", "UserError", "evaluate", "load_config", "train"]


def __getattr__(name: str):
    # torch, torchvision and torchmetrics take seconds to import: only for those who train
    if name == "train":
        from .run import train

        return train
    if name == "evaluate":
        from .scoring import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The encoders of a pretraining run and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..cached import cached_step
from ..losses import ClipLoss, NTXentLoss, SupConLoss
from ..train.batches import derive_seed
from ..train.config import Config as TrainConfig
from ..train.model import build
from .config import Config
from .data import Batch

LARGEST_SCALE = 100.0  # of CLIP's learnt inverse temperature, as in the paper


class ImageEncoder(nn.Module):
    """Backbone and SimCLR's projection head: (n, 1, S, S) to embeddings (n, D)."""

    def __init__(self, config: Config, image_size: int) -> None:
        super().__init__()
        classifier = build(TrainConfig(backbone=config.backbone), image_size, 2)
        self.backbone, features = classifier.backbone, classifier.features
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, config.width))

    def forward(self, *images: Tensor) -> Tensor:
        """The embeddings of all ``images``, one tensor after the other."""
        return self.head(self.backbone(torch.cat(images)))


class TextEncoder(nn.Module):
    """A small convolution over the bytes of captions (n, CAPTION) to embeddings (n, D): a place to put a real one."""

    def __init__(self, width: int, channels: int = 128) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, channels, padding_idx=0)
        self.mix = nn.Sequential(nn.Conv1d(channels, channels, 5, padding=2), nn.ReLU())
        self.head = nn.Linear(channels, width)

    def forward(self, captions: Tensor) -> Tensor:
        return self.head(self.mix(self.bytes(captions.long()).transpose(1, 2)).amax(2))


class Pretraining(nn.Module):
    """The encoders, the learnt scale, and one step of either kind. Weights depend on the seed alone."""

    def __init__(self, config: Config, image_size: int) -> None:
        super().__init__()
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.config = config
        self.images: nn.Module = ImageEncoder(config, image_size)
        self.texts: nn.Module | None = TextEncoder(config.width) if config.method == "clip" else None
        self.log_scale = nn.Parameter(torch.tensor(1 / config.temperature).log()) if config.method == "clip" else None
        options = {"distributed": config.distributed}
        self.criterion = {
            "simclr": lambda: NTXentLoss(config.temperature, **options),
            "supcon": lambda: SupConLoss(config.temperature, base_temperature=config.temperature, **options),
            "clip": lambda: ClipLoss(**options),
        }[config.method]()

    def loss(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """This process's share of the loss of both embeddings (n, D)."""
        if self.config.method == "simclr":
            return self.criterion(first, second)
        first, second = normalize(first, dim=1), normalize(second, dim=1)
        if self.config.method == "supcon":
            return self.criterion(torch.stack((first, second), 1), labels)
        return self.criterion(first, second, self.log_scale.exp())

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward; returns the detached share of the loss. Call it under autocast for bfloat16."""
        other = self.images if self.texts is None else self.texts
        if self.config.chunk_size:
            return cached_step(
                [self.images, other],
                (batch.first, batch.second),
                lambda a, b: self.loss(a, b, batch.labels),
                self.config.chunk_size,
            )
        if self.texts is None:
            first, second = self.images(batch.first, batch.second).chunk(2)
        else:
            first, second = self.images(batch.first), self.texts(batch.second)
        value = self.loss(first, second, batch.labels)
        value.backward()
        return value.detach()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the learnt scale within bounds, after an optimiser's step."""
        if self.log_scale is not None:
            self.log_scale.clamp_(0.0, torch.tensor(LARGEST_SCALE).log().item())

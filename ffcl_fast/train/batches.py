"""Mini-batches of augmented pairs or single images, the same for any number of worker processes.

Every random choice depends on (seed, stage, epoch, sample) alone, never on what ran before: an epoch repeated after a
kill draws the same pairs and augmentations, so no random state has to be stored to resume exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from .data import Split


def derive_seed(*parts: int | str) -> int:
    """A 62-bit seed that depends on every part."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 2


def augmentation(name: str, image_size: int) -> v2.Transform:
    """The augmentation called ``name`` for one uint8 image (1, S, S)."""
    if name == "flips":
        turns = v2.RandomChoice([v2.RandomRotation((angle, angle)) for angle in (90, 180, 270)])
        return v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0.5), v2.RandomApply([turns], 0.5)])
    if name == "shift":
        return v2.RandomCrop(image_size, padding=max(1, image_size // 8))
    if name == "crops":  # SimCLR's for grey images; brightness and contrast would be undone by `scaled`
        crop = v2.RandomResizedCrop(image_size, scale=(0.3, 1.0), antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(0.5), v2.RandomVerticalFlip(0.5)])
    return v2.Identity()


def scaled(images: Tensor) -> Tensor:
    """uint8 (N, 1, S, S) to float32 in [0, 1] by each image's own minimum and maximum; a flat image becomes zeros."""
    x = images.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1.0)


class Views(Dataset):
    """Item i of an epoch: uint8 images drawn from sample i, and what they are.

    ``kind``:

    - ``"images"``: (image, label);
    - ``"pairs"``: (image, other image, +1 or -1 for equal class or not). The other one is drawn uniformly from the
      whole split (as in FFCL), or where ``balanced`` from the image's own class every other time;
    - ``"views"``: (image, the same image augmented anew, label);
    - ``"sides"``: (positive, negative, label): the mean of the image and another one of its class, and of the image
      and one of another class. Self-Contrastive Forward-Forward's input, with classes to tell the sides apart.
    """

    def __init__(
        self, split: Split, augment: v2.Transform | None, kind: str, seed: int, balanced: bool = False
    ) -> None:
        self.split = split
        self.augment = augment
        self.kind = kind
        self.seed = seed
        self.balanced = balanced
        # rows in the order of their classes: row numbers of class c are order[first[c] : first[c + 1]]
        self.order = torch.argsort(split.labels, stable=True)
        self.first = [0, *torch.bincount(split.labels).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        # v2 transforms know only the global generator; the training loop seeds it anew after fetching a batch.
        # Not torch.manual_seed: it also walks every accelerator, 50 times slower
        torch.default_generator.manual_seed((self.seed + index) & (2**62 - 1))
        images, labels = self.split.images, self.split.labels
        image, label = images[index], labels[index]
        if self.kind == "images":
            return self._view(image), label
        if self.kind == "views":
            return self._view(image), self._view(image), label
        if self.kind == "sides":
            sides = [self._mix(image, images[self._of_class(int(label), equal)]) for equal in (True, False)]
            return sides[0], sides[1], label
        if self.balanced:
            other = self._of_class(int(label), bool(torch.rand(()) < 0.5))
        else:
            other = int(torch.randint(len(self), ()))
        target = 1 if label == labels[other] else -1
        return self._view(image), self._view(images[other]), torch.tensor(target)

    def _of_class(self, label: int, equal: bool) -> int:
        """A row drawn uniformly from those of this class, or from those of all others."""
        first, last = self.first[label], self.first[label + 1]
        if equal:
            place = first + int(torch.randint(last - first, ()))
        else:
            place = int(torch.randint(len(self) - (last - first), ()))
            place += (last - first) if place >= first else 0
        return int(self.order[place])

    def _mix(self, image: Tensor, other: Tensor) -> Tensor:
        return ((self._view(image).int() + self._view(other).int()) // 2).to(torch.uint8)

    def _view(self, image: Tensor) -> Tensor:
        return image if self.augment is None else self.augment(image)


class EpochSampler(Sampler[list[int]]):
    """Index lists of one epoch: a random order, cut to ``samples`` (0 = all); in order where ``seed`` is None.

    A last batch of one sample joins the batch before it: BatchNorm cannot train on a single 1 x 1 activation.
    """

    def __init__(self, count: int, batch_size: int, samples: int = 0, seed: int | None = None) -> None:
        order = torch.arange(count)
        if seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        order = order[: samples or count].tolist()
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if len(self.batches) > 1 and len(self.batches[-1]) == 1:
            single = self.batches.pop()
            self.batches[-1] += single

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def loader(views: Views, sampler: EpochSampler, workers: int, pin: bool) -> DataLoader:
    """Batches of ``views`` in the sampler's order."""
    return DataLoader(views, batch_sampler=sampler, num_workers=workers, pin_memory=pin)

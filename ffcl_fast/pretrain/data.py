"""What each process trains on: its share of every batch, as augmented views or as images and captions.

Random choices depend on (seed, epoch, sample) alone, so an epoch repeated after a restart is the same epoch.
"""

from __future__ import annotations

import glob
import io
import os
import random
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..train.batches import derive_seed
from ..train.config import Config as TrainConfig
from ..train.data import Split, prepare
from ..train.errors import UserError
from ..train.folder import FOLDER_SIZE, FORMATS, BoundedHeaders
from .config import Config

CAPTION = 64  # bytes of a caption that the text encoder reads
LARGEST_SAMPLE = 256 << 20  # bytes that the files of a shard's sample may unpack to before it is refused
_IMAGES = tuple(suffix[1:] for suffix in FORMATS)
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's files about a shard
_READ = {*_IMAGES, "cls", "txt"}
_SHUFFLED = 1000  # samples of a shard that are mixed
_SHUFFLED_PIXELS = 256 << 20  # of them all, at most


@dataclass(frozen=True)
class Batch:
    """A process's samples: first (n, 1, S, S) float32, second the other view or captions (n, CAPTION) uint8, labels."""

    first: Tensor
    second: Tensor
    labels: Tensor


class Source:
    """Training samples by epoch; ``classes`` may be empty for shards."""

    def __init__(self, config: Config, image_size: int, classes: tuple[str, ...], samples: int) -> None:
        self.config, self.image_size, self.classes, self.samples = config, image_size, classes, samples
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(0.3, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.4, contrast=0.4),
            ]
        )

    def steps(self, world: int, done: int = 0) -> int:
        """Steps of an epoch after ``done`` samples of it, those of all processes; the same on every process."""
        raise NotImplementedError

    def epoch(self, number: int, rank: int, world: int, done: int = 0) -> Iterable[Batch]:
        """This process's batches after ``done`` samples; on every process as many."""
        raise NotImplementedError

    def item(self, image: Tensor, label: int, caption: str, seed: int) -> tuple[Tensor, Tensor, int]:
        torch.default_generator.manual_seed(seed & (2**62 - 1))
        first = self.augment(image)
        second = caption_bytes(caption) if self.config.method == "clip" else self.augment(image)
        return first, second, label


def caption_bytes(text: str) -> Tensor:
    """The first bytes of a caption in UTF-8, with zeros after it."""
    raw = text.encode()[:CAPTION].ljust(CAPTION, b"\0")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def collate(items: list[tuple[Tensor, Tensor, int]]) -> Batch:
    first, second, labels = zip(*items, strict=True)
    first, second = torch.stack(first), torch.stack(second)
    return Batch(first.float() / 255, second if second.dim() == 2 else second.float() / 255, torch.tensor(labels))


def open_source(config: Config) -> Source:
    """The data that ``config.data`` names. Raises UserError for what cannot be read."""
    shards = _shards(config.data)
    if shards:
        return Shards(config, shards)
    flags = {"data": config.data, "image_size": config.image_size or None, "data_dir": config.data_dir or None}
    data = prepare(TrainConfig(**flags))
    return Images(config, data.train, data.classes)


class Images(Source, Dataset):
    """A data set that ``ffcl train`` reads: every process has it whole in memory and takes its part of a batch."""

    def __init__(self, config: Config, split: Split, classes: tuple[str, ...]) -> None:
        super().__init__(config, split.images.shape[-1], classes, config.epoch_samples or len(split))
        self.split = split
        self.number = 0

    def steps(self, world: int, done: int = 0) -> int:
        return len(self._parts(0, 0, world, done))

    def epoch(self, number: int, rank: int, world: int, done: int = 0) -> Iterable[Batch]:
        self.number = number
        parts = self._parts(number, rank, world, done)
        return DataLoader(self, batch_sampler=parts, num_workers=self.config.workers, collate_fn=collate)

    def _parts(self, number: int, rank: int, world: int, done: int = 0) -> list[list[int]]:
        """A process's sample numbers of every global batch; the last one may be smaller, and uneven over processes.

        Fewer than two samples a process are left out: BatchNorm cannot train on one. With ``chunk_size`` every process
        has as many, what does not divide being left out: chunks then are of one number, which SyncBatchNorm needs.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", number))
        order = torch.randperm(len(self.split), generator=generator)[done : self.samples].tolist()
        together = self.config.batch_size * world
        batches = [order[i : i + together] for i in range(0, len(order), together)]
        batches = [batch for batch in batches if len(batch) >= 2 * world]
        if self.config.chunk_size:
            batches = [batch[: len(batch) // world * world] for batch in batches]
        return [[int(i) for i in np.array_split(batch, world)[rank]] for batch in batches]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        label = int(self.split.labels[index])
        seed = derive_seed(self.config.seed, "views", self.number) + index
        return self.item(self.split.images[index], label, self.classes[label], seed)


class Shards(Source):
    """WebDataset shards through the ``webdataset`` package: every process draws shards for as long as an epoch.

    What an epoch still draws after ``done`` samples are other draws than those it would have made without a stop.
    """

    def __init__(self, config: Config, urls: list[str]) -> None:
        if not config.epoch_samples:
            raise UserError("epoch_samples: needed for shards, whose number of samples is not known")
        super().__init__(config, config.image_size or FOLDER_SIZE, (), config.epoch_samples)
        self.urls = urls

    def steps(self, world: int, done: int = 0) -> int:
        return max(0 if done else 1, (self.samples - done) // (self.config.batch_size * world))

    def epoch(self, number: int, rank: int, world: int, done: int = 0) -> Iterator[Batch]:
        import webdataset as wds

        seed = derive_seed(self.config.seed, "shards", number, rank, *([done] if done else []))
        pipeline = wds.DataPipeline(
            wds.ResampledShards(self.urls, seed=seed, deterministic=True),
            lambda urls: wds.tariterators.url_opener(urls, handler=self._unreadable),
            self._members,
            lambda members: wds.tariterators.group_by_keys(members, handler=self._unreadable),
            wds.map(self._decoded),  # before they are mixed: as pixels, their size is known
            wds.shuffle(max(2, min(_SHUFFLED, _SHUFFLED_PIXELS // self.image_size**2)), rng=random.Random(seed)),
            wds.map(lambda sample: self._viewed(sample, seed)),
        )
        loader = DataLoader(
            pipeline, batch_size=self.config.batch_size, num_workers=self.config.workers, collate_fn=collate
        )
        try:
            for _, batch in zip(range(self.steps(world, done)), loader, strict=False):
                yield batch
        except UserError as error:  # from a worker it comes with all of that one's traceback
            raise UserError(str(error).rpartition("UserError: ")[2]) from None

    def _unreadable(self, error: Exception) -> bool:
        where = next((str(part) for part in reversed(error.args) if str(part) in self.urls), self.config.data)
        raise UserError(f"data {where}: not a readable shard ({error.args[0] if error.args else error})") from None

    def _members(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The files in ``shards`` for webdataset's group_by_keys, {} at the end of each shard.

        webdataset's own iterator reads every file whole, of whatever size, and draws for ever where none is a sample.
        """
        barren: set[str] | None = set()  # shards without a sample; None once one had some
        for shard in shards:
            url = shard["url"]
            try:
                for file in self._files(shard["stream"], url):
                    barren = None
                    yield file
            except UserError:
                raise
            except Exception as error:  # tarfile's and each packer's own
                raise UserError(f"data {url}: not a readable shard ({error})") from None
            yield {}
            if barren is not None:
                barren.add(url)
                if len(barren) == len(set(self.urls)):
                    raise UserError(f"data {self.config.data}: no shard has a sample (files named as KEY.{_IMAGES[0]})")

    def _files(self, stream: Any, url: str) -> Iterator[dict[str, Any]]:
        """Those of one shard; only the kinds that are used are read."""
        from webdataset.tariterators import base_plus_ext

        last, held = None, 0
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=BoundedHeaders) as archive:
            for member in archive:
                archive.members = []  # else they pile up
                key, kind = base_plus_ext(member.name)
                if not member.isreg() or key is None or _META.match(member.name):
                    continue
                read = kind.lower() in _READ
                held = (held if key == last else 0) + 1024 + (member.size if read else 0)
                last = key
                if held > LARGEST_SAMPLE:
                    raise UserError(f"data {url}: {member.name!r} unpacks to over {LARGEST_SAMPLE >> 20} MiB")
                content = archive.extractfile(member) if read else None
                yield {"fname": member.name, "data": content.read() if content else b"", "__url__": url}

    def _decoded(self, sample: dict) -> tuple[Tensor, int, str, str]:
        key = sample.get("__key__", "?")
        kind = next((suffix for suffix in _IMAGES if suffix in sample), None)
        if kind is None:
            raise UserError(f"data {self.config.data}: sample {key!r} has no image ({', '.join(_IMAGES)})")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(sample[kind]), formats=sorted(set(FORMATS.values()))) as image:
                    size = (self.image_size, self.image_size)
                    pixels = np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR))
            label = int(sample["cls"]) if "cls" in sample else -1
            if not -(2**63) <= label < 2**63:
                raise ValueError("its label has over 64 bits")
            caption = sample["txt"].decode()[:CAPTION] if "txt" in sample else ""
        except Exception as error:  # Pillow's decoders raise anything on hostile bytes, and may quote all of them
            reason = str(error)[:200]
            raise UserError(f"data {self.config.data}: sample {key!r} cannot be decoded ({reason})") from None
        needed = {"supcon": ("cls", label < 0), "clip": ("txt", not caption)}.get(self.config.method)
        if needed and needed[1]:
            raise UserError(f"data {self.config.data}: sample {key!r} has no .{needed[0]}, for {self.config.method}")
        return torch.from_numpy(pixels.copy())[None], label, caption, key

    def _viewed(self, decoded: tuple[Tensor, int, str, str], seed: int) -> tuple[Tensor, Tensor, int]:
        image, label, caption, key = decoded
        return self.item(image, label, caption, derive_seed(seed, key))


# What curl, which webdataset starts through a shell, may be asked for.
_URL = re.compile(r"https?://[\w.~:/?#\[\]@!&()*+,;=%-]+")


def _shards(data: str) -> list[str]:
    """The shard files that ``data`` means, or none: then it is not about shards.

    Raises UserError for other URLs than http and https (webdataset's "pipe:" would start a program), and for files that
    are links out of their folder, or no files.
    """
    if "{" in data or data.startswith(("http://", "https://")):
        import webdataset as wds

        return [_checked(url) for url in wds.shardlists.expand_urls(data)]
    if "*" in data:
        found = sorted(glob.glob(data))
        if not found:
            raise UserError(f"data {data!r}: no such files")
        return [_checked_file(path) for path in found]
    if os.path.isdir(data) and not os.path.isdir(os.path.join(data, "train")):
        return [_checked_file(path) for path in sorted(glob.glob(os.path.join(glob.escape(data), "*.tar")))]
    return []


def _checked(url: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url) is None:
        return _checked_file(url)
    if not _URL.fullmatch(url):
        raise UserError(f"data {url!r}: expected a file or a plain http(s) address")
    return url


def _checked_file(path: str) -> str:
    whole = os.path.abspath(path)  # from the root: no name can be taken for another kind of address
    if not os.path.isfile(whole):
        raise UserError(f"data {path}: no such file")
    if os.path.dirname(os.path.realpath(whole)) != os.path.realpath(os.path.dirname(whole)):
        raise UserError(f"data {path}: a symbolic link that leads out of its folder; copy the file in")
    return whole

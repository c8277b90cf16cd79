"""Image folders in torchvision's layout (train/CLASS/*, test/CLASS/*, val/ optional), and .tar files of one.

Everything in such a folder counts as hostile: links that lead out of it are refused, only common raster formats are
opened, with a limit on their pixels, and archives are unpacked by tarfile's ``data`` filter.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .config import Config
from .data import SMALLEST_VALIDATION, Data, Split, hold_out
from .errors import UserError, first_line

# suffix -> Pillow's name of the format; Pillow knows dozens more, some of which call other programs
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".pgm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
FOLDER_SIZE = 64  # pixels a side where --image-size is not given
MEMORY_LIMIT = 1 << 30  # bytes of decoded images a split holds in memory; a temporary file beyond
LARGEST_TAR = 64 << 30  # bytes a .tar may unpack to before it is refused
LARGEST_HEADER = 1 << 20  # bytes of one member's headers in a .tar; a name takes hundreds
LARGEST_INDEX = 1 << 30  # bytes of memory that the list of a .tar's members may take, of some 1 KiB each

# Kermany's X-rays: person123_bacteria_45, IM-0115-0001, NORMAL2-IM-1440-0001-0002; the first part is the patient
_PATIENT = re.compile(r"(person\d+|(?:NORMAL\d*-)?IM-\d+)(?=[_-])")


def load(config: Config, path: Path, progress: Callable | None = None) -> Data:
    """Decode the folder or .tar at ``path``, resized to ``config.image_size``, into a :class:`Data`."""
    root = path
    if path.is_file():
        root = _unpacked(path)
    root = _split_root(root, path)
    has_val = (root / "val").is_dir()
    listed = {split: _listing(root, split) for split in ("train", "val", "test") if split != "val" or has_val}
    classes = sorted(listed["train"])
    for split, found in listed.items():
        for missing in sorted(set(classes) ^ set(found)):
            has, lacks = (split, "train") if missing in found else ("train", split)
            raise UserError(f"data {root}: class folder {missing!r} is in {has}/ but missing in {lacks}/")
    if len(classes) < 2:
        raise UserError(f"data {root / 'train'}: needs 2 or more class folders, has {len(classes)}")
    size = config.image_size or FOLDER_SIZE
    notes = [f"data: {root}"]
    files = {split: [(f, c) for c, name in enumerate(classes) for f in found[name]] for split, found in listed.items()}
    if len(files.get("val", ())) < SMALLEST_VALIDATION:
        labels = np.array([label for _, label in files["train"]])
        train, val = hold_out(labels, [patient(f) for f, _ in files["train"]], seed=0)
        published = f" (val/ has only {len(files['val'])})" if has_val else ""
        whole = files["train"]
        files["train"], files["val"] = [whole[i] for i in train], [whole[i] for i in val]
        notes.append(f"validation: {len(val)} images of train held out, by patient{published}")
    parts = {split: _decode(split, files[split], size, config.workers, progress) for split in ("train", "val", "test")}
    return Data(root.name, tuple(classes), augment="flips", image_size=size, notes=tuple(notes), **parts)


def patient(path: Path) -> str:
    """The patient in an X-ray's file name; the whole stem, so a group of its own, where there is none."""
    found = _PATIENT.match(path.stem)
    return found.group(1) if found else path.stem


def _split_root(root: Path, given: Path) -> Path:
    """``root``, or its one sub-folder, whichever holds train/ and test/; errors name what the user gave."""
    inner = [d for d in root.iterdir() if d.is_dir() and not d.is_symlink()] if root.is_dir() else []
    for folder in [root, *(inner if len(inner) == 1 else [])]:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return folder
    missing = next((split for split in ("train", "test") if not (root / split).is_dir()), "train")
    raise UserError(f"data {given}: has no folder {missing}/ (expected train/CLASS/*.jpeg and test/CLASS/*.jpeg)")


def _listing(root: Path, split: str) -> dict[str, list[Path]]:
    """Class name to its image files, sorted, all of them real files inside ``root``."""
    inside = root.resolve()
    found: dict[str, list[Path]] = {}
    folders = [entry for entry in sorted((root / split).iterdir()) if not entry.name.startswith(".")]
    for folder in folders:
        _refuse_outside(folder, inside)
        if not folder.is_dir():
            continue
        files = [f for f in sorted(_walk(folder)) if f.suffix.lower() in FORMATS]
        for file in files:
            _refuse_outside(file, inside)
            if not file.is_file():
                raise UserError(f"image {file}: not a regular file")
        if not files:
            raise UserError(f"data {folder}: no image of class {folder.name!r} (looked for {', '.join(FORMATS)})")
        found[folder.name] = files
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=False):
        yield from (Path(parent) / name for name in names if not name.startswith("."))


def _refuse_outside(path: Path, inside: Path) -> None:
    if not path.resolve().is_relative_to(inside):
        raise UserError(f"data {path}: a symbolic link that leads out of {inside}; copy the files in, or move the root")


class _Decoder(Dataset):
    """Item i: the image at ``files[i]`` as uint8 (size, size), or the text of what is wrong with it."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray | str:
        path = self.files[index][0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
                    image.draft("L", (self.size, self.size))  # JPEG: decode at the nearest larger scale
                    return np.asarray(_grey(image).resize((self.size, self.size), Image.Resampling.BILINEAR))
        except Exception as error:  # Pillow's decoders raise anything on hostile bytes; each one means a bad image
            return f"image {path}: cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey; deeper images, as 16-bit X-rays, by their own range, where Pillow would clip at 255."""
    if image.mode[0] not in "IF":
        return image.convert("L")
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    low, high = values.min(), values.max()
    return Image.fromarray(np.round((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8))


def _decode(
    split: str, files: list[tuple[Path, int]], size: int, workers: int | None, progress: Callable | None
) -> Split:
    """Every file of a split, decoded in order by worker processes."""
    shape = (len(files), 1, size, size)
    if len(files) * size * size <= MEMORY_LIMIT:
        images = np.empty(shape, np.uint8)
    else:
        images = np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)  # the file is gone with the process
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    loader = DataLoader(_Decoder(files, size), batch_size=32, num_workers=workers, collate_fn=list)
    batches = progress(loader, len(loader), f"decoding {split}") if progress else loader
    row = 0
    for batch in batches:
        for image in batch:
            if isinstance(image, str):
                raise UserError(image)
            images[row, 0] = image
            row += 1
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in files], dtype=torch.int64))


class BoundedHeaders(tarfile.TarInfo):
    """For ``tarfile.open(..., tarinfo=BoundedHeaders)``: tarfile reads long names, pax headers and maps of sparse files
    whole, of whatever size they say they are, which a few packed MB can be hundreds of times over."""

    @classmethod
    def fromtarfile(cls, packed: Any) -> BoundedHeaders:
        source = packed.fileobj
        if isinstance(source, _Header):  # the header that another one, as a long name, belongs to
            return super().fromtarfile(packed)
        packed.fileobj = _Header(source)
        try:
            member = super().fromtarfile(packed)
        except (ValueError, OverflowError, RecursionError) as error:  # of forged numbers and of headers of headers
            raise tarfile.ReadError(f"bad header: {error}") from None
        finally:
            packed.fileobj = source
        if member.size < 0 or len(packed.pax_headers) > 1000:
            raise tarfile.ReadError("bad header")
        return member


class _Header:
    """The file that a header is read from, for so many bytes."""

    def __init__(self, source: Any) -> None:
        self.source, self.left = source, LARGEST_HEADER

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of over {LARGEST_HEADER >> 10} KiB")
        return self.source.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _unpacked(path: Path) -> Path:
    """The folder a .tar was unpacked to, in the cache; unpacked now where it was not yet."""
    try:
        with tarfile.open(path, tarinfo=BoundedHeaders) as packed:
            stamp = path.stat()
            key = hashlib.sha256(f"{path.resolve()}:{stamp.st_size}:{stamp.st_mtime_ns}".encode()).hexdigest()[:16]
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffcl_fast"
            target = cache / f"{path.stem}-{key}"
            if target.is_dir():
                return target
            cache.mkdir(parents=True, exist_ok=True)
            room, size, index, members = min(LARGEST_TAR, shutil.disk_usage(cache).free), 0, 0, []
            for member in packed:  # the sum so far, so that a bomb is never read to its end
                size = max(size, member.offset_data) + member.size  # headers too: empty files cost a disk as well
                if size > room:
                    raise UserError(f"data {path}: unpacks to over {room >> 20} MiB, more than {cache} has room for")
                index += 1024 + len(member.name)
                if index > LARGEST_INDEX:
                    raise UserError(f"data {path}: the list of its members takes over {LARGEST_INDEX >> 20} MiB")
                member.pax_headers = {}  # has done its work
                if member.isdir() or (member.isfile() and Path(member.name).suffix.lower() in FORMATS):
                    members.append(member)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                packed.extractall(Path(scratch) / "data", members=members, filter="data")
                try:
                    os.replace(Path(scratch) / "data", target)
                except OSError:
                    if not target.is_dir():  # where it is, another run has unpacked the same in the meantime
                        raise
            return target
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        # tarfile has a line for every compression that it has tried
        reason = "; ".join(line.strip(" -:") for line in str(error).splitlines()) or first_line(error)
        raise UserError(f"data {path}: expected a folder or a readable .tar file ({reason})") from None

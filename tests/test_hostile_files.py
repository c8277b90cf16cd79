"""Files of ill will that tests/test_train_data.py, test_train_checkpoint.py and test_train_config.py leave out."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import TinyNet, tiny, write_image_folder, write_medmnist

from ffcl_fast.pretrain import Config
from ffcl_fast.pretrain import data as pretrain_data
from ffcl_fast.pretrain.data import open_source
from ffcl_fast.train import config as config_module
from ffcl_fast.train import folder, sources, train
from ffcl_fast.train import run as run_module
from ffcl_fast.train.config import load_config
from ffcl_fast.train.data import prepare
from ffcl_fast.train.errors import UserError


@pytest.fixture
def random(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and all(part in text for part in parts), text


def files_under(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()}


# ---------------------------------------------------------------------------------------------------------------- .npz


def medmnist(tmp_path):
    return lambda: prepare(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path)))


def test_an_npz_that_unpacks_to_too_much(tmp_path, random, monkeypatch):
    path = write_medmnist(tmp_path / "pneumoniamnist.npz", random)
    monkeypatch.setattr(sources, "LARGEST_ARRAY", 10_000)
    refused(medmnist(tmp_path), str(path), "unpacks to ", "GiB")


def test_an_npz_that_unpacks_to_more_than_the_machine_holds(tmp_path, random, monkeypatch):
    path = write_medmnist(tmp_path / "pneumoniamnist.npz", random)
    monkeypatch.setattr(sources, "_memory", lambda: 10_000)
    refused(medmnist(tmp_path), str(path), "unpacks to ", "memory")


def test_an_array_whose_header_promises_more_than_there_is(tmp_path, random):
    path = write_medmnist(tmp_path / "pneumoniamnist.npz", random)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15, 28, 28)})
    with zipfile.ZipFile(path) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    members["train_images.npy"] = header.getvalue() + b"\0" * 100
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    refused(medmnist(tmp_path), str(path))


def test_an_npz_that_is_a_link_out_of_its_folder(tmp_path, random):
    write_medmnist(tmp_path / "elsewhere.npz", random)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pneumoniamnist.npz").symlink_to(tmp_path / "elsewhere.npz")
    refused(lambda: prepare(tiny(tmp_path, data="pneumoniamnist", data_dir=str(tmp_path / "data"))), "symbolic link")


# ---------------------------------------------------------------------------------------------------------------- .tar


def packed(tmp_path, random) -> tuple[Path, Path]:
    root = write_image_folder(tmp_path / "xrays", random)
    path = tmp_path / "xrays.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(root, "xrays")
    return path, root


def unpacking(tmp_path, path):
    return lambda: prepare(tiny(tmp_path, data=str(path), image_size=8))


def test_a_truncated_tar(tmp_path, random):
    path, _ = packed(tmp_path, random)
    path.write_bytes(path.read_bytes()[: int(random.integers(600, 20_000))])
    refused(unpacking(tmp_path, path), "xrays")  # in the midst of a member, or of a class's images
    assert not list((tmp_path / "cache").rglob("*.tmp*"))


def test_a_truncated_compressed_tar(tmp_path, random):
    path, _ = packed(tmp_path, random)
    squeezed = gzip.compress(path.read_bytes())
    path.write_bytes(squeezed[: len(squeezed) // 2])
    refused(unpacking(tmp_path, path), str(path))


def test_a_tar_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A member that says 2^60 bytes, none of which are there: what counts is said before what follows."""
    path = tmp_path / "bomb.tar"
    member = tarfile.TarInfo("bomb/train/a/x.jpeg")
    member.size = 2**60
    path.write_bytes(gzip.compress(member.tobuf() + b"\0" * 10**6))
    refused(unpacking(tmp_path, path), str(path), "unpacks to over")
    monkeypatch.setattr(folder, "LARGEST_TAR", 1000)
    small = tmp_path / "small.tar"
    with tarfile.open(small, "w") as archive:
        for i in range(3):
            info = tarfile.TarInfo(f"small/train/a/{i}.txt")
            info.size = 400
            archive.addfile(info, io.BytesIO(b"x" * 400))
    refused(unpacking(tmp_path, small), str(small), "unpacks to over")


@pytest.mark.parametrize("kind", (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE))
def test_only_plain_files_leave_a_tar(tmp_path, random, kind):
    path, _ = packed(tmp_path, random)
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("xrays/train/NORMAL/evil.jpeg")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    unpacking(tmp_path, path)()
    assert not list((tmp_path / "cache").rglob("evil*"))


def header(kind: bytes, size: int, name: str = "x/train/a/0.jpeg") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE))
def test_a_header_that_says_it_is_huge_is_not_read(tmp_path, kind):
    """tarfile reads these whole; there is one in the midst too, after a member that is all right."""
    size = 50 << 20
    for first in (b"", header(tarfile.REGTYPE, 0)):
        (tmp_path / "long.tar").write_bytes(gzip.compress(first + header(kind, size) + bytes(size), 1))
        tracemalloc.start()
        try:
            refused(unpacking(tmp_path, tmp_path / "long.tar"), "long.tar", "header of over")
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()


def test_headers_of_headers_and_sparse_maps_end(tmp_path):
    nested = header(tarfile.GNUTYPE_LONGNAME, 512) + b"a".ljust(512, b"\0")
    sparse = bytearray(header(tarfile.GNUTYPE_SPARSE, 0))
    sparse[482] = 1  # "the map goes on"
    total = 256 + sum(sparse[:148]) + sum(sparse[156:])
    sparse[148:156] = b"%06o\0 " % total
    numbers = b"18 GNU.sparse.major=1\n18 GNU.sparse.minor=0\n".replace(b"18", b"22")
    pax = header(tarfile.XHDTYPE, len(numbers)) + numbers.ljust(512, b"\0") + header(tarfile.REGTYPE, 8 << 20)
    contents = {
        "nested": nested * 3000,
        "sparse": bytes(sparse) + (bytes(504) + b"\1" + bytes(7)) * 10_000,
        "pax sparse": pax + b"9" * (8 << 20),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(header(tarfile.REGTYPE, 0) + content + bytes(1024))
        refused(unpacking(tmp_path, path), str(path), "header")


def test_empty_members_are_not_for_nothing(tmp_path, monkeypatch):
    path = tmp_path / "many.tar"
    path.write_bytes(header(tarfile.REGTYPE, 0) * 300 + bytes(1024))
    monkeypatch.setattr(folder, "LARGEST_INDEX", 100_000)
    refused(unpacking(tmp_path, path), str(path), "list of its members")
    monkeypatch.setattr(folder, "LARGEST_TAR", 30_000)
    refused(unpacking(tmp_path, path), str(path), "unpacks to over")
    assert not files_under(tmp_path / "cache")


def test_two_runs_that_unpack_the_same_tar(tmp_path, random, monkeypatch):
    """The other one is done while this one unpacks."""
    path, _ = packed(tmp_path, random)
    real = os.replace

    def late(source, target):
        shutil.copytree(source, target)
        return real(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert len(unpacking(tmp_path, path)().classes) == 2

    def broken(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    os.utime(path, (1, 1))
    refused(unpacking(tmp_path, path), str(path), "Input/output error")


# --------------------------------------------------------------------------------------------------------------- shards


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(size: int = 20) -> bytes:
    image = io.BytesIO()
    Image.fromarray(np.zeros((size, size), np.uint8)).save(image, "PNG")
    return image.getvalue()


def drawing(data: object, workers: int = 0):
    config = Config(data=str(data), image_size=16, batch_size=4, epoch_samples=8, workers=workers)
    return lambda: list(open_source(config).epoch(0, 0, 1))


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("damage", ("truncated", "text", "empty image", "bomb"))
def test_a_damaged_shard(tmp_path, damage, workers, monkeypatch):
    path = shard(tmp_path / "s" / "a.tar", {f"{i}.png": png() for i in range(9)})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif damage == "text":
        path.write_text("no")
    elif damage == "empty image":
        shard(path, {f"{i}.png": b"" for i in range(9)})
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    refused(drawing(tmp_path / "s", workers), str(tmp_path / "s"))


def test_pickles_in_a_shard_are_not_read(tmp_path):
    opens = b"cbuiltins\nopen\n(S'" + str(tmp_path / "unpickled").encode() + b"'\nS'w'\ntR."
    members = {
        f"{i}.{kind}": content for i in range(9) for kind, content in (("png", png()), ("pyd", opens), ("pth", opens))
    }
    shard(tmp_path / "s" / "a.tar", members)
    assert len(drawing(tmp_path / "s")()) == 2
    assert not (tmp_path / "unpickled").exists()


def test_a_shard_that_is_a_link_out_of_its_folder(tmp_path):
    path = shard(tmp_path / "elsewhere.tar", {"0.png": png()})
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tar").symlink_to(path)
    for data in (tmp_path / "s", tmp_path / "s" / "*.tar", tmp_path / "s" / "{a,a}.tar"):
        refused(drawing(data), "a.tar", "symbolic link")
    os.mkfifo(tmp_path / "s" / "b.tar")
    (tmp_path / "s" / "a.tar").unlink()
    refused(drawing(tmp_path / "s"), "b.tar", "no such file")


@pytest.mark.parametrize(
    "data",
    (
        "pipe:touch ran{0..0}",
        "pipe: touch ran; {a,b}",
        "http://x/'; touch ran; '{0..1}.tar",
        "https://x/$(touch ran){0..1}.tar",
        "file:`touch ran`{0..1}",
        "s3://bucket/{0..1}.tar",
    ),
)
def test_an_address_of_shards_starts_no_program(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    refused(drawing(data), "data", "plain http(s) address")
    assert not files_under(tmp_path)


def test_a_file_named_as_a_command_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "pipe:touch ran.tar", {f"{i}.png": png() for i in range(9)})
    assert len(drawing("*.tar")()) == 2
    assert files_under(tmp_path) == {"pipe:touch ran.tar"}


@pytest.mark.parametrize("packer", (bytes, gzip.compress))
def test_a_member_that_is_too_large_is_refused_unread(tmp_path, packer):
    size = 40 << 20
    content = header(tarfile.REGTYPE, size, "0.png") + bytes(size + 1024)
    path = shard(tmp_path / "s" / "a.tar", {})
    path.write_bytes(packer(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_data, "LARGEST_SAMPLE", 10 << 20)
        tracemalloc.start()
        try:
            refused(drawing(tmp_path / "s"), str(path), "'0.png' unpacks to over 10 MiB")
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("kind", ("png", "of a kind that nobody reads"))
def test_a_sample_of_many_files_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(pretrain_data, "LARGEST_SAMPLE", 20_000)
    content = bytes(9000) if kind == "png" else b""
    kinds = ("png", "jpg", "bmp") if kind == "png" else [f"kind{i}" for i in range(30)]
    path = shard(tmp_path / "s" / "a.tar", {f"0.{kind}": content for kind in kinds})
    refused(drawing(tmp_path / "s"), str(path), "'0.", "unpacks to over")


def test_files_of_other_kinds_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_data, "LARGEST_SAMPLE", 20_000)
    shard(
        tmp_path / "s" / "a.tar",
        {f"{i}.{kind}": content for i in range(9) for kind, content in (("png", png()), ("raw", bytes(50_000)))},
    )
    assert len(drawing(tmp_path / "s")()) == 2


def test_a_huge_header_in_a_shard(tmp_path):
    path = shard(tmp_path / "s" / "a.tar", {})
    path.write_bytes(gzip.compress(header(tarfile.GNUTYPE_LONGNAME, 50 << 20) + bytes(50 << 20), 1))
    refused(drawing(tmp_path / "s"), str(path), "header of over")


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("names", ((), ("extensionless",)))
def test_shards_without_a_sample_end(tmp_path, names, workers):
    for name in "abc":
        shard(tmp_path / "s" / f"{name}.tar", {name: b"x" for name in names})
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(300)  # without an end, a KeyboardInterrupt
    try:
        refused(drawing(tmp_path / "s", workers), str(tmp_path / "s"), "no shard has a sample")
        shard(tmp_path / "s" / "d.tar", {f"{i}.png": png() for i in range(9)})
        assert len(drawing(tmp_path / "s", workers)()) == 2  # empty ones beside it are passed over
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("label", (b"9" * 25, b"-" + b"9" * 25, b"9" * 5000, b"no" * 10_000))
def test_a_label_that_is_no_number_of_64_bits(tmp_path, label):
    shard(tmp_path / "s" / "a.tar", {f"{i}.{k}": c for i in range(9) for k, c in (("png", png()), ("cls", label))})
    refused(drawing(tmp_path / "s"), str(tmp_path / "s"), "cannot be decoded")


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "text",
    (
        "lr: " + "[" * 3000,
        "lr: " + "9" * 5000,
        "lr: 0x" + "f" * 5000,
        "epochs_local: 0x" + "f" * 5000,
        "backbone: 0x" + "f" * 5000,
        "0x" + "f" * 5000 + ": 1",
        "lr: 2001-99-99",
        "lr: &a [*a]",
        "preset: [a]",
        "? [a]\n: b",
    ),
    ids=lambda text: text[:20],
)
def test_a_config_of_impossible_values(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config({}, path)
    told = str(caught.value)
    assert len(told) < 2000 and "\n" not in told and (str(path) in told or told.startswith(text.partition(":")[0]))


def test_metrics_nested_without_end_are_not_of_a_finished_run(tmp_path):
    (tmp_path / "metrics.json").write_text("[" * 100_000)
    assert not run_module.is_finished(tmp_path)


def test_a_config_without_end(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\n" + "# long\n" * 50_000)
    refused(lambda: load_config({}, path), str(path), "larger than")
    refused(lambda: load_config({}, "/dev/zero"), "/dev/zero")


@pytest.mark.parametrize(("name", "meant"), [("epochs", "epochs_local, epochs_global or"), ("bachsize", "batch_size?")])
def test_settings_that_may_have_been_meant(tmp_path, name, meant):
    (tmp_path / "c.yaml").write_text(f"{name}: 3\n")
    refused(lambda: load_config({}, tmp_path / "c.yaml"), f"unknown setting '{name}'; did you mean {meant}")


def test_a_config_that_multiplies(tmp_path):
    """A "billion laughs": aliases are references, so it stays small, and is no setting."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    refused(lambda: load_config({}, tmp_path / "c.yaml"), "unknown setting 'a'")
    assert config_module.LARGEST_FILE < 10**6


# ------------------------------------------------------------------------------------------ what a run may write, where


def test_nothing_outside_the_runs_folder_is_written(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))  # it keeps a list of fonts
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    torch.manual_seed(0)
    run = train(
        tiny("runs", name="r", stages="downstream", epochs_downstream=1), backbone=TinyNet(), log=lambda line: None
    )
    assert run.directory == Path("runs/r")
    assert not [name for name in files_under(tmp_path) if not name.startswith("runs/r/")]

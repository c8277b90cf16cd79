"""ffcl pretrain: every method and kind of data, two processes against one, restarts."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import write_image_folder

from ffcl_fast import cli
from ffcl_fast.pretrain import Config, pretrain
from ffcl_fast.pretrain.data import Images, caption_bytes, collate, open_source
from ffcl_fast.pretrain.run import CURVES, LAST, METRICS, WEIGHTS
from ffcl_fast.train.data import Split
from ffcl_fast.train.errors import UserError

TINY = {
    "backbone": "timm/test_resnet",
    "width": 16,
    "batch_size": 16,
    "epochs": 2,
    "epoch_samples": 48,
    "device": "cpu",
}


def config(out: Path, **settings) -> Config:
    return Config(**{**TINY, "out": str(out), **settings})


def metrics(folder: Path) -> dict:
    return json.loads((folder / METRICS).read_text())


@pytest.mark.parametrize(("method", "chunk_size"), (("simclr", 0), ("supcon", 5), ("clip", 5)))
def test_every_method(tmp_path, method, chunk_size):
    lines = []
    folder = pretrain(config(tmp_path, method=method, chunk_size=chunk_size), log=lines.append)
    found = metrics(folder)
    assert found["status"] == "finished" and len(found["epochs"]) == 2 and found["processes"] == 1
    assert all(np.isfinite(e["loss"]) and e["samples_per_second"] > 0 and e["peak_mib"] > 0 for e in found["epochs"])
    assert ("scale" in found["epochs"][0]) == (method == "clip")
    assert all((folder / name).is_file() for name in (WEIGHTS, LAST, CURVES))
    assert list((folder / "tensorboard").iterdir()) and any("epoch 2/2" in line for line in lines)


def test_backbone_starts_a_training(tmp_path):
    """What pretraining leaves is what ``ffcl train --init`` reads."""
    from ffcl_fast.train.config import Config as TrainConfig
    from ffcl_fast.train.model import build

    folder = pretrain(config(tmp_path, epochs=1), log=lambda line: None)
    settings = {"backbone": TINY["backbone"], "init": str(folder / WEIGHTS)}
    loaded = build(TrainConfig(**settings), 8, 2).backbone.state_dict()
    stored = torch.load(folder / LAST, weights_only=True)["model"]
    for name, value in loaded.items():
        assert torch.equal(value, stored[f"images.backbone.{name}"]), name


def test_resumed_run_is_the_same_run(tmp_path):
    whole = pretrain(config(tmp_path / "a"), log=lambda line: None)
    from ffcl_fast.pretrain.run import _Training

    plain = _Training._epoch

    def interrupted(self, number):
        if number == 1:
            raise KeyboardInterrupt
        return plain(self, number)

    half = config(tmp_path / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Training, "_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(half, log=lambda line: None)
    with pytest.raises(UserError, match="exists already"):
        pretrain(half, log=lambda line: None)
    with pytest.raises(UserError, match="lr"):
        pretrain(dataclasses.replace(half, lr=0.5), resume=True, log=lambda line: None)
    resumed = pretrain(half, resume=True, log=lambda line: None)
    a, b = (torch.load(folder / LAST, weights_only=True)["model"] for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return pretrain(config(tmp_path_factory.mktemp("finished"), epochs=1, name="p"), log=str)


@pytest.mark.parametrize(
    "forged",
    (
        {},
        None,
        torch.ones(2),
        {"config": 3},
        {"model": {}},
        {"model": {"x": 3}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"schedule": 3},
        {"history": [1]},
        {"history": [{"epoch": 1}]},
    ),
    ids=repr,
)
def test_a_forged_state_is_one_line(tmp_path, finished, forged, capsys):
    shutil.copytree(finished, tmp_path / "p")
    state = torch.load(finished / LAST, weights_only=True)
    whole = not isinstance(forged, dict) or not forged or "config" in forged
    torch.save(forged if whole else {**state, **forged}, tmp_path / "p" / LAST)
    flags = config(tmp_path, epochs=1, name="p").as_dict().items()
    words = [word for name, value in flags for word in ("--" + name.replace("_", "-"), str(value))]
    assert cli.main(["pretrain", *words, "--resume"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "p" / LAST) in err, err


def test_resuming_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="resume: there is no run .*other"):
        pretrain(config(tmp_path, name="other"), resume=True, log=lambda line: None)
    assert not (tmp_path / "other").exists()


def test_image_folder_and_captions(tmp_path, seed):
    root = write_image_folder(tmp_path / "images", np.random.default_rng(seed), patients=12)
    folder = pretrain(config(tmp_path, data=str(root), method="clip", image_size=16), log=lambda line: None)
    assert metrics(folder)["status"] == "finished"
    assert bytes(caption_bytes("NORMAL").tolist()).rstrip(b"\0") == b"NORMAL"


def write_shards(folder: Path, random: np.random.Generator, count: int = 2, **left_out) -> None:
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as archive:
            for sample in range(10):
                image = io.BytesIO()
                Image.fromarray(random.integers(0, 255, (20, 20)).astype(np.uint8)).save(image, "PNG")
                parts = {"png": image.getvalue(), "cls": str(sample % 3).encode(), "txt": f"number {sample}".encode()}
                for kind, value in parts.items():
                    if kind not in left_out:
                        info = tarfile.TarInfo(f"{shard:03d}{sample:03d}.{kind}")
                        info.size = len(value)
                        archive.addfile(info, io.BytesIO(value))


@pytest.mark.parametrize("method", ("simclr", "supcon", "clip"))
def test_webdataset_shards(tmp_path, method, seed):
    write_shards(tmp_path / "shards", np.random.default_rng(seed))
    settings = {"method": method, "image_size": 16, "data": str(tmp_path / "shards" / "shard-{000..001}.tar")}
    source = open_source(config(tmp_path, **settings))
    for rank in range(2):
        batches = list(source.epoch(0, rank, 2))
        assert len(batches) == source.steps(2) == 1 and batches[0].first.shape == (16, 1, 16, 16)
        again = next(iter(source.epoch(0, rank, 2)))
        assert torch.equal(again.first, batches[0].first) and torch.equal(again.second, batches[0].second)
    folder = pretrain(config(tmp_path, **settings | {"data": str(tmp_path / "shards"), "name": "run"}), log=str)
    assert metrics(folder)["status"] == "finished"


def test_shards_that_lack_something(tmp_path, seed):
    write_shards(tmp_path / "shards", np.random.default_rng(seed), cls=True)
    data = str(tmp_path / "shards")
    with pytest.raises(UserError, match=r"no \.cls"):
        pretrain(config(tmp_path, data=data, method="supcon", name="a"), log=str)
    with pytest.raises(UserError, match="epoch_samples"):
        pretrain(config(tmp_path, data=data, epoch_samples=0, name="b"), log=str)


def test_batches_of_all_processes_are_the_whole(tmp_path, seed):
    """Every sample once, nobody idle, uneven at the end only; a view depends on neither process nor order."""
    count, world = int(torch.randint(30, 80, ())), 3
    split = Split(torch.randint(0, 255, (count, 1, 9, 9), dtype=torch.uint8), torch.arange(count) % 4)
    source = Images(config(tmp_path, batch_size=5, epoch_samples=0, seed=seed % 1000), split, tuple("abcd"))
    parts = [source._parts(3, rank, world) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1 and all(len(b) >= 2 for p in parts for b in p)
    together = [i for p in parts for b in p for i in b]
    assert len(set(together)) == len(together) and count - len(together) < 2 * world
    # by chunks all processes have as many rows, so as many chunks
    source = Images(dataclasses.replace(source.config, chunk_size=2), split, tuple("abcd"))
    parts = [source._parts(3, rank, world) for rank in range(world)]
    assert all(len({len(b) for b in batches}) == 1 for batches in zip(*parts, strict=True))
    together = {i for p in parts for b in p for i in b}
    assert len(together) == sum(len(b) for p in parts for b in p) and count - len(together) < 2 * world
    assert torch.equal(source[7][0], source[7][0])
    assert collate([source[1], source[2]]).first.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "text"),
    (
        ({"method": "moco"}, "method"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
        ({"lr": float("nan")}, "lr"),
        ({"temperature": 0.0}, "temperature"),
        ({"name": "a/b"}, "name"),
        ({"epochs": 1.5}, "epochs"),
    ),
)
def test_impossible_settings(settings, text):
    with pytest.raises(UserError, match=text):
        Config(**settings)

"""ffcl pretrain: every method and kind of data, two processes against one, restarts."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_cases import write_image_folder

from ffcl_fast import cli
from ffcl_fast.pretrain import Config, model, pretrain
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
    assert [e["trace"]["step"] for e in found["epochs"]] == [[1, 2, 3], [4, 5, 6]]
    for epoch in found["epochs"]:  # three equal batches
        assert epoch["loss"] == pytest.approx(np.mean(epoch["trace"]["loss"]), rel=1e-6)
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


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """Ctrl-C in the step after that many."""
    plain, left = model.Pretraining.step, iter(range(steps))

    def step(self, batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.Pretraining, "step", step)
        yield


def state(folder: Path) -> dict:
    return torch.load(folder / LAST, weights_only=True)


def test_a_run_goes_on_within_an_epoch(tmp_path, seed, monkeypatch):
    """To the same weights, from the last checkpoint: what was done after it is done again. Dropout draws the same."""
    plain = model.build

    def with_dropout(*arguments):
        classifier = plain(*arguments)
        classifier.backbone = torch.nn.Sequential(torch.nn.Dropout(0.2), classifier.backbone)
        return classifier

    monkeypatch.setattr(model, "build", with_dropout)
    settings = {"checkpoint_every": 2, "log_every": 3, "epoch_samples": 80, "name": "run", "seed": seed % 1000}
    whole = pretrain(config(tmp_path / "a", **settings), log=str)
    half = config(tmp_path / "b", **settings)
    with interrupted_after(8), pytest.raises(KeyboardInterrupt):
        pretrain(half, log=str)
    assert (
        state(tmp_path / "b" / "run")["partial"]["steps"] == 2 and len(metrics(tmp_path / "b" / "run")["epochs"]) == 1
    )
    lines = []
    resumed = pretrain(half, resume=True, log=lines.append)
    assert lines[0] == "going on after epoch 1 and 2 steps of 2"
    a, b = (state(folder)["model"] for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for one, other in zip(metrics(whole)["epochs"], metrics(resumed)["epochs"], strict=True):
        assert one["trace"]["step"] == other["trace"]["step"] and one["trace"]["loss"] == other["trace"]["loss"]
        assert one["lr"] == other["lr"] and one["steps"] == 5
    assert metrics(whole)["epochs"][1]["trace"]["step"] == [7, 8, 9, 10]  # a checkpoint's and an epoch's last as well


def test_shards_go_on_within_an_epoch(tmp_path, seed):
    """As many samples as the epoch has left, other draws."""
    write_shards(tmp_path / "shards", np.random.default_rng(seed))
    settings = config(tmp_path, data=str(tmp_path / "shards"), image_size=16, checkpoint_every=1, epochs=1, name="run")
    with interrupted_after(2), pytest.raises(KeyboardInterrupt):
        pretrain(settings, log=str)
    source = open_source(settings)
    assert source.steps(1) == 3 and source.steps(1, 32) == 1 and source.steps(2, 32) == source.steps(1, 48) == 0
    drawn = [next(iter(source.epoch(0, 0, 1, done))).first for done in (0, 32, 32)]
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert [e["steps"] for e in metrics(pretrain(settings, resume=True, log=str))["epochs"]] == [3]


def test_tensorboard_has_every_record_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path, checkpoint_every=1, name="run")
    with interrupted_after(5), pytest.raises(KeyboardInterrupt):
        pretrain(settings, log=str)
    folder = pretrain(settings, resume=True, log=str)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    trace = [value for epoch in metrics(folder)["epochs"] for value in epoch["trace"]["loss"]]
    found = events.Scalars("step/loss")
    assert [e.step for e in found] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([e.value for e in found], trace, rtol=1e-5)
    assert [e.step for e in events.Scalars("epoch/loss")] == [3, 6]


def test_curves_show_a_single_epoch(tmp_path):
    """A line over its steps, not a dot."""
    import matplotlib.axes

    drawn, plain = [], matplotlib.axes.Axes.plot

    def plot(self, x, y, **options):
        drawn.append((list(x), list(y)))
        return plain(self, x, y, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "plot", plot)
        folder = pretrain(config(tmp_path, epochs=1, epoch_samples=64), log=str)
    trace = metrics(folder)["epochs"][0]["trace"]
    expected = [([1, 2, 3, 4], trace[name]) for name in ("loss", "samples_per_second", "peak_mib")]
    assert drawn == expected


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
        {"partial": 3},
        {"partial": {"samples": -1}},
        {"partial": {"samples": 1.5}},
        {"partial": {"loss": "x"}},
        {"partial": {"trace": {"step": [1]}}},
        {"partial": {"others": 1}},
        {"history": [1]},
        {"history": [{"epoch": 1}]},
        {
            "history": [
                {
                    "epoch": 1,
                    "loss": 1.0,
                    "samples_per_second": 1.0,
                    "seconds": 1.0,
                    "peak_mib": 1.0,
                    "lr": 1.0,
                    "steps": 3,
                }
            ]
        },
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


def ffcl_pretrain(capsys, *words: str) -> tuple[int, str]:
    """Exit code, and the one line of an error or all that was told."""
    code = cli.main(["pretrain", *words])
    out, err = capsys.readouterr()
    assert err.count("\n") == (code != 0) and "Traceback" not in err, err
    return code, err or out


def test_resume_takes_the_stored_settings(tmp_path, capsys, monkeypatch):
    """``--resume RUN`` alone; flags that would make it another run are refused, those that move it are not."""
    half = config(tmp_path / "runs", epochs=3, name="p")
    with interrupted_after(4), pytest.raises(KeyboardInterrupt):
        pretrain(half, log=str)
    run = str(tmp_path / "runs" / "p")
    for flags, text in (
        (("--epochs", "4"), "epochs: a resumed run keeps its own, 3; leave the flag out"),
        (("--method", "clip"), "method: a resumed run keeps its own, 'simclr'"),
        (("--name", "q"), "name: cannot be given with --resume"),
        (("--lr", "none"), "lr: expected a number"),
    ):
        code, told = ffcl_pretrain(capsys, "--resume", run, *flags)
        assert code == 2 and text in told, told
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    code, told = ffcl_pretrain(capsys, "--resume", run)
    assert code == 2 and f"there is no run {run}" in told
    monkeypatch.chdir(tmp_path)
    code, told = ffcl_pretrain(capsys, "--resume", "p", "--out", "moved", "--timeout", "60", "--epochs", "3")
    assert code == 0 and "going on after epoch 1 of 3" in told and str(Path("moved") / "p") in told, told
    assert metrics(moved / "p")["status"] == "finished" and len(metrics(moved / "p")["epochs"]) == 3
    weights = (moved / "p" / WEIGHTS).read_bytes()
    code, told = ffcl_pretrain(capsys, "--resume", "moved/p")
    assert code == 0 and "finished already" in told and (moved / "p" / WEIGHTS).read_bytes() == weights
    for text, reason in (("epochs: many\n", "epochs: expected"), ("colour: red\n", "unknown setting 'colour'")):
        (moved / "p" / "config.yaml").write_text(text)
        code, told = ffcl_pretrain(capsys, "--resume", "moved/p")
        assert code == 2 and reason in told and "config.yaml" in told, told


def test_two_at_one_run(tmp_path):
    """The second is refused, also while the first has no checkpoint yet."""
    from ffcl_fast.train.run import lock

    (tmp_path / "p").mkdir()
    release = lock(tmp_path / "p")
    with pytest.raises(UserError, match="another process is training it"):
        pretrain(config(tmp_path, name="p"), resume=True, log=str)
    release()
    pretrain(config(tmp_path, name="p", epochs=1), resume=True, log=str)


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
        ({"log_every": -1}, "log_every"),
        ({"checkpoint_every": "x"}, "checkpoint_every"),
    ),
)
def test_impossible_settings(settings, text):
    with pytest.raises(UserError, match=text):
        Config(**settings)

"""What is wrong with an ``ffcl pretrain``: one line and exit code 2 on every process, and the name stays free."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import shutil
from pathlib import Path

import numpy as np
import processes
import pytest
from processes import run
from test_pretrain import TINY, config, interrupted_after, metrics, pretrain, write_shards
from train_cases import write_image_folder

from ffcl_fast import cli
from ffcl_fast.pretrain.run import LAST, METRICS

processes.preload("ffcl_fast.pretrain.run", "timm", "sklearn.datasets", "sklearn.model_selection")
processes.preload("matplotlib.pyplot", "torch.utils.tensorboard")


def flags(out: Path | str, **settings) -> list[str]:
    chosen = {**TINY, "epochs": 1, "out": out, "name": "run", **settings}
    return [word for name, value in chosen.items() for word in ("--" + name.replace("_", "-"), str(value))]


def command(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error of ``ffcl pretrain`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["pretrain", *words])
    return code, out.getvalue(), err.getvalue()


def prepare(folder: Path, seed: int) -> None:
    """Folders of images, good and bad, shards, and a run whose checkpoint is cut short."""
    random = np.random.default_rng(seed)
    write_image_folder(folder / "images", random, patients=12)
    files = sorted((folder / "images").rglob("train/*/*.*"))
    for split in ("train", "test"):
        (folder / "one" / split / files[0].parent.name).mkdir(parents=True)
        shutil.copy(files[0], folder / "one" / split / files[0].parent.name)
    shutil.copytree(folder / "images", folder / "corrupt")
    (folder / "corrupt" / files[3].relative_to(folder / "images")).write_bytes(b"no image")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    write_shards(folder / "shards", random)
    pretrain(config(folder / "cut", epochs=1, name="run"), log=str)
    last = folder / "cut" / "run" / LAST
    last.write_bytes(last.read_bytes()[: int(random.integers(1, 5000))])


def wrong(folder: str) -> dict[str, tuple[list[str], str]]:
    """Arguments, and a pattern of what is told."""
    out = f"{folder}/out"
    return {
        "no folder": (flags(out, data=f"{folder}/nowhere"), "nowhere"),
        "no images": (flags(out, data=f"{folder}/empty", epoch_samples=8), "empty"),
        "one image": (flags(out, data=f"{folder}/one"), "one"),
        "a corrupt image": (flags(out, data=f"{folder}/corrupt"), "corrupt"),
        "no shard": (flags(out, data=f"{folder}/shards/x-*.tar"), "no such files"),
        "one sample": (flags(out, epoch_samples=1), "too few"),
        "another backbone": (flags(out, backbone="resnet19"), "resnet19"),
        "a chunk of one": (flags(out, chunk_size=1), "epoch 1: "),
        "a rate too high": (flags(out, lr=1e30, log_every=1, epoch_samples=160), "lr: the loss is|NaN"),
        "no place": (flags(f"{folder}/file"), "file"),
        "a cut checkpoint": ([*flags(f"{folder}/cut"), "--resume"], LAST),
        "no such run": (["--resume", f"{folder}/nowhere"], "nowhere"),
    }


def problems(folder: str, rank: int = 0) -> list[str]:
    found = []
    for what, (words, text) in wrong(folder).items():
        code, _, err = command(words)
        if code != 2 or err.count("\n") != 1 or not re.search(text, err):
            found.append(f"rank {rank}, {what}: {code} {err}")
        if (Path(folder) / "out" / "run").exists() and not rank:
            found.append(f"{what}: the name is taken")
    return found


def test_alone(tmp_path, seed):
    prepare(tmp_path, seed)
    assert not problems(str(tmp_path))


def test_on_every_process(tmp_path, seed):
    prepare(tmp_path, seed)
    for found in run(2, _every, str(tmp_path)):
        assert not found, "\n".join(found)


def _every(rank: int, world: int, folder: str) -> list[str]:
    multiprocessing.current_process()._config["daemon"] = False  # else it may not start those that decode
    return problems(folder, rank)


def test_odd_sizes_train(tmp_path, seed):
    """Chunks that do not divide the batch, batches larger than the data, an epoch that ends in an uneven batch."""
    for name, settings in (("a", {"chunk_size": 7}), ("b", {"batch_size": 4000}), ("c", {"epoch_samples": 51})):
        code, _, err = command(flags(tmp_path, **{**settings, "name": name}))
        assert code == 0, err
        assert metrics(tmp_path / name)["status"] == "finished"
    assert [e["steps"] for e in metrics(tmp_path / "b")["epochs"]] == [1]


def test_going_on_with_more_processes(tmp_path, seed):
    """Within an epoch: its samples are divided anew, steps and learning rate follow the number of processes."""
    settings = {"epochs": 3, "epoch_samples": 128, "checkpoint_every": 1, "log_every": 1, "name": "run"}
    with interrupted_after(10), pytest.raises(KeyboardInterrupt):
        pretrain(config(tmp_path, **settings), log=str)
    told = run(2, _goes_on, str(tmp_path / "run"))
    assert [code for code, *_ in told] == [0, 0], told
    assert "going on after epoch 1 and 2 steps of 3" in told[0][1]
    found = metrics(tmp_path / "run")
    assert found["status"] == "finished" and found["processes"] == 2
    # 128 samples by 16, then 32 of them by 16 and the rest by 32
    assert [(e["steps"], e["processes"]) for e in found["epochs"]] == [(8, 1), (2 + 3, 2), (4, 2)]
    assert [e["trace"]["step"][-1] for e in found["epochs"]] == [8, 13, 17]
    rate = 1e-3 * (32 / 256) ** 0.5
    # after 2 of 3 epochs, the first being the warm-up, the cosine is half way down; at the end it is 0
    assert abs(found["epochs"][1]["lr"] - rate / 2) < 1e-3 * rate and abs(found["epochs"][2]["lr"]) < 1e-12


def _goes_on(rank: int, world: int, folder: str) -> tuple[int, str, str]:
    return command(["--resume", folder])


def test_status_is_kept(tmp_path):
    """A second run of a name is refused, and leaves the first as it was."""
    assert command(flags(tmp_path))[0] == 0
    before = (tmp_path / "run" / METRICS).read_text()
    code, _, err = command(flags(tmp_path))
    assert code == 2 and "exists already" in err and (tmp_path / "run" / METRICS).read_text() == before

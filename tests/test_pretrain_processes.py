"""ffcl pretrain on two processes: alone, where one dies, and under torchrun, which starts them anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import elastic_pretrain
import numpy as np
import processes
import pytest
from processes import Died, run
from test_pretrain import TINY, config, metrics
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ffcl_fast.distributed import LostRank
from ffcl_fast.pretrain import pretrain

# What a pretraining imports takes longer than the pretraining: once for all processes that the fork server starts.
processes.preload("ffcl_fast.pretrain.run", "timm", "sklearn.datasets", "sklearn.model_selection")
processes.preload("matplotlib.pyplot", "torch.utils.tensorboard")


def test_two_processes_train_as_one(tmp_path):
    """SimCLR; BatchNorm sees each process's rows, so only the first loss is compared, and not closely. A process that
    dies between two steps is a clear error in the other one."""
    alone = pretrain(config(tmp_path / "a", batch_size=32, epochs=1, epoch_samples=32), log=str)
    told, died = run(2, _two, str(tmp_path), check=False)
    assert died == Died(7) and "has died" in told, (told, died)
    both = metrics(tmp_path / "b" / "run")
    assert both["processes"] == 2 and both["status"] == "finished"
    first = [e["loss"] for e in both["epochs"]]
    assert np.isfinite(first).all() and abs(first[0] - metrics(alone)["epochs"][0]["loss"]) < 0.5
    assert metrics(tmp_path / "c" / "run")["epochs"][0]["loss"] == pytest.approx(first[0], rel=1e-3)
    assert len(metrics(tmp_path / "d" / "run")["epochs"]) == 1


def _two(rank: int, world: int, out: str) -> str:
    for name, options in (("b", {"distributed": "gather"}), ("c", {"distributed": "ring"})):
        settings = {"epochs": 1, "epoch_samples": 32, "name": "run", **options}
        pretrain(config(Path(out) / name, **settings), log=lambda line: None)
    from ffcl_fast.pretrain.run import _Training

    plain = _Training._epoch

    def epoch(self, number):
        if rank == 1 and number == 1:
            os._exit(7)
        return plain(self, number)

    _Training._epoch = epoch
    try:
        pretrain(config(Path(out) / "d", name="run"), log=lambda line: None)
    except LostRank as error:
        return str(error)
    raise AssertionError("no error")


def test_a_slow_read_is_no_lost_process(tmp_path):
    """Each process reads its data for longer than a collective of the training may take."""
    assert run(2, _slow, str(tmp_path), timeout=10) == ["finished", "finished"]


def _slow(rank: int, world: int, out: str) -> str:
    from ffcl_fast.pretrain import run as module

    plain = module.open_source

    def slowly(config):
        time.sleep(12)
        return plain(config)

    module.open_source = slowly
    return metrics(pretrain(config(Path(out), epochs=1, epoch_samples=32), log=lambda line: None))["status"]


def test_elastic_restart_goes_on(tmp_path):
    """Two processes, one of which dies in the second epoch: the run ends as if nothing had happened."""
    settings = ["--backbone", TINY["backbone"], "--batch-size", "16", "--epochs", "2", "--epoch-samples", "48"]
    assert "going on after epoch 1 of 2" in _restarted(elastic_pretrain.pretrain, tmp_path, settings)
    found = metrics(tmp_path / "run")
    assert found["status"] == "finished" and found["processes"] == 2 and len(found["epochs"]) == 2


def test_a_training_goes_on_after_an_elastic_restart(tmp_path):
    settings = ["--data", "digits", "--backbone", "timm/test_resnet", "--image-size", "16", "--epoch-samples", "32",
                "--batch-size", "8", "--stages", "local,downstream", "--epochs-local", "1", "--epochs-downstream", "1",
                "--workers", "0"]  # fmt: skip
    told = _restarted(elastic_pretrain.train, tmp_path, settings)
    assert told.count("local 1/1") == 1 and told.count("downstream 1/1") == 1, told
    assert metrics(tmp_path / "run")["status"] == "finished"


def _restarted(function, out: Path, settings: list[str]) -> str:
    """Run it on two processes with one restart; what they told. The agent starts a function and not a command, so that
    the fork server spares each process its imports."""
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=1, monitor_interval=0.1, start_method="forkserver", local_addr="localhost",
    )  # fmt: skip
    log = out / "log"
    processes.start_server()
    with _signals_kept():
        elastic_launch(launch, function)(str(out), str(log), [*settings, "--device", "cpu", "--name", "run"])
    return log.read_text()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The agent takes them over."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""ffcl pretrain on two processes, alone and under torchrun, where one dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run
from test_pretrain import TINY, config, metrics

from ffcl_fast.pretrain import pretrain

ROOT = Path(__file__).resolve().parent.parent


def test_two_processes_train_as_one(tmp_path):
    """SimCLR without batch statistics in its way: BatchNorm sees each process's rows, so the first loss is compared."""
    alone = pretrain(config(tmp_path / "a", batch_size=32, epochs=1, epoch_samples=32), log=str)
    run(2, _two, str(tmp_path))
    both = metrics(tmp_path / "b" / "run")
    assert both["processes"] == 2 and both["status"] == "finished"
    first = [e["loss"] for e in both["epochs"]]
    assert np.isfinite(first).all() and abs(first[0] - metrics(alone)["epochs"][0]["loss"]) < 0.5
    assert metrics(tmp_path / "c" / "run")["epochs"][0]["loss"] == pytest.approx(first[0], rel=1e-3)


def _two(rank: int, world: int, out: str) -> None:
    for name, options in (("b", {"distributed": "gather"}), ("c", {"distributed": "ring"})):
        settings = {"epochs": 1, "epoch_samples": 32, "name": "run", **options}
        pretrain(config(Path(out) / name, **settings), log=lambda line: None)


@pytest.mark.long
def test_elastic_restart_goes_on(tmp_path):
    """torchrun, two processes, one of which dies in the second epoch: the run ends as if nothing had happened."""
    settings = ["--backbone", TINY["backbone"], "--batch-size", "16", "--epochs", "2", "--epoch-samples", "48"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    script = str(ROOT / "tests" / "elastic_pretrain.py")
    command = [sys.executable, *launch, script, *settings, "--device", "cpu", "--out", str(tmp_path), "--name", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "going on after epoch 1 of 2" in ended.stdout
    assert metrics(tmp_path / "run")["status"] == "finished"

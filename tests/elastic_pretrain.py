"""What test_pretrain_processes.py has torchrun's agent start: runs whose second process dies once."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ffcl_fast.cli import main
from ffcl_fast.pretrain import run
from ffcl_fast.train import stages


def pretrain(out: str, log: str, arguments: list[str]) -> None:
    """``ffcl pretrain`` in one worker; before the first restart rank 1 dies after one epoch."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        plain = run._Training._epoch

        def epoch(self, number):
            if number == 1:
                _die_after(self.folder / run.LAST)
            return plain(self, number)

        run._Training._epoch = epoch
    _call("pretrain", out, log, arguments)


def train(out: str, log: str, arguments: list[str]) -> None:
    """``ffcl train`` in one worker; before the first restart rank 1 dies when the downstream stage begins."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        plain = stages.Trainer.fit

        def fit(self, stage, progress):
            if stage.name == "downstream":
                _die_after(Path(out) / "run" / "checkpoints" / "local.safetensors")
            return plain(self, stage, progress)

        stages.Trainer.fit = fit
    _call("train", out, log, arguments)


def _die_after(written: Path) -> None:
    """Once rank 0 has written that: the agent ends it as soon as this process is gone."""
    while not written.exists():
        time.sleep(0.05)
    os._exit(9)


def _call(command: str, out: str, log: str, arguments: list[str]) -> None:
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        code = main([command, *arguments, "--out", out])
    if code:
        raise SystemExit(code)

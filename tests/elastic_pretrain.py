"""What test_pretrain_processes.py has torchrun's agent start: a pretraining whose second process dies once."""

from __future__ import annotations

import os
from pathlib import Path

from ffcl_fast.cli import main
from ffcl_fast.pretrain import run


def pretrain(out: str, log: str, arguments: list[str]) -> None:
    """``ffcl pretrain`` in one worker; before the first restart rank 1 dies after one epoch."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        plain = run._Training._epoch

        def epoch(self, number):
            if number == 1:
                os._exit(9)
            return plain(self, number)

        run._Training._epoch = epoch
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        code = main(["pretrain", *arguments, "--out", out])
    if code:
        raise SystemExit(code)

"""What happens to a run around it: no space, a folder that cannot be written, a killed worker, a scheduler's SIGTERM.

docs/trust.md lists each fault, what the user sees, and its test.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train_resume import SETTINGS, outcome, quiet, resumed
from train_cases import tiny

from ffcl_fast import cli
from ffcl_fast.train import batches
from ffcl_fast.train import run as run_module
from ffcl_fast.train.errors import UserError
from ffcl_fast.train.run import train

SMALL = ["--data", "digits", "--backbone", "timm/test_resnet", "--image-size", "16", "--epoch-samples", "64",
         "--epochs-global", "1", "--epochs-downstream", "1", "--device", "cpu", "--name", "r"]  # fmt: skip

PRETRAIN = ["--data", "digits", "--backbone", "timm/test_resnet", "--width", "8", "--batch-size", "16",
            "--epoch-samples", "32", "--epochs", "1", "--device", "cpu", "--name", "r"]  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)


def command(
    out: Path, *more: str, files_up_to: int | None = None, module: str = "train", settings: list[str] = SMALL
) -> subprocess.Popen:
    """``ffcl train``, or the other, in a process of its own; no file of it can grow over ``files_up_to`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if files_up_to:
            resource.setrlimit(resource.RLIMIT_FSIZE, (files_up_to, files_up_to))

    words = [sys.executable, "-m", f"ffcl_fast.{module}", *settings, "--out", str(out), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit)


def test_sigterm_is_told_and_the_run_goes_on(tmp_path):
    process = command(tmp_path, "--epochs-local", "500", "--patience", "500")
    next(line for line in process.stdout if line.startswith("local 1/"))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert f"--resume {tmp_path / 'r'}" in err and "Traceback" not in err
    assert (tmp_path / "r" / "checkpoints").is_dir() and not list(tmp_path.rglob("*.tmp*"))


def test_a_write_that_fails_half_way_is_one_line_and_leaves_no_half_file(tmp_path):
    """The kernel refuses to let any file grow: as a full disk, in the midst of a file."""
    process = command(tmp_path, "--epochs-local", "1", files_up_to=40_000)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert err.count("\n") == 1 and "weights.safetensors" in err, err
    left = [p for p in (tmp_path / "r" / "checkpoints").rglob("*") if p.is_file()]
    assert not left, left


def test_a_pretraining_whose_write_fails_is_one_line_and_leaves_no_half_file(tmp_path):
    process = command(tmp_path, files_up_to=40_000, module="pretrain", settings=PRETRAIN)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert err.count("\n") == 1 and "last.pt" in err, err
    assert not [p for p in (tmp_path / "r").rglob("*") if "last" in p.name or "tmp" in p.name]


def test_a_disk_full_of_another_librarys_errors_is_an_oserror(tmp_path, monkeypatch):
    """PyTorch's own writer, too, tells it by a RuntimeError."""

    def full(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written .*PytorchStreamWriter") as caught:
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    assert caught.value.errno == errno.EIO and caught.value.filename.endswith("state.pt")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_is_told_before_any_training():
    with pytest.raises(UserError, match="out /proc/runs: cannot be written"):
        train(tiny(Path("/proc/runs"), stages="downstream"), log=lambda line: None)


def test_a_folder_that_becomes_read_only_leaves_the_last_stored_step(tmp_path, monkeypatch):
    expected = outcome(quiet(tiny(tmp_path, name="w", seed=5, **SETTINGS)).directory)
    real, calls, last = os.replace, [], int(torch.randint(4, 30, ()))

    def read_only(source, target):
        calls.append(target)
        if len(calls) >= last:
            raise OSError(errno.EROFS, "Read-only file system", str(target))
        return real(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(OSError, match="Read-only"):
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    monkeypatch.setattr(os, "replace", real)
    resumed(tmp_path / "k")
    assert outcome(tmp_path / "k") == expected


def test_a_killed_worker_ends_the_run_and_resume_gives_the_same_bits(tmp_path, monkeypatch, capsys):
    settings = {**SETTINGS, "stages": "local,downstream", "epochs_local": 1, "epochs_downstream": 1, "workers": 1}
    expected = outcome(quiet(tiny(tmp_path, name="w", seed=5, **settings)).directory)
    real, parent = batches.Views.__getitem__, os.getpid()
    victim = int(torch.randint(0, 1000, ()))

    def killed(self, index):
        item = real(self, index)
        if os.getpid() != parent and index >= victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    monkeypatch.setattr(batches.Views, "__getitem__", killed)
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        quiet(tiny(tmp_path, name="k", seed=5, **settings))
    monkeypatch.setattr(batches.Views, "__getitem__", real)
    resumed(tmp_path / "k")
    assert outcome(tmp_path / "k") == expected

    def again(flags):
        raise caught.value

    monkeypatch.setitem(cli._COMMANDS, "train", again)
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "killed" in err and "--resume" in err, err

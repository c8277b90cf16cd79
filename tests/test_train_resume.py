"""Kills within an epoch: the run goes on from its last stored batch to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from processes import start
from safetensors.torch import load_file
from train_cases import TinyNet, forge_state, layer_records, tiny

from ffcl_fast.train import run as run_module
from ffcl_fast.train import stages, train
from ffcl_fast.train.errors import Interrupted, UserError
from ffcl_fast.train.run import Run, resumed_config


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)


def quiet(config, **options) -> Run:
    torch.manual_seed(config.seed)
    return train(config, backbone=TinyNet(), log=options.pop("log", lambda line: None), **options)


def resumed(folder: Path, **options) -> Run:
    return quiet(resumed_config(folder, {}), resume=folder, **options)


def outcome(folder: Path) -> tuple:
    """Everything that must not depend on the clock: history, test scores and the bits of the final weights."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for stage in metrics["stages"].values():
        for record in stage["epochs"]:
            del record["seconds"], record["images_per_second"]
    weights = load_file(folder / "checkpoints" / "downstream.safetensors")
    return metrics["stages"], metrics["test"], {name: w.numpy().tobytes() for name, w in weights.items()}


SETTINGS = {"batch_size": 16, "checkpoint_steps": 2, "local_schedule": "together"}  # six steps an epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    return outcome(quiet(tiny(tmp_path_factory.mktemp("runs"), name="w", seed=5, **SETTINGS)).directory)


def kill_at(monkeypatch, count: int) -> None:
    """Ctrl-C in the ``count``-th training step counted over all stages, after its gradients and before its update."""
    real, steps = stages.parallel.average_gradients, iter(range(1, 10**6))

    def killed(parameters):
        if next(steps) == count:
            raise KeyboardInterrupt
        return real(parameters)

    monkeypatch.setattr(stages.parallel, "average_gradients", killed)


def test_a_run_stopped_in_any_step_goes_on_from_the_last_stored_one(whole, tmp_path, monkeypatch):
    stop = random.randint(4, 36)  # 36 steps in all
    kill_at(monkeypatch, stop)
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    folder = tmp_path / "k"
    monkeypatch.undo()
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    repeated = []
    real = stages.parallel.average_gradients
    monkeypatch.setattr(stages.parallel, "average_gradients", lambda p: (repeated.append(1), real(p))[1])
    resumed(folder)
    assert len(repeated) == 36 - (stop - 1) // 2 * 2  # the steps since the last stored one, not since the epoch's start
    assert outcome(folder) == whole


def test_a_damaged_checkpoint_within_an_epoch_costs_the_steps_since_the_one_before(whole, tmp_path, monkeypatch):
    kill_at(monkeypatch, 12)
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    monkeypatch.undo()
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    folder = tmp_path / "k"
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["local-0001", "local-0001-000002", "local-0001-000004"]
    weights = folder / "checkpoints" / names[-1] / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    weights.write_bytes(content)
    lines: list[str] = []
    resumed(folder, log=lines.append)
    assert sum("local-0001-000004" in line and "damaged" in line for line in lines) == 1
    assert outcome(folder) == whole


def _other_width(state: dict) -> None:
    first = state["optimizer"]["state"][0]
    first["exp_avg"] = first["exp_avg"].flatten()[1:]


FORGED = {
    "fewer parameters": lambda state: state["optimizer"]["param_groups"][0].update(params=[0]),
    "other widths": _other_width,
    "no averages": lambda state: state["optimizer"].update(state={0: {}}),
    "no groups": lambda state: state["optimizer"].update(param_groups=3),
    "an empty schedule": lambda state: state.update(schedule={}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_that_does_not_fit_is_one_line(tmp_path, monkeypatch, name):
    kill_at(monkeypatch, 4)
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    monkeypatch.undo()
    folder = max((tmp_path / "k" / "checkpoints").iterdir())
    state = torch.load(folder / "state.pt")
    FORGED[name](state)
    forge_state(folder, state)
    with pytest.raises(UserError, match=f"checkpoint .*{folder.name}: not the state of this training") as caught:
        resumed(tmp_path / "k")
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_within_an_epoch_leaves_the_last_stored_step(whole, tmp_path, monkeypatch):
    real, calls, at = torch.save, [], random.randint(2, 17)

    def full(state, path):
        calls.append(1)
        if len(calls) == at:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        quiet(tiny(tmp_path, name="k", seed=5, **SETTINGS))
    monkeypatch.undo()
    assert not [p for p in (tmp_path / "k").rglob("*") if ".tmp" in p.name]
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    resumed(tmp_path / "k")
    assert outcome(tmp_path / "k") == whole


def test_greedy_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    settings = {**SETTINGS, "local_schedule": "greedy", "stages": "local,downstream", "epochs_downstream": 1}
    settings["epochs_local"] = 1
    expected = outcome(quiet(tiny(tmp_path, name="w", seed=5, **settings)).directory)
    epochs = expected[0]["local"]["epochs"]
    assert [set(r["val"]) for r in epochs] == [layer_records(name) for name in ("stem", "stages.0", "stages.1")]
    assert len({r["lr"] for r in epochs}) == 1  # each layer starts at the full rate
    kill_at(monkeypatch, random.randint(1, 18))
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5, **settings))
    monkeypatch.undo()
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    resumed(tmp_path / "k")
    assert outcome(tmp_path / "k") == expected


def _train_in_a_child(folder: str, threads: int) -> None:
    run_module.report.learning_curves = lambda *_: None
    torch.set_num_threads(threads)  # the bits depend on it
    quiet(tiny(Path(folder), name="k", seed=5, **SETTINGS))


KILLS = int(os.environ.get("FFCL_KILLS", "1"))  # 20 in `make test-long`


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_process_killed_at_a_random_moment_resumes_to_the_same_bits(whole, tmp_path, kill):
    """SIGKILL at any moment of the run's life, from before its folder exists to its last file."""
    process = start(_train_in_a_child, str(tmp_path), torch.get_num_threads())
    folder = tmp_path / "k"
    # The moment is counted in what the run has written, so that it does not depend on the machine's speed.
    written = random.randint(0, 25)
    seen: set[tuple[Path, int]] = set()
    while len(seen) < written and process.is_alive():
        seen |= _there(folder).items()
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.join()
    left = [path for path in _there(folder) if path.suffix == ".safetensors" and not path.name.startswith(".")]
    for path in left:
        load_file(path)  # whole, or not there
    if not (folder / "config.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)  # nothing has begun
        _train_in_a_child(str(tmp_path), torch.get_num_threads())
    elif not run_module.is_finished(folder):
        resumed(folder)
    assert outcome(folder) == whole


def _there(folder: Path) -> dict[Path, int]:
    """The files that are there, and their inodes; a file that goes while they are listed is none."""
    found = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent) / name for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_ino
    return found

"""Checkpoints: whole or absent, checked before use, the one before kept."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn
from train_cases import forge_state

from ffcl_fast.train import checkpoint
from ffcl_fast.train.checkpoint import Checkpoints, Progress, write_atomically, write_text
from ffcl_fast.train.errors import UserError


def state_of(epoch: int) -> dict:
    return {"optimizer": {"state": {}, "param_groups": []}, "schedule": {"last_epoch": epoch}}


def saved(tmp_path, epochs: int, best: int = 1, stage: str = "local") -> tuple[Checkpoints, list[str]]:
    lines: list[str] = []
    store = Checkpoints(tmp_path / "c", lines.append)
    for epoch in range(1, epochs + 1):
        network = nn.Linear(2, 2)
        nn.init.constant_(network.weight, epoch)
        progress = Progress(stage, epoch, {stage: [{}] * epoch}, {stage: min(best, epoch)})
        store.save(progress, network, state_of(epoch))
    return store, lines


def folders(store: Checkpoints) -> list[str]:
    return sorted(os.listdir(store.directory))


def test_a_checkpoint_reads_back(tmp_path):
    store, _ = saved(tmp_path, 2)
    progress = store.latest()
    assert (progress.stage, progress.epoch, progress.best) == ("local", 2, {"local": 1})
    network = nn.Linear(2, 2)
    assert store.load("local", 2, network) == state_of(2)
    assert network.weight[0, 0] == 2


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    assert folders(saved(tmp_path, 6, best=2)[0]) == ["local-0002", "local-0005", "local-0006"]


def test_the_stage_before_keeps_its_best_as_long_as_it_may_be_needed(tmp_path):
    store, _ = saved(tmp_path, 4, best=2)
    best, history = {"local": 2, "global": 1}, {"local": [{}] * 4, "global": [{}]}
    store.save(Progress("global", 1, history, best), nn.Linear(2, 2), {})
    assert folders(store) == ["global-0001", "local-0002", "local-0004"]
    store.save(Progress("global", 2, history, best), nn.Linear(2, 2), {})
    assert folders(store) == ["global-0001", "global-0002"]
    assert store.latest().stage == "global"


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "no manifest", "bad manifest", "missing file"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, damage):
    store, lines = saved(tmp_path, 3, best=3)
    newest = store.directory / "local-0003"
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-3])
    elif damage == "flipped bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing file":
        (newest / "state.pt").unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("[]")
    assert store.latest().epoch == 2
    assert len(lines) == 1 and "local-0003" in lines[0] and "damaged" in lines[0]
    with pytest.raises(UserError, match="local-0003"):
        store.load("local", 3, nn.Linear(2, 2))


def test_none_and_all_damaged_are_told_apart(tmp_path):
    assert Checkpoints(tmp_path / "none", print).latest() is None
    store, _ = saved(tmp_path, 2)
    for name in folders(store):
        (store.directory / name / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        store.latest()


def test_newest_is_by_number_not_by_name(tmp_path):
    """Epochs and steps may outgrow the digits that their names are padded to."""
    store = Checkpoints(tmp_path / "c", print)
    history = {"local": [{}] * 10_001}
    for epoch in range(9998, 10_002):
        store.save(Progress("local", epoch, history, {"local": epoch}), nn.Linear(2, 2), state_of(epoch))
        assert store.latest().epoch == epoch
    assert folders(store) == ["local-10000", "local-10001"]
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        store.save(Progress("global", 1, history, step=step), nn.Linear(2, 2), state_of(1))
        assert store.latest().step == step
    assert folders(store) == ["global-0001-1000000", "global-0001-1000001"]


@pytest.mark.parametrize(
    "state", ({}, None, torch.ones(2), {"optimizer": 3, "schedule": {}}, {"optimizer": {}, "schedule": {}}), ids=repr
)
def test_a_forged_state_is_one_line(tmp_path, state):
    store, _ = saved(tmp_path, 1)
    forge_state(store.directory / "local-0001", state)
    with pytest.raises(UserError, match="state.pt: holds no|state.pt: holds a|state.pt: its optimizer"):
        store.load("local", 1, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "forged",
    (
        "[" * 100_000,
        '{"epoch": ' + "9" * 5000 + "}",
        {"history": [1]},
        {"history": {"local": [1]}},
        {"best": {"local": "x"}},
        {"best": {"local": 99}},
        {"epoch": 1.5},
        {"partial": {"total": 3}},
        {"partial": [1]},
        {"other": 1},
    ),
    ids=lambda forged: str(forged)[:30],
)
def test_a_forged_manifest_is_damage(tmp_path, forged):
    store, lines = saved(tmp_path, 2)
    manifest = store.directory / "local-0002" / "manifest.json"
    if isinstance(forged, dict):
        forged = json.dumps({**json.loads(manifest.read_text()), **forged})
    manifest.write_text(forged)
    assert store.latest().epoch == 1
    assert len(lines) == 1 and "local-0002: damaged" in lines[0] and "\n" not in lines[0]


def test_state_is_never_unpickled_into_code(tmp_path):
    store, _ = saved(tmp_path, 1)
    forge_state(store.directory / "local-0001", {"optimizer": os.system})
    with pytest.raises(UserError, match="state.pt"):
        store.load("local", 1, nn.Linear(2, 2))


def test_a_failed_save_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    store, _ = saved(tmp_path, 2)
    before = folders(store)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        store.save(Progress("local", 3), nn.Linear(2, 2), {})
    assert folders(store) == before and store.latest().epoch == 2


def test_an_atomic_write_is_whole_or_absent(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def half(scratch):
        scratch.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f.txt"]


def test_weights_of_another_network_are_named(tmp_path):
    checkpoint.save_weights(tmp_path / "w.safetensors", nn.Linear(2, 2))
    with pytest.raises(UserError, match="w.safetensors"):
        checkpoint.load_weights(tmp_path / "w.safetensors", nn.Linear(3, 2))

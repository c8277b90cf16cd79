"""Whole runs on a tiny backbone: the same numbers twice, the same after a kill, and what they leave behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from train_cases import TinyNet, layer_records, tiny, write_image_folder

from ffcl_fast.train import run as run_module
from ffcl_fast.train import stages, train
from ffcl_fast.train.config import STAGES
from ffcl_fast.train.errors import Interrupted, UserError
from ffcl_fast.train.local import GOODNESS
from ffcl_fast.train.run import Run, resumed_config


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of a tiny run; those of `finished`, made before this, are looked at."""
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)


METRICS = ("accuracy", "macro_f1", "precision", "recall", "auc")


def quiet(config, **options) -> Run:
    torch.manual_seed(config.seed)  # TinyNet's weights are drawn here, by the caller
    return train(config, backbone=TinyNet(), log=options.pop("log", lambda line: None), **options)


def numbers(run: Run) -> dict:
    """Everything in metrics.json that must not depend on the clock."""
    metrics = json.loads((run.directory / "metrics.json").read_text())
    for stage in metrics["stages"].values():
        for record in stage["epochs"]:
            del record["seconds"], record["images_per_second"]
    return {key: metrics[key] for key in ("data", "parameters", "stages", "test") if key in metrics}


def weights(run: Run, stage: str = "downstream") -> dict[str, torch.Tensor]:
    return load_file(run.directory / "checkpoints" / f"{stage}.safetensors")


def same(one: Run, two: Run) -> bool:
    a, b = weights(one), weights(two)
    return numbers(one) == numbers(two) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    return quiet(tiny(tmp_path_factory.mktemp("runs"), name="first", seed=5))


def test_a_finished_run_has_all_its_files(finished):
    folder = finished.directory
    assert folder.name == "first"
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 5
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "downstream.safetensors",
        "global.safetensors",
        "local.safetensors",
    ]
    with Image.open(folder / "learning_curves.png") as picture:
        assert picture.width > 1000 and picture.height > 300
    assert not list(folder.rglob("*.tmp*"))


def test_metrics_json_holds_every_epoch_and_the_test(finished):
    metrics = json.loads((finished.directory / "metrics.json").read_text())
    assert metrics == finished.metrics
    assert metrics["status"] == "finished" and metrics["own_backbone"] and metrics["backbone"] == "TinyNet"
    assert metrics["data"]["images"] == {
        "train": torch.bincount(run_module.prepare(tiny(finished.directory)).train.labels).tolist(),
        "val": metrics["data"]["images"]["val"],
        "test": metrics["data"]["images"]["test"],
    }
    assert sum(metrics["data"]["images"]["test"]) == 360
    for name in STAGES:
        stage = metrics["stages"][name]
        assert [record["epoch"] for record in stage["epochs"]] == [1, 2]
        losses = [record["val"]["loss"] for record in stage["epochs"]]
        assert stage["best_epoch"] == 1 + losses.index(min(losses))
        assert all(record["images_per_second"] > 0 and record["trace"] for record in stage["epochs"])
    assert set(metrics["stages"]["local"]["epochs"][0]["val"]) == layer_records("stem", "stages.0", "stages.1")
    assert set(metrics["stages"]["downstream"]["epochs"][0]["val"]) == {"loss", "accuracy"}
    assert set(metrics["test"]) == set(METRICS) and all(0 <= v <= 1 for v in metrics["test"].values())


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(finished, tmp_path):
    again = quiet(tiny(tmp_path, name="again", seed=5))
    assert same(finished, again)
    other = quiet(tiny(tmp_path, name="other", seed=6))
    assert numbers(other)["stages"] != numbers(finished)["stages"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("when", ["mid-epoch", "after an epoch"])
def test_a_run_killed_anywhere_resumes_to_the_same_bits(finished, tmp_path, monkeypatch, stage, when):
    config = tiny(tmp_path, name="killed", seed=5)
    real = stages.Trainer._train_epoch if when == "mid-epoch" else stages.Trainer._validate

    def killed(self, current, *rest):
        epoch = rest[1].epoch + 1 if when == "mid-epoch" else rest[0]
        value = real(self, current, *rest)
        if current.name == stage and epoch == 2:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(stages.Trainer, real.__name__, killed)
    with pytest.raises(Interrupted, match="--resume .*killed"):
        quiet(config)
    monkeypatch.undo()
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["status"] == "running"
    folder = tmp_path / "killed"
    assert same(finished, quiet(resumed_config(folder, {}), resume=folder))


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Trainer, "_train_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5))
    monkeypatch.undo()
    assert same(finished, quiet(resumed_config(tmp_path / "k", {}), resume=tmp_path / "k"))


def test_a_damaged_newest_checkpoint_costs_one_epoch_only(finished, tmp_path, monkeypatch):
    real = stages.Trainer._validate

    def killed(self, stage, epoch):
        if stage.name == "global" and epoch == 2:
            raise KeyboardInterrupt
        return real(self, stage, epoch)

    monkeypatch.setattr(stages.Trainer, "_validate", killed)
    with pytest.raises(Interrupted):
        quiet(tiny(tmp_path, name="k", seed=5))
    monkeypatch.undo()
    state = tmp_path / "k" / "checkpoints" / "global-0001" / "state.pt"
    state.write_bytes(state.read_bytes()[:-9])
    lines: list[str] = []
    resumed = quiet(resumed_config(tmp_path / "k", {}), resume=tmp_path / "k", log=lines.append)
    assert sum("global-0001" in line and "damaged" in line for line in lines) == 1
    assert same(finished, resumed)


def test_a_damaged_best_epoch_costs_its_stage_that_epoch_only(tmp_path, monkeypatch):
    """The newest checkpoint is sound, so every resume would come to the damaged one again."""
    real, epochs = stages.Trainer._validate, iter(range(100))
    monkeypatch.setattr(stages.Trainer, "_validate", lambda *a: {**real(*a), "loss": float(next(epochs))})
    lines = []

    on_epoch = run_module.report.Board.epoch

    def told_of(self, stage, record):
        on_epoch(self, stage, record)
        if stage == "local" and record["epoch"] == 3:
            (weights,) = (tmp_path / "r" / "checkpoints" / "local-0001").glob("weights*")
            weights.write_bytes(weights.read_bytes()[:-1])

    monkeypatch.setattr(run_module.report.Board, "epoch", told_of)
    config = tiny(tmp_path, name="r", stages=("local", "downstream"), epochs_local=3)
    run = quiet(config, log=lines.append)
    told = [line for line in lines if "damaged" in line]
    assert len(told) == 1 and "local-0001" in told[0] and "going on with epoch 3" in told[0]
    assert run.metrics["stages"]["local"]["best_epoch"] == 3 and run.metrics["status"] == "finished"


@pytest.mark.parametrize("loss", ["siglip", "pair_cosine"])
def test_a_contrast_is_validated_in_batches_of_the_trainings_size(tmp_path, monkeypatch, loss):
    """Its loss grows with the rows that it contrasts."""
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    real = stages.LocalStage.step

    def step(self, batch, train):
        sizes[train].add(len(batch[0]))
        return real(self, batch, train)

    monkeypatch.setattr(stages.LocalStage, "step", step)
    quiet(tiny(tmp_path, stages=("local",), local_loss=loss, batch_size=16, epoch_samples=64))
    assert sizes[True] == {16} and (sizes[False] == {16}) == (loss == "siglip")


def test_a_full_disk_leaves_the_last_epoch_to_resume_from(finished, tmp_path, monkeypatch):
    real, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", "state.pt")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        quiet(tiny(tmp_path, name="k", seed=5))
    monkeypatch.undo()
    assert same(finished, quiet(resumed_config(tmp_path / "k", {}), resume=tmp_path / "k"))


def test_a_run_is_never_written_over(finished):
    config = tiny(finished.directory.parent, name="first", seed=9)
    before = (finished.directory / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="first: exists already"):
        quiet(config)
    assert (finished.directory / "metrics.json").read_bytes() == before


def test_a_finished_run_is_not_trained_again(finished):
    with pytest.raises(UserError, match="finished already"):
        quiet(resumed_config(finished.directory, {}), resume=finished.directory)


def test_runs_without_a_name_get_folders_of_their_own(tmp_path):
    config = tiny(tmp_path, stages="downstream", epochs_downstream=1, epoch_samples=32)
    folders = {quiet(config).directory for _ in range(2)}
    assert len(folders) == 2 and all(folder.name.startswith("digits-resnet18-s0-") for folder in folders)


def test_a_wrong_run_leaves_no_folder(tmp_path):
    with pytest.raises(UserError):
        train(tiny(tmp_path / "runs", backbone="resnet19", name="x"), log=lambda line: None)
    assert not (tmp_path / "runs").exists()


def test_resuming_keeps_the_runs_own_settings(finished, tmp_path):
    folder = finished.directory
    assert resumed_config(folder, {"workers": "1"}).workers == 1
    assert resumed_config(folder, {"lr": "0.001"}).lr == 0.001  # what it has already
    with pytest.raises(UserError, match="lr: a resumed run keeps its own"):
        resumed_config(folder, {"lr": "0.1"})
    with pytest.raises(UserError, match="no run of ffcl train"):
        resumed_config(tmp_path, {})


def test_a_run_in_training_is_locked(finished):
    release = run_module.lock(finished.directory)
    with pytest.raises(UserError, match="another process"):
        run_module.lock(finished.directory)
    release()
    run_module.lock(finished.directory)()


def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch):
    losses = iter([0.5, 0.4, 0.9, 0.8, 0.7])
    kept = []

    def validate(self, stage, epoch):
        kept.append({k: v.clone() for k, v in self.network.state_dict().items()})
        return {"loss": next(losses), "accuracy": 0.5}

    monkeypatch.setattr(stages.Trainer, "_validate", validate)
    config = tiny(tmp_path, stages="downstream", epochs_downstream=9, patience=2, epoch_samples=32)
    run = quiet(config)
    assert [len(run.metrics["stages"]["downstream"]["epochs"]), len(kept)] == [4, 4]
    assert run.metrics["stages"]["downstream"]["best_epoch"] == 2
    assert all(torch.equal(value, kept[1][name]) for name, value in weights(run).items())


def test_a_loss_that_is_not_finite_is_told(tmp_path):
    with pytest.raises(UserError, match="stage downstream, epoch 1: the loss is (nan|inf).*--lr"):
        quiet(tiny(tmp_path, stages="downstream", lr=1e30))


def test_pretrained_weights_go_into_a_later_run(finished, tmp_path):
    file = finished.directory / "checkpoints" / "global.safetensors"
    run = quiet(tiny(tmp_path, stages="downstream", init=str(file), epochs_downstream=1, lr=1e-9))
    before, after = weights(finished, "global"), weights(run)
    torch.testing.assert_close(after["backbone.stem.weight"], before["backbone.stem.weight"], rtol=0, atol=1e-6)


def test_pretraining_alone_has_no_test_but_a_picture(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = quiet(tiny(tmp_path, stages="local,global", epochs_local=1, epochs_global=1))
    assert "test" not in run.metrics and (run.directory / "learning_curves.png").is_file()


@pytest.mark.parametrize("loss", ["focal", "plain", "weighted"])
def test_two_classes_learn_from_an_image_folder(tmp_path, seed, loss):
    root = write_image_folder(tmp_path / "xrays", np.random.default_rng(seed))
    config = tiny(
        tmp_path / "runs",
        data=str(root),
        image_size=8,
        downstream_loss=loss,
        augment="none",
        epochs_local=1,
        epochs_global=1,
        epochs_downstream=4,
        lr=0.01,
        batch_size=16,
    )
    run = quiet(config)
    assert run.metrics["test"]["accuracy"] > 0.9 and run.metrics["test"]["auc"] > 0.95


def test_the_leaf_variant_trains_layer_by_layer(tmp_path):
    run = quiet(tiny(tmp_path, stages="local", local_layers="leaves", epochs_local=3, epoch_samples=0, lr=0.003))
    first, *_, last = run.metrics["stages"]["local"]["epochs"]
    layers = ("stem", *(f"stages.{i}.{part}" for i in (0, 1) for part in ("conv", "bn")))
    assert set(first["val"]) == layer_records(*layers)
    assert all(first["val"][GOODNESS + name] > 0 for name in layers)
    assert last["val"]["loss"] < first["val"]["loss"]


@pytest.mark.parametrize("loss", ["auto", "plain", "weighted", "focal"])
def test_more_than_two_classes_learn_with_every_loss(tmp_path, loss):
    run = quiet(
        tiny(tmp_path, stages="downstream", downstream_loss=loss, epochs_downstream=3, epoch_samples=0, lr=0.02)
    )
    assert run.metrics["test"]["accuracy"] > 0.5


def test_a_folder_appears_with_its_settings_or_not_at_all(tmp_path, monkeypatch):
    """A run killed while its folder is made could neither be resumed nor begun again."""
    seen = []

    def killed(path, text):
        seen.append(sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path, name="r"), backbone=TinyNet())
    assert seen == [[]] and not any(tmp_path.iterdir())
    train(tiny(tmp_path, name="r", stages=("downstream",)), backbone=TinyNet())
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "r").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_before_anything_is_stored_leaves_the_name_free(tmp_path, monkeypatch):
    config = tiny(tmp_path, name="again", seed=5)
    real = stages.Trainer._finite
    monkeypatch.setattr(stages.Trainer, "_finite", lambda *_: (_ for _ in ()).throw(UserError("the loss is nan")))
    with pytest.raises(UserError, match="nan"):
        quiet(config)
    assert not (tmp_path / "again").exists()
    net = TinyNet().requires_grad_(False)
    with pytest.raises(UserError, match="stage local: nothing to train"):
        train(config, backbone=net, log=lambda line: None)
    assert not (tmp_path / "again").exists()

    def later(self, stage, epoch, scalars):
        if stage.name == "global":
            raise UserError("the loss is nan")
        return real(self, stage, epoch, scalars)

    monkeypatch.setattr(stages.Trainer, "_finite", later)
    with pytest.raises(UserError, match="nan"):
        quiet(config)
    assert list((tmp_path / "again" / "checkpoints").glob("local*"))  # work is never thrown away
    with pytest.raises(UserError, match="again: exists already.*--resume"):
        quiet(config)

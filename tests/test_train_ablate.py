"""``ffcl ablate``: which runs a plan has, that they are resumed and never mixed, and the table of them."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
import yaml
from train_cases import TinyNet, tiny

from ffcl_fast import cli
from ffcl_fast.train import ablate as module
from ffcl_fast.train.ablate import Plan, Row, ablate, listing, markdown, read_plan, spread
from ffcl_fast.train.config import Config
from ffcl_fast.train.errors import Interrupted, UserError

SMALL = {
    k: v
    for k, v in tiny(".", epochs_local=1, epochs_global=1, epochs_downstream=1, epoch_samples=32).as_dict().items()
    if k not in ("out", "name", "seed", "preset") and v != getattr(Config, k, None)
}


def test_the_default_rows_are_the_methods_own_ablations_and_all_can_be_configured(tmp_path):
    plan = Plan()
    assert len(plan.seeds) >= 3
    configs = {row.name: plan.config(row, 1, tmp_path) for row in plan.rows}
    assert [c.stages for c in list(configs.values())[:4]] == [
        ("downstream",),
        ("local", "downstream"),
        ("global", "downstream"),
        ("local", "global", "downstream"),
    ]
    assert {c.local_loss for c in configs.values()} >= {"pair_cosine", "sum_squares", "info_nce", "sup_con"}
    assert {c.global_loss for c in configs.values()} >= {"pair_cosine", "info_nce", "sup_con", "nt_xent"}
    assert len({c.name for c in configs.values()}) == len(configs) and all(c.seed == 1 for c in configs.values())


def test_an_ablation_stopped_halfway_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    plan = Plan([Row("none", {"stages": ["downstream"]}), Row("local", {"stages": "local,downstream"})], SMALL, [3, 4])
    options = {"backbone_factory": TinyNet, "log": lambda line: None}
    whole = ablate(plan, tmp_path / "whole", **options)

    real, calls = module.train, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(tmp_path)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        ablate(plan, tmp_path / "parts", **options)
    first = json.loads((tmp_path / "parts" / "ablation.json").read_text())
    assert [[run["seed"] for run in row["runs"]] for row in first["rows"]] == [[3], [3]]
    said = listing(plan, tmp_path / "parts")
    assert [line.partition(": ")[2].split()[0] for line in said[:4]] == ["done", "done", "to", "to"]
    assert said[2] == "[3/4] none, seed 4: to run"
    assert said[4].startswith("2 of 4 runs to go, about ")
    parts = ablate(plan, tmp_path / "parts", **options)
    assert len(calls) == 5  # two before, the stopped one, and the two that were missing

    def numbers(found):
        return [[(run["seed"], run["test"], run["stages"]) for run in row["runs"]] for row in found["rows"]]

    assert numbers(parts) == numbers(whole)
    assert len({json.dumps(run) for row in numbers(parts) for run in row}) == 4
    assert not list(tmp_path.glob("*/runs/*/checkpoints"))
    table = (tmp_path / "parts" / "ablation.md").read_text()
    mean = statistics.fmean(100 * run["test"]["accuracy"] for run in parts["rows"][1]["runs"])
    assert f"| local | {mean:.2f} ±" in table and table == markdown(parts)
    assert (tmp_path / "parts" / "ablation.png").read_bytes().startswith(b"\x89PNG")

    other = Plan(plan.rows, {**SMALL, "lr": 0.5}, plan.seeds)
    with pytest.raises(UserError, match="lr: .*was run with 0.001, now 0.5"):
        ablate(other, tmp_path / "parts", **options)


def test_the_table_has_mean_and_sample_deviation_and_the_gain_seed_by_seed():
    def run(seed, accuracy):
        return {"seed": seed, "test": {"accuracy": accuracy, "macro_f1": 0.5, "auc": 0.25}}

    rows = [
        {"name": "base", "runs": [run(0, 0.5), run(1, 0.7)]},
        {"name": "better", "runs": [run(0, 0.6), run(1, 0.8), run(2, 0.1)]},
        {"name": "missing", "runs": []},
    ]
    lines = markdown({"rows": rows}).splitlines()
    assert lines[2] == "| base | 60.00 ± 14.14 | 50.00 ± 0.00 | 25.00 ± 0.00 |  | 2 |"
    assert "| +10.00 ± 0.00 | 3 |" in lines[3]
    assert lines[4] == "| missing | – | – | – | – | 0 |"
    assert spread([1.0]) == "1.00"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rows: [{name: a}, {name: A}]", "rows: .*differ"),
        ("rows: [{settings: {}}]", "a row has a name"),
        ("rows: [{name: a, settings: {learning: 1}}]", "learning"),
        ("rows: [{name: a, settings: {stages: [local]}}]", "no downstream stage"),
        ("rows: [{name: a, settings: {seed: 1}}]", "seed: is the ablation's own"),
        ("rows: [{name: a, settings: {lr: -1}}]", "lr"),
        ("rows: 3", "rows must be a list"),
        ("settings: [lr]", "settings must be"),
        ("seeds: [0, 0]", "seeds: expected different"),
        ("seeds: [a]", "seeds: expected whole"),
        ("lr: 1", "unknown key 'lr'"),
        ("1: 2\na: 3", "unknown key 1"),
        ("? 0x" + "f" * 5000 + "\n: 1", "unknown key a number"),
        ("seeds: [0x" + "f" * 5000 + "]", "seeds: expected whole"),
        ("rows: [{name: a, settings: {1: 2}}]", "unknown setting 1"),
        ("rows: [{name: a}, {name: b, settings: {lr: 1, lr: 2}}]", "key 'lr' is given twice"),
        ("rows: [{name: " + "x" * 300 + "}]", "name: expected at most 255 bytes"),
    ],
)
def test_a_wrong_plan_is_named_in_one_line(tmp_path, capsys, text, named):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        read_plan(tmp_path / "plan.yaml", {})
    code = cli.main(["ablate", "--config", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")])
    assert code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_the_last_row_gets_wrong_is_told_before_the_first_is_trained(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("the data was read")

    monkeypatch.setattr(module, "prepare", read)
    for wrong in ({"backbone": "resnet19"}, {"init": "/no/w.pth"}):
        plan = Plan([Row("a"), Row("b", wrong)], SMALL, [0])
        with pytest.raises(UserError, match=next(iter(wrong.values()))):
            ablate(plan, tmp_path / "out", log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_begun_is_listed_with_the_time_of_its_stored_epochs(tmp_path):
    plan = Plan([Row("a"), Row("b")], SMALL, [0])
    run = tmp_path / "runs" / "a-s0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(plan.config(plan.rows[0], 0, tmp_path).as_dict()))
    assert "begun, 0 s so far" in listing(plan, tmp_path)[0]
    metrics = {"status": "running", "stages": {"local": {"epochs": [{"seconds": 2.5}, {"seconds": 4.5}]}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert listing(plan, tmp_path) == [
        "[1/2] a, seed 0: begun, 7 s so far", "[2/2] b, seed 0: to run", "2 of 2 runs to go"
    ]  # fmt: skip
    with pytest.raises(UserError, match="lr: .*was run with"):
        listing(Plan(plan.rows, {**SMALL, "lr": 0.5}, [0]), tmp_path)


EPOCH = {"epoch": 1, "train": {"loss": 1.0, "layer": 1.0}, "val": {"loss": 1.0, "layer": 1.0}, "seconds": 5.0}
METRICS = {
    "status": "finished",
    "data": {"classes": ["a", "b"]},
    "backbone": "net",
    "own_backbone": False,
    "parameters": 9,
    "versions": {},
    "machine": {},
    "seconds": 12.5,
    "test": {"accuracy": 0.5, "macro_f1": 0.5, "precision": 0.5, "recall": 0.5, "auc": 0.5},
    "stages": {"local": {"best_epoch": 1, "epochs": [EPOCH]}, "downstream": {"best_epoch": 1, "epochs": [EPOCH]}},
}
GONE = object()


@pytest.fixture
def stored_run(tmp_path):
    """Arguments of ``ffcl ablate``, and the folder of its only run, which is finished."""
    file, out = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"seeds": [0], "settings": SMALL, "rows": [{"name": "a"}]}))
    plan = read_plan(file, {})
    folder = out / "runs" / "a-s0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plan.config(plan.rows[0], 0, out).as_dict()))
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    return ["ablate", "--config", str(file), "--out", str(out)], folder


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("", {"status": "finished"}, "own_backbone is missing"),
        ("data", [], "data: expected a mapping, got []"),
        ("data.classes", GONE, "data.classes is missing"),
        ("seconds", "long", "seconds: expected a number, got 'long'"),
        ("parameters", True, "parameters: expected a whole number, got True"),
        ("stages", None, "stages: expected a mapping, got None"),
        ("stages.local", {}, "stages.local.epochs is missing"),
        ("stages.local.epochs", [], "stages.local.best_epoch: expected one of its 0 epochs, got 1"),
        ("stages.local.epochs", [1], "stages.local.epochs, number 1: expected a mapping, got 1"),
        ("stages.local.epochs", [{**EPOCH, "val": {"loss": None}}], "number 1: val.loss: expected a number, got None"),
        ("stages.downstream.best_epoch", 99, "stages.downstream.best_epoch: expected one of its 1 epochs, got 99"),
        ("stages.downstream", GONE, "no downstream stage"),
        ("test", GONE, "test is missing"),
        ("test.auc", GONE, "test.auc is missing"),
        ("test.auc", 10**400, "too large"),
    ],
)
def test_damaged_metrics_are_named_in_one_line_and_nothing_is_changed(stored_run, capsys, place, value, told):
    arguments, folder = stored_run
    metrics = json.loads(json.dumps(METRICS))
    *path, last = place.split(".")
    holder = metrics
    for name in path:
        holder = holder[name]
    if not last:
        metrics = value
    elif value is GONE:
        del holder[last]
    else:
        holder[last] = value
    (folder / "metrics.json").write_text(json.dumps(metrics))
    before = sorted(folder.parent.parent.rglob("*"))
    for command in (["evaluate", str(folder)], arguments, [*arguments, "--dry-run"]):
        code = cli.main(command)
        out, err = capsys.readouterr()
        assert code == 2 and not out and len(err.strip().splitlines()) == 1, (command, out, err)
        assert str(folder) in err and told in err
        assert "metrics.json" in err or "no downstream stage" in told
    assert sorted(folder.parent.parent.rglob("*")) == before


def test_sound_metrics_are_those_of_a_run_that_is_done(stored_run, capsys):
    arguments, folder = stored_run
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out == "[1/1] a, seed 0: done in 12 s\n0 of 1 runs to go\n"
    assert cli.main(arguments) == 0
    found = json.loads((folder.parent.parent / "ablation.json").read_text())
    assert found["rows"][0]["runs"][0]["stages"]["local"] == {"best_epoch": 1, "epochs": 1, "val": EPOCH["val"]}


@pytest.mark.parametrize(
    ("data", "said"),
    (
        (["no.tar"], "no such file"),
        (["chestmnist"], "multi-label"),
        (["pneumoniamnist_65"], "sizes"),
        (["pneumoniamnist", "--data-dir", "nowhere"], "no such folder"),
    ),
    ids=("none", "labels", "size", "folder"),
)
def test_a_dry_run_looks_whether_the_data_is_there(data, said, stored_run, tmp_path, monkeypatch, capsys):
    arguments, _ = stored_run
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--out", "other", "--dry-run", "--data", *data]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "data" in err and said in err


def test_flags_win_over_the_file(tmp_path):
    values = {"seeds": [1], "settings": {"lr": 0.1, "batch_size": 8}, "rows": [{"name": "a"}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    plan = read_plan(tmp_path / "plan.yaml", {"lr": "0.2"}, "5,6")
    config = plan.config(plan.rows[0], 5, tmp_path)
    assert (plan.seeds, config.lr, config.batch_size) == ([5, 6], 0.2, 8)


def test_the_plans_in_the_project_are_valid(request):
    plans = sorted((request.config.rootpath / "benchmarks" / "ablations").glob("*.yaml"))
    assert plans
    for file in plans:
        assert len(read_plan(file, {}).seeds) >= 3


def test_the_command_runs_a_plan_and_prints_the_table(tmp_path, capsys):
    settings = {**SMALL, "backbone": "timm/test_resnet", "image_size": 16}
    plan = {"seeds": [1], "settings": settings, "rows": [{"name": "head only", "settings": {"stages": ["downstream"]}}]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    arguments = ["ablate", "--config", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert capsys.readouterr().out == "[1/1] head only, seed 1: to run\n1 of 1 runs to go\n"
    assert cli.main([*arguments, "--downstream", "frozen"]) == 0
    assert "| head only |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert found["settings"]["downstream"] == "frozen" and torch.__version__ == found["machine"]["torch"]

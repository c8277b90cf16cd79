"""The command line: exit codes, one line for a mistake, and what users see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from train_cases import write_image_folder

from ffcl_fast import backends, cli

# a real run through the command line, in a few seconds: timm's smallest ResNet
SMALL = ["--data", "digits", "--backbone", "timm/test_resnet", "--image-size", "16", "--epoch-samples", "64",
         "--epochs-local", "1", "--epochs-global", "1", "--epochs-downstream", "1", "--device", "cpu"]  # fmt: skip


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *SMALL, "--out", str(out), "--name", "small"]) == 0
    return out / "small"


def test_train_says_how_well_and_where(tmp_path, capsys):
    code, out, err = run(capsys, "train", *SMALL, "--stages", "downstream", "--out", str(tmp_path), "--name", "r")
    assert code == 0
    assert "test accuracy " in out and "AUC" in out
    assert out.splitlines()[-1] == f"learning curves: {tmp_path / 'r' / 'learning_curves.png'}"
    assert "images/s" in out and "loss" in out


@pytest.mark.long
def test_evaluate_repeats_the_test_metrics_and_draws(trained, capsys, monkeypatch):
    from ffcl_fast.train import report

    told = []
    draw = report.roc
    monkeypatch.setattr(report, "roc", lambda *a: (told.append(capsys.readouterr().out), draw(*a)))
    code, out, _ = run(capsys, "evaluate", str(trained))
    assert code == 0 and "accuracy" in told[0], "the metrics do not wait for the pictures"
    for name in ("confusion_matrix.png", "roc.png", "layers.png", "embeddings.png"):
        assert str(trained / name) in out and (trained / name).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((trained / "metrics.json").read_text())["test"]
    assert json.loads((trained / "evaluation.json").read_text())["test"] == pytest.approx(stored, abs=1e-6)


def test_a_config_file_and_flags_over_it(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("batch_size: 16\nseed: 3\nstages: downstream\n")
    code, _, err = run(capsys, "train", *SMALL, "--config", str(tmp_path / "c.yaml"), "--seed", "4",
                       "--out", str(tmp_path), "--name", "r")  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "r" / "metrics.json").read_text())["config"]
    assert (config["batch_size"], config["seed"], config["stages"]) == (16, 4, ["downstream"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--data", "/no/such/place"], "/no/such/place"),
        (["train", "--data", "digits", "--lr", "-1"], "lr"),
        (["train", "--batch-size", "many"], "batch_size"),
        (["train", "--stages", "local,nothing"], "stages"),
        (["train", "--backbone", "resnet19", "--data", "digits"], "resnet19"),
        (["train", "--data", "digits", "--init", "/no/weights.pth"], "/no/weights.pth"),
        (["train", "--config", "/no/config.yaml"], "/no/config.yaml"),
        (["train", "--data", "digits", "--out", "/dev/null/x"], "/dev/null/x"),
        (["train", "--learning-rate", "1"], "see ffcl train --help"),
        (["ablate", "--learning-rate", "1"], "--learning-rate"),
        (["train", "--epochs", "5"], "did you mean --epochs-local, --epochs-global or --epochs-downstream?"),
        (["ablate", "--batchsize=5"], "did you mean --batch-size?"),
        (["evaluate", "r", "--dat-dir", "x"], "did you mean --data-dir"),
        (["--versoin"], "did you mean --version?"),
        (["train", "5"], "unrecognized arguments: 5 (see"),
        (["train", "digits"], "did you mean --data digits?"),
        (["evaluate", "r", "."], "did you mean --data .?"),
        (["--fast"], "--fast"),
        (["train", "--resume", "/no/run"], "/no/run"),
        (["train", "--resume", "/no/run", "--config", "x.yaml"], "--resume"),
        (["evaluate", "/no/run"], "/no/run"),
        (["evaluate"], "RUN"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert named in err and len(err.strip().splitlines()) == 1 and err.startswith("ffcl")
    assert os.listdir(tmp_path) == []


def test_a_corrupt_image_ends_in_one_line_and_writes_nothing(tmp_path, capsys, seed):
    root = write_image_folder(tmp_path / "xrays", np.random.default_rng(seed))
    victim = root / "test" / "PNEUMONIA" / "person1_virus_0.jpeg"
    victim.write_bytes(victim.read_bytes()[:200])
    code, _, err = run(capsys, "train", "--data", str(root), "--out", str(tmp_path / "runs"), "--workers", "2")
    assert code == 2 and str(victim) in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong", [["--backbone", "resnet19"], ["--init", "/no/w.pth"], ["--out", "file"]])
def test_what_can_be_told_before_the_data_is_read_is_told_first(tmp_path, monkeypatch, capsys, wrong):
    from ffcl_fast.train import run as module

    def read(*_):
        raise AssertionError("the data was read")

    monkeypatch.setattr(module, "prepare", read)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, _, err = run(capsys, "train", *wrong)
    assert code == 2 and wrong[1] in err and len(err.strip().splitlines()) == 1


def test_an_npz_is_pointed_to_its_name(tmp_path, capsys):
    for file, told in (("pneumoniamnist.npz", "--data pneumoniamnist --data-dir"), ("mine.npz", "rename it")):
        (tmp_path / file).touch()
        code, _, err = run(capsys, "train", "--data", str(tmp_path / file), "--out", str(tmp_path / "runs"))
        assert code == 2 and told in err and str(tmp_path) in err and len(err.strip().splitlines()) == 1


def test_a_run_says_how_much_of_a_weight_file_it_took(trained, capsys):
    weights, out = trained / "checkpoints" / "global.safetensors", trained.parent
    code, said, _ = run(capsys, "train", *SMALL, "--stages", "downstream", "--init", str(weights), "--out", str(out),
                        "--name", "init")  # fmt: skip
    line = next(line for line in said.splitlines() if line.startswith("init"))
    assert code == 0 and str(weights) in line and "tensors found in it; not used of the file: head." in line


def test_a_run_of_that_name_is_left_alone(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    code, _, err = run(capsys, "train", *SMALL, "--out", str(trained.parent), "--name", "small")
    assert code == 2 and "exists already" in err
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_resuming_a_finished_run_does_nothing(trained, capsys):
    code, out, _ = run(capsys, "train", "--resume", "small", "--out", str(trained.parent))
    assert code == 0 and "finished already" in out


@pytest.mark.parametrize("damage", ["weights", "metrics", "unfinished", "no downstream"])
def test_evaluate_names_what_is_wrong_with_a_run(trained, tmp_path, capsys, damage):
    import shutil

    folder = shutil.copytree(trained, tmp_path / "copy")
    metrics = json.loads((folder / "metrics.json").read_text())
    if damage == "weights":
        (folder / "checkpoints" / "downstream.safetensors").write_bytes(b"nonsense")
    elif damage == "metrics":
        (folder / "metrics.json").write_text("{")
    elif damage == "unfinished":
        (folder / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}))
    else:
        del metrics["test"]
        (folder / "metrics.json").write_text(json.dumps(metrics))
    code, _, err = run(capsys, "evaluate", str(folder))
    assert code == 2 and str(folder) in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, code, told", [(["--help"], 0, "train"), (["train", "--data", "nope"], 2, "'nope'")]
)
def test_help_and_a_wrong_name_of_data_do_not_wait_for_torch(arguments, code, told):
    script = f"import sys; from ffcl_fast.cli import main; code = main({arguments}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script + "; sys.exit(code)"], capture_output=True, text=True)
    assert done.returncode == code and told in done.stdout + done.stderr, done


def test_a_package_that_is_not_there_is_named_with_the_extra_that_has_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and len(err.splitlines()) == 1 and "yaml is not installed" in err and "[train]" in err


def test_a_restart_by_torchrun_takes_no_run_of_other_settings(trained, capsys, monkeypatch):
    """The folder of that name may be an older run's, which a first start refuses."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    here = ["--out", str(trained.parent), "--name", trained.name]
    code, out, err = run(capsys, "train", *SMALL, *here, "--local-loss", "clip")
    assert code == 2 and "local_loss" in err and "finished" not in out
    code, _, err = run(capsys, "train", "--data", "digits", *here)  # settings that are left at their defaults count
    assert code == 2 and "keeps its own" in err
    assert run(capsys, "train", *SMALL, *here)[:2] == (0, f"{trained} is finished already\n")


def test_the_version_is_told(capsys):
    assert run(capsys, "--version")[:2] == (0, "ffcl 0.1.0\n")
    assert run(capsys)[0] == 2
    assert "--epochs-local" in run(capsys, "train", "--help")[1]


@pytest.mark.long
def test_ctrl_c_ends_with_a_line_and_130(tmp_path):
    # many epochs, so that it is certainly still running when the signal comes
    command = [sys.executable, "-m", "ffcl_fast.train", *SMALL, "--epochs-local", "500", "--patience", "500",
               "--out", str(tmp_path), "--name", "r"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background job hands down a SIGINT that is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    first = next(line for line in process.stdout if line.startswith("local 1/"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, (first, err)
    assert f"--resume {tmp_path / 'r'}" in err and "Traceback" not in err
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["status"] == "running"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_is_one_line(monkeypatch, capsys, error):
    def full(flags):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "train", full)
    code, _, err = run(capsys, "train")
    assert code == 2 and "--batch-size" in err


def test_ctrl_c_before_a_run_exists(monkeypatch, capsys):
    def stopped(flags):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "train", stopped)
    assert run(capsys, "train")[::2] == (130, "\nffcl train: interrupted\n")


def test_doctor_checks_every_backend(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)
    wrong = [check for check in findings["checks"] if check["verdict"] == "WRONG"]
    assert code == 0 and not wrong
    from ffcl_fast import backends

    assert {check["backend"] for check in findings["checks"]} == set(backends.BACKENDS)
    assert findings["machine"]["torch"] and all(choice["reason"] for choice in findings["choices"])
    large = {f"{name} 65536x512" for name in ("similarity", "gradients")}  # told on a GPU, not checked
    chosen = {choice["operator"] for choice in findings["choices"]} - large
    assert {check["operator"] for check in findings["checks"]} == chosen
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "auto picks" in out and "pair_cosine" in out and "checks ok" in out


def test_doctor_reports_a_wrong_backend(capsys, monkeypatch):
    from ffcl_fast.backends import panels

    real = panels.goodness_forward
    monkeypatch.setattr(panels, "goodness_forward", lambda *a: (real(*a)[0] * 1.001, real(*a)[1]))
    code, out, _ = run(capsys, "doctor", "--json")
    wrong = {(c["operator"], c["backend"]) for c in json.loads(out)["checks"] if c["verdict"] == "WRONG"}
    assert code == 1 and wrong == {("goodness", "panels"), ("goodness_many", "panels")}


def test_doctor_goes_on_where_a_backend_raises(capsys, monkeypatch):
    from ffcl_fast.backends import panels

    def broken(*arguments):
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(panels, "goodness_forward", broken)
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "FAILED  OSError: libcuda.so.1: no such file" in out and "doctor --json" in out
    assert "pair_cosine          cpu   float32   panels " in out


@pytest.mark.parametrize("name", ("triton", "cpu"))
def test_doctor_goes_on_where_a_backend_does_not_load(capsys, monkeypatch, name):
    """Also where it is the one that "auto" would take."""
    from ffcl_fast import backends

    real = backends.load

    def load(asked):
        if asked == name:
            raise AttributeError("module 'triton' has no attribute 'jit'")
        return real(asked)

    monkeypatch.setattr(backends, "load", load)
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)
    failed = {(c["backend"], c["reason"]) for c in findings["checks"] if c["verdict"] == "FAILED"}
    told = "AttributeError: module 'triton' has no attribute 'jit'"
    assert code == 1 and failed == {(name, told)}
    assert {c["backend"] for c in findings["checks"] if c["verdict"] == "ok"} >= {"panels", "reference"}
    picks = {(c["backend"], c["reason"]) for c in findings["choices"] if c["device"] == "cpu"}
    assert picks == {("none", told)} if name == "cpu" else {backend for backend, _ in picks} == {"cpu"}


def test_doctor_takes_few_rows_under_triton_s_interpreter(monkeypatch):
    from ffcl_fast import doctor

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor._inputs("cpu", torch.float32)["q"].shape == (doctor._INTERPRETED_ROWS, doctor._WIDTH)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert doctor._inputs("cpu", torch.float32)["q"].shape == (doctor._ROWS, doctor._WIDTH)


def test_doctor_reports_other_bits(capsys, monkeypatch):
    from ffcl_fast.backends import panels

    real, calls = panels.siglip, iter(range(1000))
    monkeypatch.setattr(panels, "siglip", lambda *a: (real(*a)[0] * (1 + 1e-7 * next(calls)), *real(*a)[1:]))
    code, out, _ = run(capsys, "doctor", "--json")
    wrong = [c for c in json.loads(out)["checks"] if c["verdict"] == "WRONG"]
    assert code == 1 and {(c["operator"], c["backend"]) for c in wrong} == {("siglip", "panels")}
    assert wrong[0]["reason"] == "a second run gave other bits"


def test_doctor_s_json_is_json_where_an_error_is_not_a_number(capsys, monkeypatch):
    from ffcl_fast.backends import panels

    real = panels.siglip
    monkeypatch.setattr(panels, "siglip", lambda *a: (real(*a)[0] * float("nan"), *real(*a)[1:]))
    code, out, _ = run(capsys, "doctor", "--json")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    wrong = [c for c in json.loads(out, parse_constant=refuse)["checks"] if c["verdict"] == "WRONG"]
    assert code == 1 and {(c["operator"], c["backend"]) for c in wrong} == {("siglip", "panels")}
    assert wrong[0]["loss_error"] == "nan"


def test_doctor_reports_what_it_is_there_for(capsys, monkeypatch):
    """A device that cannot be used, a package that does not import and a stale installation are findings."""
    from ffcl_fast import doctor

    def broken(*arguments):
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(doctor, "_inputs", broken)
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.7+cu99")
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "FAILED  RuntimeError: CUDA error: no kernel image is available\n" in out
    assert "does not import: RuntimeError: CUDA error" in out and "installed as 0.0.7+cu99" in out
    assert "KMP_AFFINITY=compact" in out


def test_doctor_tells_what_stands_in_for_a_missing_module(monkeypatch):
    from ffcl_fast import doctor
    from ffcl_fast.backends import native

    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "problem", "the compiled part does not load: why")
    choice = doctor._choice("goodness_forward", torch.zeros(3, 4))
    assert choice["backend"] == "cpu" and choice["reason"].endswith("panels: the compiled part does not load: why")


def test_doctor_tells_the_choice_for_large_batches(monkeypatch):
    from ffcl_fast import doctor

    def auto(op, x, pairs):
        return backends.choose(op, "cuda", x.dtype, x.shape, (9, 0), pairs)

    monkeypatch.setattr(backends, "_auto", auto)
    told = doctor._large_choices({"device": "cpu", "dtype": "bfloat16"})
    assert [(row["operator"], row["backend"]) for row in told] == [
        ("similarity 65536x512", "cuda"),
        ("gradients 65536x512", "cuda"),
    ]
    assert all(len(row["operator"]) <= 20 and row["reason"].startswith("confirmed by") for row in told)

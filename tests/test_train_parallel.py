"""Two processes over gloo train as one does on the doubled batch, and torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from train_cases import TinyNet, tiny

from ffcl_fast.train import parallel, train
from ffcl_fast.train.run import report

# Every loss that looks beyond its own sample, and a layer of every kind; no dropout, whose masks cannot be the same.
CASES = {
    "pair_cosine": {"local_loss": "pair_cosine", "global_loss": "nt_xent"},
    "sup_con": {"local_loss": "sup_con", "global_loss": "info_nce", "downstream_loss": "weighted"},
    "sum_squares": {"local_loss": "mean_squares", "global_loss": "pair_cosine", "downstream_loss": "focal"},
}
# The rate is so small that rounding, which Adam's first steps turn into whole steps, stays small beside the tolerance.
COMMON = {"epoch_samples": 64, "epochs_local": 1, "epochs_global": 1, "epochs_downstream": 2, "lr": 1e-5,
          "checkpoint_steps": 1}  # fmt: skip


def run_one(out: str, case: str, batch: int) -> None:
    torch.set_num_threads(1)
    report.learning_curves = lambda *_: None
    torch.manual_seed(int(os.environ["FFCL_TEST_SEED"]))
    net = TinyNet()
    net.drop = torch.nn.Identity()
    config = tiny(Path(out), name=case, batch_size=batch, **COMMON, **CASES[case])
    train(config, backbone=net, log=lambda line: None)


def alone(_: int, out: str, case: str) -> None:
    """In a process of its own: one that changes its number of threads between convolutions can crash in oneDNN."""
    run_one(out, case, 32)


def one_of_two(rank: int, port: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "NODE_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    for case in CASES:
        run_one(out, case, 16)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, str(out)), nprocs=2)
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_on_the_doubled_batch(two, tmp_path, case):
    mp.spawn(alone, (str(tmp_path), case), nprocs=1)
    metrics = [json.loads((out / case / "metrics.json").read_text()) for out in (tmp_path, two)]
    for stage in metrics[0]["stages"]:
        one, both = (m["stages"][stage]["epochs"] for m in metrics)
        for a, b in zip(one, both, strict=True):
            assert a["train"] == pytest.approx(b["train"], rel=1e-3, abs=1e-4), stage
            assert a["val"]["loss"] == pytest.approx(b["val"]["loss"], rel=1e-3, abs=1e-4), stage
    for stage in ("local", "global", "downstream"):
        a, b = (load_file(out / case / "checkpoints" / f"{stage}.safetensors") for out in (tmp_path, two))
        for name, tensor in a.items():
            # every step moves a weight by up to lr; one that differs has been moved otherwise in a step at most
            torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_gradients_of_a_step_are_those_of_one_process(tmp_path):
    """Not only after Adam, which hides a gradient's scale."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seed = int(os.environ["FFCL_TEST_SEED"])
    mp.spawn(gradients_of_two, (port, str(tmp_path), seed), nprocs=2)
    for case in GRADIENTS:
        one = gradients(case, seed, slice(None))
        both = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        assert one.keys() == both.keys()
        for name, gradient in one.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                both[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
            )


GRADIENTS = (
    "pair_cosine",
    "info_nce",
    "nt_xent",
    "sup_con",
    "clip",
    "siglip",
    "mean_squares",
    "focal",
    "weighted",
    "weighted, three",
)


def gradients(case: str, seed: int, rows: slice) -> dict[str, torch.Tensor]:
    from ffcl_fast.train.data import Split
    from ffcl_fast.train.model import build
    from ffcl_fast.train.stages import DownstreamStage, LocalStage

    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = TinyNet()
    net.drop = torch.nn.Identity()
    first, second = torch.randint(0, 256, (2, 12, 1, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1])
    if case in ("focal", "weighted", "weighted, three"):
        classes = 3 if "three" in case else 2
        if classes == 3:
            labels[2] = labels[7] = 2
        config = tiny(Path("."), downstream_loss=case.partition(",")[0])
        network = build(config, 8, classes, backbone=net)
        stage = DownstreamStage(network, config, Split(first, labels))
        batch = [first[rows], labels[rows]]
    else:
        config = tiny(Path("."), local_loss=case)
        network = build(config, 8, 2, backbone=net)
        stage = LocalStage(network, config)
        batch = [first[rows], second[rows], (labels * 2 - 1 if case == "pair_cosine" else labels)[rows]]
    network.train()
    parallel.same_weights(network)
    with parallel.synchronized():
        stage.step(batch, train=True)
    parallel.average_gradients(network.parameters())
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def gradients_of_two(rank: int, port: int, out: str, seed: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for case in GRADIENTS:
        found = gradients(case, seed, slice(rank, None, 2))
        if rank == 0:
            torch.save(found, Path(out) / f"{case}.pt")
    torch.distributed.destroy_process_group()


def test_torchrun_starts_a_training_that_one_process_writes(tmp_path):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "ffcl_fast.train", "--data", "digits", "--backbone", "timm/test_resnet", "--image-size", "16",
               "--epoch-samples", "32", "--batch-size", "8", "--epochs-local", "1", "--stages", "local,downstream",
               "--epochs-downstream", "1", "--device", "cpu", "--out", str(tmp_path), "--name", "r"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["status"] == "finished"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]

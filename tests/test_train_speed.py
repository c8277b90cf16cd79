"""Precision, memory format and compiled blocks: what they change, and that the training stays the same."""

from __future__ import annotations

import pytest
import torch
from train_cases import TinyNet, tiny

from ffcl_fast.train import run as run_module
from ffcl_fast.train import train
from ffcl_fast.train.errors import UserError
from ffcl_fast.train.model import build
from ffcl_fast.train.weights import load_into


def losses(tmp_path, monkeypatch, name: str, **settings) -> tuple[list[float], torch.nn.Module]:
    monkeypatch.setattr(run_module.report, "learning_curves", lambda *_: None)
    torch.manual_seed(3)
    net = TinyNet()
    net.drop = torch.nn.Identity()
    config = tiny(tmp_path, name=name, seed=3, epochs_local=1, epochs_global=1, epochs_downstream=1, **settings)
    run = train(config, backbone=net, log=lambda line: None)
    return [r["train"]["loss"] for stage in run.metrics["stages"].values() for r in stage["epochs"]], net


def test_channels_last_gives_the_same_training(tmp_path, monkeypatch):
    plain, _ = losses(tmp_path, monkeypatch, "a")
    last, net = losses(tmp_path, monkeypatch, "b", memory_format="channels_last")
    assert net.stages[1].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == pytest.approx(plain, rel=1e-3)


def test_bf16_computes_in_it_and_keeps_float32_weights(tmp_path, monkeypatch):
    seen = set()
    real = torch.nn.functional.conv2d

    def conv2d(*args, **kwargs):
        out = real(*args, **kwargs)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, w, b: conv2d(
        x, w, b, self.stride, self.padding, self.dilation, self.groups))  # fmt: skip
    plain, _ = losses(tmp_path, monkeypatch, "a")
    assert seen == {torch.float32}
    seen.clear()
    half, net = losses(tmp_path, monkeypatch, "b", precision="bf16")
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert half == pytest.approx(plain, rel=0.1)


def test_blocks_are_compiled_one_by_one_and_numbers_stay(tmp_path, monkeypatch):
    plain, _ = losses(tmp_path, monkeypatch, "a")
    compiled = []

    def recorded(function):
        compiled.append(function.__self__)
        return function

    monkeypatch.setattr(torch, "compile", recorded)
    blocks, net = losses(tmp_path, monkeypatch, "b", compile="blocks")
    assert compiled == [net.stages[0], net.stages[1]] and blocks == plain


def test_another_librarys_names_are_matched_by_place(tmp_path, rng):
    config = tiny(tmp_path, backbone="timm/test_resnet")
    backbone = build(config, 32, 2).backbone
    own = backbone.state_dict()
    fresh = {f"other.{i}": torch.rand(v.shape, generator=rng).to(v.dtype) for i, v in enumerate(own.values())}
    stem = next(i for i, k in enumerate(own) if k == "conv1.0.weight")
    fresh[f"other.{stem}"] = torch.rand(own["conv1.0.weight"].shape[0], 3, 3, 3)  # for colour
    torch.save({**fresh, "head.weight": torch.rand(7, 5)}, tmp_path / "w.pth")
    line = load_into(backbone, tmp_path / "w.pth")
    told = f"{len(own) - 1} of the backbone's {len(own)} tensors found in it, as drawn: conv1.0.weight; not used of the"
    assert told in line and line.endswith(f"file: other.{stem}, head.weight")
    for i, (name, value) in enumerate(backbone.state_dict().items()):
        assert name == "conv1.0.weight" or torch.equal(value, fresh[f"other.{i}"])
    swapped = dict(zip(fresh, reversed(fresh.values()), strict=True))
    torch.save(swapped, tmp_path / "w.pth")
    with pytest.raises(UserError, match="only 0 of"):
        load_into(backbone, tmp_path / "w.pth")

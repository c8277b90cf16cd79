"""Backbones by name, their layers, weights from files, and the local stage's cuts."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from train_cases import TinyNet, tiny

from ffcl_fast import PairCosineLoss
from ffcl_fast.train.batches import scaled
from ffcl_fast.train.errors import UserError
from ffcl_fast.train.local import GOODNESS, BlockWalk, LeafWalk, walk
from ffcl_fast.train.model import block_names, build
from ffcl_fast.train.stages import LocalStage


def backbone_of(tmp_path, name: str, size: int = 32, **settings) -> nn.Module:
    return build(tiny(tmp_path, backbone=name, **settings), size, 2).backbone


def test_resnet18_is_the_same_from_torchvision_and_timm(tmp_path):
    for name in ("resnet18", "timm/resnet18"):
        network = build(tiny(tmp_path, backbone=name), 64, 10)
        assert network.features == 512 and network.outputs == 10
        assert network.backbone.conv1.weight.shape == (64, 1, 7, 7)
        assert block_names(network.backbone) == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert build(tiny(tmp_path), 64, 2).outputs == 1


@pytest.mark.parametrize(("stem", "size", "small"), [("auto", 16, True), ("auto", 28, False), ("own", 8, False)])
def test_the_small_stem_is_for_small_images(tmp_path, stem, size, small):
    backbone = backbone_of(tmp_path, "resnet18", size, stem=stem)
    assert backbone.conv1.stride == ((1, 1) if small else (2, 2))
    assert isinstance(backbone.maxpool, nn.Identity) == small


@pytest.mark.parametrize(
    "name", ["timm/test_efficientnet", "timm/test_convnext", "torchvision/mobilenet_v3_small", "timm/test_resnet"]
)
def test_the_local_stage_trains_every_parameter_of_other_backbones(tmp_path, name):
    config = tiny(tmp_path, backbone=name)
    network = build(config, 32, 3)
    stage = LocalStage(network, config)
    images = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8)
    scalars = stage.step([images[:4], images[4:], torch.tensor([1, -1, 1, -1])], train=True)
    assert all(torch.isfinite(value) for value in scalars.values())
    without = [name for name, p in network.backbone.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("settings", "size", "named"),
    [
        ({"backbone": "resnet19"}, 32, "resnet19"),
        ({"backbone": "hub/resnet18"}, 32, "hub/resnet18"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, 32, "vit_tiny"),  # fixed to its own image size
        ({"backbone": "timm/test_efficientnet", "stem": "small"}, 32, "stem small"),
        ({"backbone": "raft_small"}, 32, "raft_small"),  # torchvision has it, but it classifies nothing
    ],
)
def test_an_unfit_backbone_is_named(tmp_path, settings, size, named):
    with pytest.raises(UserError, match=named) as caught:
        build(tiny(tmp_path, **settings), size, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["batch_size", "epoch_samples"])
def test_single_images_that_batch_norm_cannot_train_on_are_told_first(tmp_path, setting):
    single = {"backbone": "timm/resnet10t", setting: 1}
    with pytest.raises(UserError, match=f"{setting} 1: timm/resnet10t cannot train .* use 2 or more"):
        build(tiny(tmp_path, **single), 16, 2)
    build(tiny(tmp_path, **single, stages="local,global"), 16, 2)  # pairs are two images
    torch.manual_seed(0)
    network = build(tiny(tmp_path, **single), 64, 2)  # 2 x 2 activations at the end
    drawn = torch.rand(1)
    torch.manual_seed(0)
    other = build(tiny(tmp_path, backbone="timm/resnet10t"), 64, 2)
    assert torch.equal(drawn, torch.rand(1))  # the check drew nothing and left no trace
    pairs = zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_a_module_of_the_callers_own_must_return_rows(tmp_path):
    with pytest.raises(UserError, match="expected \\(N, features\\)"):
        build(tiny(tmp_path), 8, 2, backbone=nn.Conv2d(1, 3, 3))
    with pytest.raises(UserError, match="no residual"):
        block_names(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="nowhere"):
        block_names(TinyNet(), ["stages.0", "nowhere"])


# -------------------------------------------------------------------------------------------------------- weight files


def test_weights_come_from_safetensors_and_from_plain_pytorch_files(tmp_path):
    source = backbone_of(tmp_path, "timm/test_resnet")
    state = source.state_dict()
    save_file({f"backbone.{k}": v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    colour = {
        **state,
        "conv1.0.weight": torch.rand(state["conv1.0.weight"].shape[0], 3, 3, 3),
        "fc.weight": torch.ones(9),
    }
    torch.save({"state_dict": {f"module.{k}": v for k, v in colour.items()}}, tmp_path / "w.pth")
    exact = backbone_of(tmp_path, "timm/test_resnet", init=str(tmp_path / "w.safetensors")).state_dict()
    assert all(torch.equal(exact[k], v) for k, v in state.items())
    grey = backbone_of(tmp_path, "timm/test_resnet", init=str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(grey[k], v) for k, v in state.items() if k != "conv1.0.weight")


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/ffcl_was_unpickled", "w"))


@pytest.mark.parametrize("damage", ["missing", "pickle", "text", "truncated", "other network", "no tensors"])
def test_a_wrong_weight_file_is_named_and_never_unpickled(tmp_path, damage):
    path = tmp_path / ("w.safetensors" if damage == "truncated" else "w.pth")
    if damage == "pickle":
        torch.save({"conv1.weight": Evil()}, path)
    elif damage == "text":
        path.write_text("weights")
    elif damage == "truncated":
        save_file({"conv1.weight": torch.rand(100)}, path)
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "other network":
        torch.save({"encoder.weight": torch.rand(3)}, path)
    elif damage == "no tensors":
        torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="init .*w\\.") as caught:
        build(tiny(tmp_path, backbone="timm/test_resnet", init=str(path)), 32, 2)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        open("/tmp/ffcl_was_unpickled")


# --------------------------------------------------------------------------------------------------------- local stage


def pair_batch(rng, count: int = 6) -> list[torch.Tensor]:
    images = torch.randint(0, 256, (2, count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return [images[0], images[1], torch.randint(0, 2, (count,), generator=rng) * 2 - 1]


def test_block_gradients_equal_those_of_each_block_trained_alone(tmp_path, rng):
    net = TinyNet().eval()  # eval: dropout off, the same BatchNorm in both ways
    config = tiny(tmp_path)
    batch = pair_batch(rng)
    stage = LocalStage(build(config, 8, 2, backbone=net), config)
    net.eval()
    scalars = stage.step(batch, train=True)
    got = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    x = scaled(torch.cat(batch[:2]))
    losses = {}
    for name, layer in (
        ("stem", lambda x: torch.relu(net.stem(x))),
        ("stages.0", net.stages[0]),
        ("stages.1", net.stages[1]),
    ):
        x = layer(x.detach())
        a, b = x.flatten(1).chunk(2)
        losses[name] = nn.CosineEmbeddingLoss()(a, b, batch[2])
        losses[name].backward()
    for name, p in net.named_parameters():
        # A sum over pixels that cancels is as good as its terms: judged beside the tensor's largest element.
        atol = 1e-5 * float(p.grad.abs().max())
        torch.testing.assert_close(
            got[name], p.grad, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert list(scalars) == ["loss", *losses]
    for name, loss in losses.items():
        assert scalars[name] == pytest.approx(loss.item(), abs=1e-6)
    assert scalars["loss"] == pytest.approx(sum(v.item() for v in losses.values()) / 3, abs=1e-6)


def test_one_layers_graph_is_alive_at_a_time():
    net, kept = TinyNet(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held = tensor.clone()  # what autograd keeps for the backward pass, under a name of this test's own
        kept[id(held)] = weakref.ref(held)
        return held

    def visit(name: str, activation: torch.Tensor) -> None:
        assert sum(ref() is not None for ref in kept.values()) > 0  # this layer's own graph
        (activation**2).mean().backward()
        gc.collect()
        assert sum(ref() is not None for ref in kept.values()) == 0

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
        BlockWalk(net, block_names(net))(torch.rand(4, 1, 8, 8), visit)
    assert kept


def test_hooks_are_gone_after_a_pass_even_a_failed_one():
    net = TinyNet()
    walker = BlockWalk(net, block_names(net))

    def fail(name, activation):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        walker(torch.rand(2, 1, 8, 8), fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net(torch.rand(2, 1, 8, 8)).requires_grad


def test_layers_may_be_named_by_the_caller():
    names = []
    net = TinyNet()
    walk(net, "blocks", ["stem", "stages.1"])(torch.rand(2, 1, 8, 8), lambda name, h: names.append(name))
    assert names == ["stem", "stages.1"]


def test_the_leaf_walk_leaves_skip_connections_out(tmp_path):
    visited = {}
    backbone = backbone_of(tmp_path, "resnet18", 16)
    walker = walk(backbone, "leaves")
    assert isinstance(walker, LeafWalk)
    walker(torch.rand(2, 1, 16, 16), lambda name, h: visited.update({name: h.detach()}))
    assert list(visited)[:4] == ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"]
    assert len(visited) == 34 and not any("downsample" in name for name in visited)  # 17 convolutions, 17 BatchNorms
    assert all(h.min() >= 0 for name, h in visited.items() if "conv" in name)  # ReLU before the loss
    assert any(h.min() < 0 for name, h in visited.items() if "bn" in name)


def test_leaves_that_do_not_follow_on_each_other_are_named(tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    with pytest.raises(UserError, match="right .*use blocks"):
        walk(Fork(), "leaves")(torch.rand(2, 4), lambda name, h: None)


def test_the_local_loss_is_the_packages_own(tmp_path):
    config = tiny(tmp_path, margin=0.25)
    assert isinstance(LocalStage(build(config, 8, 2, backbone=TinyNet()), config).objective.loss, PairCosineLoss)


def test_the_gradient_made_in_one_visit_is_that_of_the_loss(tmp_path, rng):
    """Leaves with ReLU and BatchNorms, and blocks: with the objective's gradient and without it."""
    for layers in ("leaves", "blocks"):
        config = tiny(tmp_path, backbone="resnet18", local_layers=layers, margin=0.1)
        network = build(config, 8, 2).eval()  # eval: the same BatchNorm in both ways
        batch = pair_batch(rng)
        found = []
        for gradient in (True, False):
            stage = LocalStage(network, config)
            assert stage.objective.gradient is not None
            if not gradient:
                stage.objective = dataclasses.replace(stage.objective, gradient=None)
            network.zero_grad()
            scalars = stage.step(batch, train=True)
            found.append((scalars, {n: p.grad for n, p in network.named_parameters() if p.grad is not None}))
        (ours, grads), (plain, expected) = found
        assert ours.keys() == plain.keys() and grads.keys() == expected.keys() and grads
        for name, loss in ours.items():
            assert float(loss) == pytest.approx(float(plain[name]), abs=1e-6)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
        with torch.no_grad():
            quiet = stage.step(batch, train=False)
        expected = {name: float(loss) for name, loss in plain.items()}
        losses = {name: float(loss) for name, loss in quiet.items() if not name.startswith(GOODNESS)}
        assert losses == pytest.approx(expected, abs=1e-6)
        assert len(quiet) - len(losses) == len(losses) - 1  # each layer's goodness, recorded in validation


class Staged(nn.Module):
    """A network of the caller's own with named stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.last(x.mean((2, 3)))


class Two(nn.Module):
    def forward(self, x):
        return x, x


def test_frozen_stages_of_a_network_of_ones_own_stay_as_they_are(tmp_path, rng):
    net = Staged()
    net.second.requires_grad_(False)
    config = tiny(tmp_path)
    stage = LocalStage(build(config, 8, 2, backbone=net), config, ["first", "second", "last"])
    scalars = stage.step(pair_batch(rng), train=True)
    assert list(scalars) == ["loss", "first", "second", "last"]
    learning = {name for name, p in net.named_parameters() if p.grad is not None}
    assert learning == {"first.weight", "first.bias", "last.weight", "last.bias"}


@pytest.mark.parametrize("layers", ("blocks", "leaves"))
def test_a_layer_that_returns_a_tuple_is_named(tmp_path, rng, layers):
    net = Staged()
    net.second = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3), Two()))
    with pytest.raises(UserError, match="second.0.* returns a tuple"):
        walk(net, layers, ["first", "second.0"])(torch.rand(2, 1, 8, 8), lambda name, h: None)
    with pytest.raises(UserError, match="expected one .* tensor from it, got a tuple"):
        build(tiny(tmp_path), 8, 2, backbone=Two())

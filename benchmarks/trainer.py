"""One training step of FFCL's local stage on ResNet-18: ours, plain PyTorch's, and end-to-end back-propagation.

python -m benchmarks.trainer                 measure, store in results/trainer/, print the tables
python -m benchmarks.trainer --report        print the tables of the stored measurements
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ffcl_fast.train.batches import scaled
from ffcl_fast.train.config import Config
from ffcl_fast.train.local import LeafWalk
from ffcl_fast.train.model import Classifier, block_names, build
from ffcl_fast.train.stages import GlobalStage, LocalStage

from . import machine, store, trainer_tables
from .apart import call_apart
from .measure import peak_beyond

RESULTS = store.RESULTS / "trainer"
BATCH, PIXELS = 64, 64

Batch = Sequence[Tensor]
Step = Callable[[Batch], dict[str, float]]


def _network(pixels: int, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build(Config(backbone="torchvision/resnet18", stem="own"), pixels, 2)


def _plain(network: Classifier, modules: list[tuple[str, nn.Module]]) -> Step:
    """The usual way to write it: module after module, each with a loss, a backward pass, a step and a detach."""
    optimizers = {
        name: Adam(module.parameters(), lr=1e-4, weight_decay=1e-5)
        for name, module in modules
        if any(True for _ in module.parameters())
    }

    def step(batch: Batch) -> dict[str, float]:
        first, second, target = batch
        losses = {}
        x = torch.cat([scaled(first), scaled(second)])
        for name, module in modules:
            h = module(x.detach())
            if name in optimizers:
                activation = F.relu(h) if isinstance(module, nn.Conv2d) else h
                h1, h2 = activation.flatten(1).chunk(2)
                loss = F.cosine_embedding_loss(h1, h2, target)
                optimizers[name].zero_grad()
                loss.backward()
                optimizers[name].step()
                losses[name] = loss.item()
            x = h.flatten(1) if isinstance(module, nn.AdaptiveAvgPool2d) else h
        return losses

    return step


def _ours(network: Classifier, stage: LocalStage | GlobalStage, last: bool = False) -> Step:
    if last:
        network.to(memory_format=torch.channels_last)
    optimizer = Adam(network.backbone.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)

    def step(batch: Batch) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        scalars = stage.step(batch, train=True)
        optimizer.step()
        losses = {name: float(value) for name, value in scalars.items()}
        return losses if len(losses) == 1 else {k: v for k, v in losses.items() if k != "loss"}

    return step


def _plain_leaves(pixels: int) -> Step:
    network = _network(pixels).train()
    return _plain(network, LeafWalk(network.backbone).leaves)


class _Stem(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _plain_blocks(pixels: int) -> Step:
    network = _network(pixels).train()
    backbone = network.backbone
    blocks = [(name, backbone.get_submodule(name)) for name in block_names(backbone)]
    return _plain(network, [("stem", _Stem(backbone)), *blocks])


def _local(layers: str, last: bool = False) -> Callable[[int], Step]:
    def make(pixels: int) -> Step:
        network = _network(pixels).train()
        return _ours(network, LocalStage(network, Config(local_layers=layers)), last)

    return make


def _end_to_end(pixels: int) -> Step:
    network = _network(pixels).train()
    return _ours(network, GlobalStage(network, Config()))


def _convolutions(last: bool) -> Callable[[int], Step]:
    """The leaf modules' convolutions and their weights' gradients on random data, nothing else: what bounds a step."""

    def make(pixels: int) -> Step:
        network = _network(pixels)
        calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

        def step(batch: Batch) -> dict[str, float]:
            if not calls:
                _record(network, batch, calls, last)
            for conv, x, gradient in calls:
                conv(x)
                torch.ops.aten.convolution_backward(
                    gradient, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
                    conv.groups, [False, True, False],
                )  # fmt: skip
            return {}

        return torch.no_grad()(step)

    return make


def _record(network: Classifier, batch: Batch, calls: list[tuple[nn.Conv2d, Tensor, Tensor]], last: bool) -> None:
    """Fill ``calls`` with the leaf walk's convolutions on data of the shapes that this batch has there."""
    form = torch.channels_last if last else torch.contiguous_format
    network.to(memory_format=form)
    x = torch.cat([scaled(batch[0]), scaled(batch[1])])
    for _, module in LeafWalk(network.backbone).leaves:
        y = module(x)
        if isinstance(module, nn.Conv2d):
            calls.append((module, x.clone(memory_format=form), torch.randn_like(y, memory_format=form)))
        x = y.flatten(1) if isinstance(module, nn.AdaptiveAvgPool2d) else y


# name -> (how it is made, what it is compared with)
STEPS: dict[str, tuple[Callable[[int], Step], str]] = {
    "plain PyTorch, leaf modules": (_plain_leaves, ""),
    "ours, leaf modules": (_local("leaves"), "plain PyTorch, leaf modules"),
    "ours, leaf modules, channels last": (_local("leaves", True), "plain PyTorch, leaf modules"),
    "plain PyTorch, blocks": (_plain_blocks, ""),
    "ours, blocks": (_local("blocks"), "plain PyTorch, blocks"),
    "ours, blocks, channels last": (_local("blocks", True), "plain PyTorch, blocks"),
    "end-to-end back-propagation": (_end_to_end, ""),
    "the convolutions alone, leaf modules": (_convolutions(False), ""),
    "the convolutions alone, leaf modules, channels last": (_convolutions(True), ""),
}
TRAINING = [name for name in STEPS if "alone" not in name]


def batch(pairs: int, pixels: int) -> Batch:
    """Random images in two classes of pair: what a step costs does not depend on what they show."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, pairs, 1, pixels, pixels), generator=rng, dtype=torch.uint8)
    return images[0], images[1], torch.randint(0, 2, (pairs,), generator=rng) * 2 - 1


def measure(seconds: float, pairs: int = BATCH, pixels: int = PIXELS, rounds: int = 3) -> dict[str, dict[str, Any]]:
    """Every step in turn, round by round. Ratios are medians over rounds of the compared step's time over this one's;
    ``loss_difference``: the largest difference of a layer's loss over the first three steps."""
    data = batch(pairs, pixels)
    steps = {name: make(pixels) for name, (make, _) in STEPS.items()}
    losses: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    end = time.perf_counter() + seconds
    while len(times["ours, blocks"]) < rounds or time.perf_counter() < end:
        for name, step in steps.items():
            began = time.perf_counter()
            values = step(data)
            elapsed = time.perf_counter() - began
            losses[name].append(values)
            if len(losses[name]) > 1:  # the first one also makes the optimisers' state
                times[name].append(elapsed)
    found = {}
    for name, (_, other) in STEPS.items():
        median = statistics.median(times[name])
        record: dict[str, Any] = {
            "rounds": len(times[name]),
            "seconds": median,
            "images_per_second": 2 * pairs / median,
        }
        if other:
            ratios = [b / a for a, b in zip(times[name], times[other], strict=True)]
            record["over"], record["speedup"] = other, statistics.median(ratios)
            record["speedup_quartiles"] = statistics.quantiles(ratios, n=4, method="inclusive")[::2]
            pairs_of_losses = list(zip(losses[name], losses[other], strict=True))[:3]
            record["loss_difference"] = max(abs(a[k] - b[k]) for a, b in pairs_of_losses for k in a.keys() & b.keys())
            record["layers"] = len(losses[name][0].keys() & losses[other][0].keys())
        found[name] = record
    return found


def memory_here(name: str, pairs: int = BATCH, pixels: int = PIXELS) -> dict[str, Any]:
    """Resident bytes at their peak during a step, beyond weights, gradients and optimiser state."""
    step = STEPS[name][0](pixels)
    data = batch(pairs, pixels)
    step(batch(2, pixels))  # gradients and Adam's state exist from here on
    gc.collect()
    peak, _ = peak_beyond(lambda: step(data))
    return {"peak_bytes": peak}


def memory_apart(name: str) -> dict[str, Any]:
    found = call_apart(memory_here, name)
    if "problem" in found:
        raise RuntimeError(f"{name}: {found['problem']}")
    return found


def merge(folder: Path, found: dict[str, dict[str, Any]], part: str) -> Path:
    """Put measurements into this device's file, beside the other part's."""
    path = folder / f"{machine.device()['slug']}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored |= {"device": machine.device(), "batch": BATCH, "pixels": PIXELS, "backbone": "resnet18"}
    records = stored.setdefault("steps", {})
    for name, values in found.items():
        records.setdefault(name, {})[part] = store.stamp() | values
    store.write_text(path, json.dumps(stored, indent=1) + "\n")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to time all (default: 60)")
    parser.add_argument("--only", choices=("time", "memory"), help="measure one of the two")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(arguments)
    if not options.report:
        if options.only != "memory":
            merge(RESULTS, measure(options.seconds), "time")
        if options.only != "time":
            merge(RESULTS, {name: memory_apart(name) for name in TRAINING}, "memory")
    for path in sorted(RESULTS.glob("*.json")):
        print(trainer_tables.tables(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()

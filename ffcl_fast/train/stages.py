"""The three stages as objects with one method each, and the loop that runs any of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from ffcl_fast.functional import goodness, goodness_normalize

from . import parallel
from .batches import EpochSampler, Views, augmentation, derive_seed, loader, scaled
from .checkpoint import Checkpoints, Damaged, Progress
from .config import Config
from .data import Data, Split
from .errors import UserError, first_line
from .local import GOODNESS, walk
from .model import Classifier
from .objectives import objective

EVALUATION_BATCH = 64  # at least: without gradients there is room for more than a training batch
TRACE_POINTS = 8  # training losses kept an epoch, for the learning curve


class Stage(Protocol):
    """``step`` takes a batch on the device and returns named scalars, ``loss`` among them, averaged over its samples;
    with ``train`` it also leaves gradients in the parameters."""

    name: str
    items: str  # the kind of Views that its batches come from
    phases: int  # parts of the stage with a schedule of their own, each of the configured epochs

    def begin(self, phase: int) -> None: ...

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def step(self, batch: Sequence[Tensor], train: bool) -> dict[str, Tensor]: ...


class LocalStage:
    """A loss on the activation of each layer, every layer from detached input.

    Both images of a pair share one pass, so BatchNorm sees the statistics of both. Greedy: a phase trains one layer,
    those before it only pass data on and those after it do not run.
    """

    name = "local"

    def __init__(self, network: Classifier, config: Config, layers: Sequence[str] | None = None) -> None:
        self.network = network
        self.walk = walk(network.backbone, config.local_layers, layers)
        self.objective = objective(config.local_loss, config)
        self.items = self.objective.items
        self.greedy = config.local_schedule == "greedy"
        self.phases = len(self.walk.layers) if self.greedy else 1
        self.active: str | None = None

    def begin(self, phase: int) -> None:
        self.active = self.walk.layers[phase] if self.greedy else None

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.backbone.parameters()

    def step(self, batch: Sequence[Tensor], train: bool) -> dict[str, Tensor]:
        first, second, third = batch
        losses: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}  # in validation, whatever the loss: how each layer's goodness develops
        raw = self.objective.gradient is not None

        def visit(name: str, activation: Tensor) -> Tensor | None:
            if self.active in (None, name):
                relu = raw and name in self.walk.before_relu
                losses[name] = self._learn(activation, third, train, relu)
                if not train:
                    squares[f"{GOODNESS}{name}"] = goodness(activation, "mean_squares", relu=relu).mean()
            if name == self.active:
                raise _LastLayer
            return goodness_normalize(activation.detach()) if self.objective.normalize else None

        with contextlib.suppress(_LastLayer):
            self.walk(torch.cat([scaled(first), scaled(second)]), visit, raw)
        return {"loss": torch.stack(list(losses.values())).mean(), **losses, **squares}

    def _learn(self, activation: Tensor, third: Tensor, train: bool, relu: bool) -> Tensor:
        """The loss of a layer, back-propagated in training where any of the layer's parameters learns."""
        train = train and activation.requires_grad
        if train and self.objective.gradient is not None:
            loss, gradient = self.objective.gradient(activation, third, relu)
            activation.backward(gradient)
            return loss
        h1, h2 = (F.relu(activation) if relu else activation).chunk(2)
        loss = self.objective.loss(h1, h2, third)
        if train:
            loss.backward()
        return loss.detach()


class _LastLayer(Exception):
    """Leaves a forward pass where the rest of it is not needed."""


class GlobalStage:
    """A loss on the backbone's output, back-propagated through all of it."""

    name = "global"
    phases = 1

    def __init__(self, network: Classifier, config: Config) -> None:
        self.network = network
        self.objective = objective(config.global_loss, config)
        self.items = self.objective.items

    def begin(self, phase: int) -> None:
        pass

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.backbone.parameters()

    def step(self, batch: Sequence[Tensor], train: bool) -> dict[str, Tensor]:
        first, second, third = batch
        z1, z2 = self.network.backbone(torch.cat([scaled(first), scaled(second)])).chunk(2)
        loss = self.objective.loss(z1, z2, third)
        if train:
            loss.backward()
        return {"loss": loss.detach()}


class DownstreamStage:
    """Classification with a new head, everything fine-tuned or, where ``frozen``, the head alone on the backbone's
    output in evaluation mode.

    Two classes: one logit and binary cross-entropy. More: one logit a class and cross-entropy, since FFCL's single
    logit cannot tell them apart. ``focal`` is FFCL's form, alpha (1 - exp(-L))^gamma L of the batch's mean L.
    """

    name = "downstream"
    items = "images"
    phases = 1

    def __init__(self, network: Classifier, config: Config, train: Split) -> None:
        self.network = network
        self.binary = network.outputs == 1
        self.frozen = config.downstream == "frozen"
        kind = config.downstream_loss
        self.kind = ("focal" if self.binary else "plain") if kind == "auto" else kind
        self.alpha, self.gamma = config.focal_alpha, config.focal_gamma
        counts = torch.bincount(train.labels, minlength=2).float()
        # inverse frequency: both classes weigh the same in sum
        weights = counts[0] / counts[1] if self.binary else counts.sum() / (len(counts) * counts)
        self.weights = weights.to(network.head.weight.device) if self.kind == "weighted" else None

    def begin(self, phase: int) -> None:
        pass

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.head.parameters() if self.frozen else self.network.parameters()

    def step(self, batch: Sequence[Tensor], train: bool) -> dict[str, Tensor]:
        images, labels = batch
        logits = self._logits(scaled(images)).float()
        if self.binary:
            logits = logits.squeeze(1)
            loss = F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=self.weights)
            right = (logits > 0) == (labels == 1)
        elif self.weights is None:
            loss = F.cross_entropy(logits, labels)
            right = logits.argmax(1) == labels
        else:  # a mean by weight, whose denominator is that of all processes
            total = F.cross_entropy(logits, labels, weight=self.weights, reduction="sum")
            loss = total / parallel.mean(self.weights[labels].sum())
            right = logits.argmax(1) == labels
        loss = parallel.mean(loss)  # focal is not linear in it
        if self.kind == "focal":
            loss = self.alpha * (1 - torch.exp(-loss)) ** self.gamma * loss
        if train:
            loss.backward()
        return {"loss": loss.detach(), "accuracy": right.float().mean()}

    def _logits(self, x: Tensor) -> Tensor:
        if not self.frozen:
            return self.network(x)
        self.network.backbone.eval()
        with torch.no_grad():
            features = self.network.backbone(x)
        return self.network.head(features)


@dataclass
class Trainer:
    """Runs stages on one data set. ``fabric``: this process's device, precision and place among others.

    ``on_epoch(progress, record)`` hears of every finished, stored epoch; ``bar(total, text)`` makes a tqdm-like bar
    of that many images."""

    config: Config
    data: Data
    network: Classifier
    fabric: Any
    checkpoints: Checkpoints
    on_epoch: Callable[[Progress, dict[str, Any]], None]
    bar: Callable[[int, str], Any]

    def fit(self, stage: Stage, progress: Progress) -> None:
        """Train from ``progress`` (epoch 0, step 0: from the start) to the end, then put the best epoch's weights back.

        A stage of several phases goes through all of them, each with its own cosine; its best epoch is the last one.
        """
        config, length = self.config, self.config.epochs(stage.name)
        parameters = [p for p in stage.parameters() if p.requires_grad]
        if not parameters:
            raise UserError(f"stage {stage.name}: nothing to train, requires_grad is off for every parameter")
        optimizer = Adam(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        schedule = CosineAnnealingWarmRestarts(optimizer, T_0=length)
        history = progress.history.setdefault(stage.name, [])
        state = {"optimizer": optimizer, "schedule": schedule}
        if progress.epoch or progress.step:
            stored = self.checkpoints.load(stage.name, progress.epoch, self.network, progress.step)
            try:
                _put_back(optimizer, schedule, stored)
            except Exception as error:  # whatever PyTorch says to a forged file
                where = self.checkpoints.directory / progress.folder
                raise UserError(f"checkpoint {where}: not the state of this training ({first_line(error)})") from None

        def save() -> None:
            if self.fabric.is_global_zero:
                self.checkpoints.save(progress, self.network, {name: part.state_dict() for name, part in state.items()})
            self.fabric.barrier()

        while progress.epoch < length * stage.phases:
            waited = progress.epoch - progress.best.get(stage.name, 0)
            if stage.phases == 1 and waited >= config.patience:
                break
            stage.begin(progress.epoch // length)
            record = {"epoch": progress.epoch + 1, "of": length * stage.phases, "lr": optimizer.param_groups[0]["lr"]}
            record |= self._train_epoch(stage, optimizer, progress, save)
            schedule.step()
            record["val"] = self._validate(stage, progress.epoch + 1)
            history.append(record)
            best = progress.best.get(stage.name)
            if stage.phases > 1 or best is None or record["val"]["loss"] < history[best - 1]["val"]["loss"]:
                progress.best[stage.name] = record["epoch"]
            progress.epoch, progress.step, progress.partial = record["epoch"], 0, {}
            save()
            self.on_epoch(progress, record)
        best = progress.best[stage.name]
        if best != progress.epoch:
            try:
                self.checkpoints.load(stage.name, best, self.network)
            except Damaged as error:
                self.checkpoints.log(f"{error}, the best of its stage; going on with epoch {progress.epoch}, the last")
                progress.best[stage.name] = progress.epoch

    def _train_epoch(
        self, stage: Stage, optimizer: Adam, progress: Progress, save: Callable[[], None]
    ) -> dict[str, Any]:
        """The epoch after ``progress.epoch`` from its step ``progress.step`` on; ``save`` stores ``progress``."""
        config, epoch = self.config, progress.epoch + 1
        seed = (config.seed, stage.name, epoch)
        kind = self._augment
        if stage.items == "views" and config.view_augment == "crops":
            kind = "crops"
        augment = augmentation(kind, self.data.image_size)
        views = self._views(self.data.train, augment, stage, derive_seed(*seed, "views"))
        world, rank = self.fabric.world_size, self.fabric.global_rank
        size = config.batch_size * world
        sampler = EpochSampler(len(views), size, config.epoch_samples, derive_seed(*seed, "order"))
        sampler.batches = parallel.share(sampler.batches)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps, began_at = len(sampler), progress.step
        every = max(1, math.ceil(steps / TRACE_POINTS))
        del sampler.batches[:began_at]
        self.network.train()
        each = world * (1 if stage.items == "images" else 2)  # images that a sample of this process stands for
        images = sum(map(len, sampler)) * each
        total, window = _Mean(progress.partial.get("total")), _Mean(progress.partial.get("window"))
        trace = list(progress.partial.get("trace", []))
        began = time.perf_counter()
        with self.bar(images, f"{stage.name} {epoch}/{config.epochs(stage.name) * stage.phases}") as bar:
            for index, batch in enumerate(self._batches(views, sampler), began_at):
                torch.manual_seed(derive_seed(*seed, "step", index) + rank)  # for dropout and the like
                optimizer.zero_grad(set_to_none=True)
                with self.fabric.autocast(), parallel.synchronized():
                    scalars = parallel.average_scalars(stage.step(batch, train=True))
                parallel.average_gradients(parameters)
                optimizer.step()
                size = len(batch[0])
                total.add(scalars, size)
                window.add({"loss": scalars["loss"]}, size)
                done = index + 1
                if done % every == 0 or done == steps:
                    trace.append(window.take()["loss"])
                    bar.set_postfix_str(f"loss {trace[-1]:.4f}", refresh=False)
                bar.update(size * each)
                if config.checkpoint_steps and done % config.checkpoint_steps == 0 and done < steps:
                    progress.step = done
                    progress.partial = {"total": total.state(), "window": window.state(), "trace": trace}
                    save()
        seconds = time.perf_counter() - began
        mean = self._finite(stage, epoch, total.take())
        return {"train": mean, "trace": trace, "seconds": seconds, "images_per_second": images / seconds}

    @torch.no_grad()
    def _validate(self, stage: Stage, epoch: int) -> dict[str, float]:
        # the same pairs after every epoch, so that epochs can be compared; without augmentation, but for views, which
        # would else be one image twice
        config, seed = self.config, derive_seed(self.config.seed, stage.name, "validation")
        kind = config.view_augment if config.view_augment == "crops" else self._augment
        augment = augmentation(kind, self.data.image_size) if stage.items == "views" else None
        views = self._views(self.data.val, augment, stage, seed)
        order = seed if config.validation_samples else None
        # a loss against the rest of the batch depends on how many that are: as many as in training, in every batch
        contrast = stage.items == "views"
        size = config.batch_size * self.fabric.world_size if contrast else max(config.batch_size, EVALUATION_BATCH)
        sampler = EpochSampler(len(views), size, config.validation_samples, order)
        if contrast and len(sampler.batches) > 1 and len(sampler.batches[-1]) < size:
            del sampler.batches[-1]
        self.network.eval()
        total = _Mean()
        for batch in self._batches(views, sampler):
            with self.fabric.autocast():
                total.add(stage.step(batch, train=False), len(batch[0]))
        return self._finite(stage, epoch, total.take())

    @property
    def _augment(self) -> str:
        return self.data.augment if self.config.augment == "auto" else self.config.augment

    def _views(self, split: Split, augment: Any, stage: Stage, seed: int) -> Views:
        return Views(split, augment, stage.items, seed, self.config.pairs == "balanced")

    def _batches(self, views: Views, sampler: EpochSampler) -> Iterable[list[Tensor]]:
        device = self.fabric.device
        cuda = device.type == "cuda"
        workers = self.config.workers
        if workers is None:  # images lie decoded in memory: on a CPU, workers would only take cores from the network
            workers = 8 if cuda else 0
        for batch in loader(views, sampler, workers, pin=cuda):
            yield [part.to(device, non_blocking=True) for part in batch]

    def _finite(self, stage: Stage, epoch: int, scalars: dict[str, float]) -> dict[str, float]:
        if not math.isfinite(scalars["loss"]):
            raise UserError(f"stage {stage.name}, epoch {epoch}: the loss is {scalars['loss']}; try a smaller --lr")
        return scalars


def _put_back(optimizer: Adam, schedule: CosineAnnealingWarmRestarts, stored: dict[str, Any]) -> None:
    """Load both; raises, as PyTorch does where it looks, for a state of another network or schedule."""
    other = set(stored["schedule"]) ^ set(schedule.state_dict())
    if other:
        raise ValueError(f"the schedule's {min(map(str, other))}")
    optimizer.load_state_dict(stored["optimizer"])
    schedule.load_state_dict(stored["schedule"])
    for parameter, state in optimizer.state.items():
        if any(state[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError(f"the optimizer's averages of a parameter {tuple(parameter.shape)}")


class _Mean:
    """Means of named scalars over samples, kept on the device until they are taken."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.sums: dict[str, Tensor | float] = dict(state["sums"]) if state else {}
        self.count: int = state["count"] if state else 0

    def state(self) -> dict[str, Any]:
        """Everything, as plain numbers that JSON keeps to the bit."""
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "count": self.count}

    def add(self, scalars: dict[str, Tensor], size: int) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value.double() * size
        self.count += size

    def take(self) -> dict[str, float]:
        """The means so far; starts afresh."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

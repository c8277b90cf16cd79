"""What a run leaves behind for people: metrics, TensorBoard events and pictures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .checkpoint import Progress, write_atomically, write_text
from .local import GOODNESS

# Okabe and Ito's palette: told apart with any kind of colour vision
_TRAIN, _VAL, _BEST, _TEST = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "text.parse_math": False,  # names of classes and data may hold dollar signs
}
_LEGEND = 20  # lines of a legend at most
_TITLES = {"local": "1 local: each layer by itself", "global": "2 global: final output", "downstream": "3 downstream"}


def yaml_text(values: dict[str, Any]) -> str:
    """``values`` as YAML in their own order."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def epoch_line(stage: str, record: dict[str, Any]) -> str:
    """One line on a finished epoch."""
    accuracy = f", accuracy {record['val']['accuracy']:.4f}" if "accuracy" in record["val"] else ""
    return (
        f"{stage} {record['epoch']}/{record['of']}: loss {record['train']['loss']:.4f},"
        f" validation {record['val']['loss']:.4f}{accuracy}, {record['images_per_second']:.0f} images/s"
    )


def write_metrics(path: Path, base: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write and return ``metrics.json``: ``base`` and every epoch of every stage."""
    stages = {
        name: {"best_epoch": progress.best.get(name), "epochs": epochs} for name, epochs in progress.history.items()
    }
    metrics = {**base, "stages": stages}
    write_text(path, json.dumps(metrics, indent=1))
    return metrics


class Board:
    """TensorBoard events of a run, in its own folder; steps are epochs counted over all stages."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.step = sum(len(epochs) for epochs in progress.history.values())
        # events of epochs that were not stored before a kill are dropped on display
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=self.step + 1)

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def epoch(self, stage: str, record: dict[str, Any]) -> None:
        self.step += 1
        for part in ("train", "val"):
            for name, value in record[part].items():
                self.writer.add_scalar(f"{stage}/{name}/{part}", value, self.step)
        self.writer.add_scalar(f"{stage}/images_per_second", record["images_per_second"], self.step)
        self.writer.add_scalar(f"{stage}/lr", record["lr"], self.step)
        self.writer.flush()

    def test(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"test/{name}", value, self.step)


def _draw(
    path: Path,
    size: tuple[float, float],
    columns: int,
    fill: Callable[[Any, Sequence[Any]], None],
    description: str | None = None,
) -> None:
    """A figure with a row of ``columns`` axes, filled by ``fill(figure, axes)`` and written atomically, ``description``
    in its metadata."""
    import matplotlib

    matplotlib.use("agg")  # no display needed, and no window left open
    import matplotlib.pyplot as plt

    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            fill(figure, axes[0])
            metadata = {"Description": description} if description else None
            write_atomically(path, lambda scratch: figure.savefig(scratch, metadata=metadata))
        finally:
            plt.close(figure)


def learning_curves(path: Path, metrics: dict[str, Any], progress: Progress) -> None:
    """Losses of every stage against its epochs and the downstream accuracy, test accuracy in the title."""
    stages = list(progress.history)
    columns = len(stages) + ("downstream" in stages)

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        for axis, stage in zip(axes, stages, strict=False):
            loss = "classification" if stage == "downstream" else metrics["config"][f"{stage}_loss"]
            if loss == "pair_cosine":
                level = blind_loss(metrics["data"]["images"]["train"], metrics["config"])
                axis.axhline(level, color="grey", ls=":", lw=1, label=f"blind to the class: {level:.2f}")
            _losses(axis, stage, progress.history[stage], progress.best[stage], loss.replace("_", " "))
        if "downstream" in stages:
            _accuracy(axes[-1], progress.history["downstream"], metrics["test"]["accuracy"])
        method = "No pretraining" if stages == ["downstream"] else "FFCL"
        title = f"{method} on {metrics['data']['name']}, {metrics['backbone']}, seed {metrics['config']['seed']}"
        if "test" in metrics:
            title += f": test accuracy {100 * metrics['test']['accuracy']:.1f} %, AUC {metrics['test']['auc']:.3f}"
        figure.suptitle(textwrap.fill(title, 36 * columns, break_on_hyphens=False), fontsize=12)

    _draw(path, (3.5 * columns, 3.4), columns, fill)


def blind_loss(counts: Sequence[int], config: dict[str, Any]) -> float:
    """The least pair cosine loss of a network that does not tell classes apart: every pair has the same cosine, 1 (each
    image is mapped to one point) or as far below as costs no pair of two classes anything. A stage that does not fall
    below has learned nothing of the classes."""
    equal = 0.5 if config["pairs"] == "balanced" else sum(n * n for n in counts) / sum(counts) ** 2
    margin = config["margin"]
    # many images cannot all point away from each other: their mean cosine is not below 0
    return min(equal * (1 - c) + (1 - equal) * max(0.0, c - margin) for c in (1.0, max(0.0, margin)))


def _losses(axis: Any, stage: str, history: list[dict[str, Any]], best: int, loss: str) -> None:
    import matplotlib
    from matplotlib.ticker import MaxNLocator, NullFormatter

    epochs = [record["epoch"] for record in history]
    layers = _layers(history)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, max(len(layers), 1)))
    for name, shade in zip(layers, shades, strict=False):
        known = [r for r in history if name in r["val"]]  # greedy: in the layer's own epochs
        curve = [r["val"][name] for r in known]
        axis.plot([r["epoch"] for r in known], curve, color=shade, lw=0.8, alpha=0.6, marker=".", ms=3)
    # the training loss is known several times an epoch, each value the mean since the last
    steps = [r["epoch"] - 1 + (i + 0.5) / len(r["trace"]) for r in history for i in range(len(r["trace"]))]
    axis.plot(steps, [value for r in history for value in r["trace"]], color=_TRAIN, lw=1.5, label="train")
    axis.plot(epochs, [r["val"]["loss"] for r in history], color=_VAL, lw=2, marker="o", ms=4, label="validation")
    axis.plot(best, history[best - 1]["val"]["loss"], "*", color=_BEST, mfc="none", ms=12, label=f"best: epoch {best}")
    if layers:
        axis.plot([], [], color=shades[0], lw=0.8, label=f"{layers[0]} ...")
        axis.plot([], [], color=shades[-1], lw=0.8, label=f"... {layers[-1]} (validation)")
    axis.set_title(_TITLES[stage])
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"{loss} loss")
    axis.set_xlim(left=0)
    low, high = axis.dataLim.y0, axis.dataLim.y1
    if 0 < 30 * low < high:  # the focal loss falls through decades
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # powers of ten would be written in mathematics, which is off
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(min(0.0, 1.08 * low), max(0.0, 1.08 * high))  # some objectives fall below 0
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend(fontsize=7)


def _accuracy(axis: Any, history: list[dict[str, Any]], test: float) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [record["epoch"] for record in history]
    for part, colour, label in (("train", _TRAIN, "train (augmented)"), ("val", _VAL, "validation")):
        axis.plot(epochs, [r[part]["accuracy"] for r in history], color=colour, lw=2, marker="o", ms=4, label=label)
    axis.axhline(test, color=_TEST, ls="--", lw=1.5, label=f"test, once at the end: {100 * test:.1f} %")
    axis.set_title("3 downstream: accuracy")
    axis.set_xlabel("epoch")
    axis.set_ylabel("accuracy")
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend(fontsize=7)


def error_bars(path: Path, rows: dict[str, Sequence[float]], description: str | None = None) -> None:
    """One line a row, top to bottom: its values as dots, their mean with one standard deviation to either side;
    ``description`` goes into the picture's metadata."""

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        axis = axes[0]
        for place, values in enumerate(rows.values()):
            shown = 100 * np.asarray(values, float)
            if not len(shown):
                continue
            if place == 0:
                axis.axvline(shown.mean(), color="grey", ls=":", lw=1)
            axis.plot(shown, np.full(len(shown), place), "o", color=_TRAIN, ms=4, alpha=0.35)
            spread = shown.std(ddof=1) if len(shown) > 1 else 0.0
            axis.errorbar(shown.mean(), place, xerr=spread, fmt="D", color=_TRAIN, ms=6, capsize=4, lw=1.5)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlabel("test accuracy, %: each seed, mean and standard deviation\n(dotted: mean of the first row)")

    _draw(path, (7.0, 1.2 + 0.36 * len(rows)), 1, fill, description)


def confusion_matrix(path: Path, probability: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Counts of true against predicted class, shaded by the share of the true class."""
    from torchmetrics import functional as metric

    count = metric.confusion_matrix(probability, labels, task="multiclass", num_classes=len(classes)).numpy()
    share = count / np.maximum(count.sum(1, keepdims=True), 1)
    names = [_shown(name) for name in classes]
    longest = max(map(len, names))

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        axis = axes[0]
        axis.grid(False)
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        if len(classes) <= 20:
            for (row, column), value in np.ndenumerate(count):
                ink = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, str(value), ha="center", va="center", color=ink)
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(classes)), names, **(slant if len(classes) > 4 or longest > 12 else {}))
        axis.set_yticks(range(len(classes)), names)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.set_title(f"{len(labels)} test images, accuracy {100 * np.trace(count) / len(labels):.1f} %")
        figure.colorbar(image, label="share of the true class", shrink=0.8)

    side = min(12.0, 3.2 + 0.35 * len(classes)) + 0.07 * max(0, longest - 9)
    _draw(path, (side + 1.0, side), 1, fill)


def _shades(classes: int) -> Sequence[Any]:
    """A colour a class, as different as so many can be."""
    import matplotlib

    if classes <= 2:
        return [_TRAIN, _VAL][:classes]
    maps = matplotlib.colormaps
    if classes <= 20:
        return list(maps["tab10" if classes <= 10 else "tab20"](range(classes)))
    return list(maps["turbo"](np.linspace(0.0, 1.0, classes)))


def _shown(name: str) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= 30 else name[:29] + "\u2026"


def roc(path: Path, probability: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """True against false positive rate: of class 1 for two classes, else of each class against the rest; where there
    are many, the legend names those told worst."""
    from torchmetrics import functional as metric

    several = len(classes) > 4
    drawn = [1] if len(classes) == 2 else list(range(len(classes)))
    target = {index: (labels == index).int() for index in drawn}
    area = {index: float(metric.auroc(probability[:, index], target[index], task="binary")) for index in drawn}
    named = set(sorted(drawn, key=area.__getitem__)[:_LEGEND])

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        axis = axes[0]
        for index, shade in zip(drawn, _shades(len(drawn)), strict=True):
            false, true, _ = metric.roc(probability[:, index], target[index], task="binary")
            label = f"{_shown(classes[index])}: AUC {area[index]:.3f}" if index in named else None
            axis.plot(false, true, color=shade, lw=1 if several else 2, label=label)
        axis.plot([0, 1], [0, 1], color="grey", ls=":", lw=1, label="chance")
        axis.set_xlabel("false positive rate")
        axis.set_ylabel("true positive rate")
        axis.set_title(f"ROC on {len(labels)} test images")
        axis.set_aspect("equal")
        axis.set_xlim(-0.01, 1.01)
        axis.set_ylim(-0.01, 1.01)
        if len(drawn) > len(named):
            axis.plot([], [], alpha=0, label=f"(the {len(named)} worst of {len(drawn)})")
        outside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        axis.legend(fontsize=7, **(outside if several else {"loc": "lower right"}))

    beside = 0.6 + 0.06 * (11 + max(len(_shown(name)) for name in classes))  # the legend
    _draw(path, (4.4 + (beside if several else 0.0), 4.2), 1, fill)


def _layers(history: Sequence[dict[str, Any]]) -> list[str]:
    """The layers that have a loss of their own, in order of depth."""
    seen = dict.fromkeys(name for record in history for name in record["val"])
    return [name for name in seen if name not in ("loss", "accuracy") and not name.startswith(GOODNESS)]


def layers_over_time(path: Path, epochs: Sequence[dict[str, Any]], loss: str) -> None:
    """Each layer's local loss against epochs, in training and validation, and its goodness (mean of squares) there."""
    layers = _layers(epochs)
    parts = {("train", ""): "training", ("val", ""): "validation"}
    if any(GOODNESS + name in r["val"] for r in epochs for name in layers):
        parts["val", GOODNESS] = "validation"
    loss_label = f"{loss.replace('_', ' ')} loss of a layer"

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        import matplotlib
        from matplotlib.ticker import MaxNLocator

        shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, max(len(layers), 1)))
        named = {round(place) for place in np.linspace(0, len(layers) - 1, min(len(layers), _LEGEND))}
        for axis, ((part, prefix), title) in zip(axes, parts.items(), strict=True):
            for place, (name, shade) in enumerate(zip(layers, shades, strict=False)):
                known = [r for r in epochs if prefix + name in r[part]]  # greedy: in the layer's own epochs
                curve = [r[part][prefix + name] for r in known]
                label = _shown(name) if place in named else None
                axis.plot([r["epoch"] for r in known], curve, color=shade, lw=1.5, marker="o", ms=3, label=label)
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.set_ylabel("goodness of a layer: mean of squares" if prefix else loss_label)
            axis.set_xlim(epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(layers) > len(named):
            axes[-1].plot([], [], alpha=0, label=f"({len(named)} of {len(layers)})")
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))

    _draw(path, (2.0 + 4.0 * len(parts), 3.8), len(parts), fill)


def embeddings(
    path: Path, features: dict[str, np.ndarray], labels: Tensor, classes: Sequence[str], seed: int = 0
) -> None:
    """A t-SNE of the same images' features (N, F) at each moment that ``features`` names, coloured by class."""
    from sklearn.manifold import TSNE

    def fill(figure: Any, axes: Sequence[Any]) -> None:
        dot = min(6.0, max(2.5, 40 / math.sqrt(len(labels))))
        for axis, (moment, rows) in zip(axes, features.items(), strict=True):
            perplexity = min(30.0, (len(rows) - 1) / 3)
            places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
            for index, (name, shade) in enumerate(zip(classes, _shades(len(classes)), strict=True)):
                chosen = (labels == index).numpy()
                label = _shown(name) if index < _LEGEND else None
                axis.plot(*places[chosen].T, "o", color=shade, ms=dot, alpha=0.6, mew=0, label=label)
            axis.set_title(moment)
            axis.set_xticks([])
            axis.set_yticks([])
        if len(classes) > _LEGEND:
            axes[-1].plot([], [], alpha=0, label=f"({_LEGEND} of {len(classes)})")
        axes[-1].legend(fontsize=7, markerscale=5 / dot, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(f"t-SNE of {len(labels)} test images' features", fontsize=11)

    _draw(path, (3.6 * len(features) + 0.5 + 0.06 * min(30, max(map(len, classes))), 3.9), len(features), fill)

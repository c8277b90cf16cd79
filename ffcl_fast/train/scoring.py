"""Test metrics of a network, and ``ffcl evaluate``: those of a finished run, with their pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import derive_seed, scaled
from .checkpoint import Checkpoints, load_weights, write_text
from .config import Config, load_config, shown
from .data import Data, Split, prepare
from .errors import UserError
from .model import Classifier, build
from .parallel import device_for
from .stages import EVALUATION_BATCH

METRICS = "metrics.json"
SCORES = ("accuracy", "macro_f1", "precision", "recall", "auc")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
EMBEDDED = 1000  # test images at most in the picture of embeddings: t-SNE takes seconds for so many


@torch.no_grad()
def features(network: Classifier, split: Split, batch_size: int) -> np.ndarray:
    """What the backbone gives: (N, F) float32, in the split's order."""
    device = network.head.weight.device
    network.eval()
    batches = split.images.split(max(batch_size, EVALUATION_BATCH))
    return torch.cat([network.backbone(scaled(images.to(device))).float().cpu() for images in batches]).numpy()


@torch.no_grad()
def probabilities(network: Classifier, split: Split, batch_size: int) -> Tensor:
    """Class probabilities (N, classes) in float32, on the CPU, in the split's order."""
    device = network.head.weight.device
    network.eval()
    rows = []
    for images in split.images.split(max(batch_size, EVALUATION_BATCH)):
        logits = network(scaled(images.to(device))).float()
        if network.outputs == 1:
            positive = torch.sigmoid(logits)
            rows.append(torch.cat([1 - positive, positive], 1).cpu())
        else:
            rows.append(torch.softmax(logits, 1).cpu())
    return torch.cat(rows)


def scores(probability: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1, precision, recall and AUC by torchmetrics.

    Two classes: precision, recall and AUC are class 1's. More: they are macro averages, AUC one against the rest.
    """
    from torchmetrics import functional as metric

    classes = probability.shape[1]
    several: dict[str, Any] = {"task": "multiclass", "num_classes": classes}
    if classes == 2:
        one: dict[str, Any] = {"task": "binary"}
        score = probability[:, 1]
    else:
        one = {**several, "average": "macro"}
        score = probability
    return {
        "accuracy": float(metric.accuracy(probability, labels, **several, average="micro")),
        "macro_f1": float(metric.f1_score(probability, labels, **several, average="macro")),
        "precision": float(metric.precision(score, labels, **one)),
        "recall": float(metric.recall(score, labels, **one)),
        "auc": float(metric.auroc(score, labels, **one)),
    }


_NUMBER = int | float
_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    _NUMBER: "a number",
}
_READ = {
    "own_backbone": bool,
    "backbone": str,
    "parameters": int,
    "seconds": _NUMBER,
    "data": dict,
    "versions": dict,
    "machine": dict,
    "stages": dict,
}


def _part(holder: dict[str, Any], name: str, kind: Any, where: str = "") -> Any:
    """``holder[name]``, which must be a ``kind``; ValueError that names it, after ``where``, and says what is wrong."""
    if name not in holder:
        raise ValueError(f"{where}{name} is missing")
    value = holder[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}{name}: expected {_KINDS[kind]}, got {shown(value)}")
    if kind == _NUMBER:
        float(value)  # OverflowError of a whole number that no float can hold
    return value


def _check(metrics: dict[str, Any]) -> None:
    """ValueError that says what a finished run's metrics lack of what is read from them."""
    for name, kind in _READ.items():
        _part(metrics, name, kind)
    _part(metrics["data"], "classes", list, "data.")
    for name in metrics["stages"]:
        where = f"stages.{name}."
        stage = _part(metrics["stages"], name, dict, "stages.")
        epochs = _part(stage, "epochs", list, where)
        best = _part(stage, "best_epoch", int, where)
        if not 1 <= best <= len(epochs):
            raise ValueError(f"{where}best_epoch: expected one of its {len(epochs)} epochs, got {shown(best)}")
        for number, record in enumerate(epochs, 1):
            inside = f"{where}epochs, number {number}: "
            if not isinstance(record, dict):
                raise ValueError(f"{inside}expected a mapping, got {shown(record)}")
            _part(record, "epoch", _NUMBER, inside)
            for part in ("train", "val"):
                for key in _part(record, part, dict, inside):
                    _part(record[part], key, _NUMBER, f"{inside}{part}.")
    if "downstream" in metrics["stages"]:
        test = _part(metrics, "test", dict)
        for name in SCORES:
            _part(test, name, _NUMBER, "test.")


def finished(directory: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run that classifies, with all that is read from it in its place. Raises UserError
    where there is no such run, it is not finished, or the file is damaged."""
    if not directory.is_dir():
        raise UserError(f"run {directory}: no such folder")
    try:
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
        if not isinstance(metrics, dict):
            raise ValueError(f"expected a mapping, got {shown(metrics)}")
        status = _part(metrics, "status", str)
        if status == "finished":
            _check(metrics)
    except FileNotFoundError:
        raise UserError(f"run {directory}: has no {METRICS}, so it is not a run of ffcl train") from None
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"run {directory}: {METRICS} is damaged ({error})") from None
    if status != "finished":
        raise UserError(f"run {directory}: not finished; go on with: ffcl train --resume {directory}")
    if "downstream" not in metrics["stages"]:
        raise UserError(f"run {directory}: has no downstream stage, so nothing that classifies")
    return metrics


def _untrained(config: Config, data: Data, backbone: nn.Module | None) -> Classifier | None:
    """The network as the run began with it, drawn again from its seed; None where the weights came from elsewhere and
    are not here any more, or the backbone from the caller."""
    if backbone is not None or not (config.init == "random" or Path(config.init).is_file()):
        return None
    torch.manual_seed(derive_seed(config.seed, "weights"))
    return build(config, data.image_size, len(data.classes))


def evaluate(
    run: str | Path,
    flags: dict[str, Any] | None = None,
    backbone: nn.Module | None = None,
    progress: Any = None,
    on_scores: Callable[[dict[str, float], int], None] = lambda scores, images: None,
) -> dict[str, Any]:
    """Test metrics of the finished run in folder ``run``; writes ``evaluation.json`` and pictures beside it: confusion
    matrix, ROC, each layer's loss over time, and the embeddings before training and after each stage.

    flags: settings of the data's place (data, data_dir, workers, device) that differ from the run's own.
    backbone: an untrained copy of the module that was given to ``train``, if one was.
    on_scores: called with the metrics and the number of test images once they are known: pictures take longer.
    Returns the metrics and the paths written. Raises UserError for anything wrong with the run or its data.
    """
    from . import report

    directory = Path(run)
    metrics = finished(directory)
    if metrics["own_backbone"] and backbone is None:
        raise UserError(f"run {directory}: its backbone was a module of the caller's; use ffcl_fast.train.evaluate")
    config = load_config(flags or {}, directory / CONFIG)
    device = device_for(config)
    data = prepare(config, progress)
    if list(data.classes) != metrics["data"]["classes"]:
        raise UserError(f"data {data.name}: classes {', '.join(data.classes)} are not those that the run learned")
    untrained = _untrained(config, data, backbone)
    network = build(config, data.image_size, len(data.classes), backbone, initialise=False)
    checkpoints = Checkpoints(directory / CHECKPOINTS, print)
    load_weights(checkpoints.stage_weights("downstream"), network)
    probability = probabilities(network.to(device), data.test, config.batch_size)
    result = scores(probability, data.test.labels)
    on_scores(result, len(data.test))
    write_text(directory / "evaluation.json", json.dumps({"data": data.summary(), "test": result}, indent=1))
    pictures = {
        "confusion": directory / "confusion_matrix.png",
        "roc": directory / "roc.png",
    }
    report.confusion_matrix(pictures["confusion"], probability, data.test.labels, data.classes)
    report.roc(pictures["roc"], probability, data.test.labels, data.classes)
    if "local" in metrics["stages"]:
        pictures["layers"] = directory / "layers.png"
        report.layers_over_time(pictures["layers"], metrics["stages"]["local"]["epochs"], config.local_loss)
    shown = data.test.take(np.linspace(0, len(data.test) - 1, min(len(data.test), EMBEDDED), dtype=np.int64))
    moments = {} if untrained is None else {"before training": features(untrained.to(device), shown, config.batch_size)}
    for stage in config.stages:
        load_weights(checkpoints.stage_weights(stage), network)
        moments[f"after {stage}"] = features(network, shown, config.batch_size)
    pictures["embeddings"] = directory / "embeddings.png"
    report.embeddings(pictures["embeddings"], moments, shown.labels, data.classes)
    return {"test": result, "images": len(data.test), "pictures": [str(path) for path in pictures.values()]}

"""Test metrics of a network, and ``ffcl evaluate``: those of a finished run, with their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import scaled
from .checkpoint import Checkpoints, load_weights, write_text
from .config import Config, load_config
from .data import Split, prepare
from .errors import UserError
from .model import Classifier, build
from .stages import EVALUATION_BATCH

METRICS = "metrics.json"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


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


def device_for(config: Config) -> torch.device:
    """The device that ``config.device`` names. Raises UserError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device that PyTorch can use")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def finished(directory: Path) -> dict[str, Any]:
    """``metrics.json`` of a finished run. Raises UserError where there is no such run or it is not finished."""
    if not directory.is_dir():
        raise UserError(f"run {directory}: no such folder")
    try:
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
        status = metrics["status"]
    except FileNotFoundError:
        raise UserError(f"run {directory}: has no {METRICS}, so it is not a run of ffcl train") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"run {directory}: {METRICS} is damaged ({error})") from None
    if status != "finished":
        raise UserError(f"run {directory}: not finished; go on with: ffcl train --resume {directory}")
    return metrics


def evaluate(
    run: str | Path, flags: dict[str, Any] | None = None, backbone: nn.Module | None = None, progress: Any = None
) -> dict[str, Any]:
    """Test metrics of the finished run in folder ``run``; writes ``evaluation.json`` and two pictures beside it.

    flags: settings of the data's place (data, data_dir, workers, device) that differ from the run's own.
    backbone: an untrained copy of the module that was given to ``train``, if one was.
    Returns the metrics and the paths written. Raises UserError for anything wrong with the run or its data.
    """
    from . import report

    directory = Path(run)
    metrics = finished(directory)
    if metrics["own_backbone"] and backbone is None:
        raise UserError(f"run {directory}: its backbone was a module of the caller's; use ffcl_fast.train.evaluate")
    if "test" not in metrics:
        raise UserError(f"run {directory}: has no downstream stage, so nothing that classifies")
    config = load_config(flags or {}, directory / CONFIG)
    device = device_for(config)
    data = prepare(config, progress)
    if list(data.classes) != metrics["data"]["classes"]:
        raise UserError(f"data {data.name}: classes {', '.join(data.classes)} are not those that the run learned")
    network = build(config, data.image_size, len(data.classes), backbone, initialise=False)
    load_weights(Checkpoints(directory / CHECKPOINTS, print).stage_weights("downstream"), network)
    probability = probabilities(network.to(device), data.test, config.batch_size)
    result = scores(probability, data.test.labels)
    pictures = {
        "confusion": directory / "confusion_matrix.png",
        "roc": directory / "roc.png",
    }
    report.confusion_matrix(pictures["confusion"], probability, data.test.labels, data.classes)
    report.roc(pictures["roc"], probability, data.test.labels, data.classes)
    write_text(directory / "evaluation.json", json.dumps({"data": data.summary(), "test": result}, indent=1))
    return {"test": result, "images": len(data.test), "pictures": [str(path) for path in pictures.values()]}

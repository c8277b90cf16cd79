"""The same small training with our losses and with the originals: the curves, and how far they are apart.

    python tests/convergence.py          all losses over three seeds, into docs/results/convergence.json

A curve is the loss of every step of an encoder of two layers on scikit-learn's digits; both trainings of a seed start
from the same weights and see the same batches. What seeds make of it is the noise that the difference is held against.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffcl_fast

STEPS, BATCH, SEEDS = 80, 64, (0, 1, 2)
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "convergence.json"
RATES = {"SigLIP": 0.01}  # a sum over pairs
PAGE = RESULTS.parent.parent / "trust.md"
MARKERS = "<!-- convergence: written by tests/convergence.py -->", "<!-- end of convergence -->"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the embeddings of two views and the labels


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def _views(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack((_unit(x), _unit(y)), 1)


def _target(labels: Tensor) -> Tensor:
    """Pairs of an image and the next one of the batch."""
    return torch.where(labels == labels.roll(1), 1.0, -1.0)


def _ours() -> dict[str, Loss]:
    info_nce, nt_xent, sup_con = ffcl_fast.InfoNCELoss(), ffcl_fast.NTXentLoss(), ffcl_fast.SupConLoss()
    clip, siglip, pair = ffcl_fast.ClipLoss(), ffcl_fast.SigLipLoss(), ffcl_fast.PairCosineLoss()
    goodness = ffcl_fast.GoodnessLoss(threshold=2.0, goodness="mean_squares")
    return {
        "InfoNCE": lambda x, y, t: info_nce(x, y),
        "NT-Xent": lambda x, y, t: nt_xent(x, y),
        "SupCon": lambda x, y, t: sup_con(_views(x, y), t),
        "CLIP": lambda x, y, t: clip(_unit(x), _unit(y), 10.0),
        "SigLIP": lambda x, y, t: siglip(_unit(x), _unit(y), 10.0, -10.0),
        "pair cosine": lambda x, y, t: pair(x, y.roll(1, 0), _target(t)),
        "goodness": lambda x, y, t: goodness(x, y.flip(1) * 0.5),
    }


def _originals() -> dict[str, Loss]:
    from info_nce import InfoNCE
    from lightly.loss import NTXentLoss
    from open_clip.loss import ClipLoss, SigLipLoss
    from pytorch_metric_learning.losses import SupConLoss

    info_nce, nt_xent, sup_con, clip, siglip = InfoNCE(), NTXentLoss(), SupConLoss(0.07), ClipLoss(), SigLipLoss()

    def goodness(x: Tensor, y: Tensor) -> Tensor:  # as published, in two lines
        p, n = x.square().mean(1), (y.flip(1) * 0.5).square().mean(1)
        return F.softplus(torch.cat((2.0 - p, n - 2.0))).mean()

    return {
        "InfoNCE": lambda x, y, t: info_nce(x, y),
        "NT-Xent": lambda x, y, t: nt_xent(x, y),
        "SupCon": lambda x, y, t: sup_con(_views(x, y).flatten(0, 1), t.repeat_interleave(2)),
        "CLIP": lambda x, y, t: clip(_unit(x), _unit(y), torch.tensor(10.0)),
        "SigLIP": lambda x, y, t: siglip(_unit(x), _unit(y), torch.tensor(10.0), torch.tensor(-10.0)),
        "pair cosine": lambda x, y, t: F.cosine_embedding_loss(x, y.roll(1, 0), _target(t)),
        "goodness": lambda x, y, t: goodness(x, y),
    }


LOSSES = tuple(_ours())


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.from_numpy(raw.data).float() / 16, torch.from_numpy(raw.target)


def curve(losses: dict[str, Loss], name: str, seed: int, steps: int = STEPS) -> list[float]:
    """The loss of every step."""
    loss = losses[name]
    images, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    optimizer = torch.optim.SGD(network.parameters(), lr=RATES.get(name, 0.1), momentum=0.9)
    found = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        batch = images[chosen]
        noisy = [batch + 0.2 * torch.randn(batch.shape, generator=generator) for _ in range(2)]
        x, y = network(torch.cat(noisy)).chunk(2)
        value = loss(x, y, labels[chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(value.detach()))
    return found


def compare(name: str, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> dict[str, object]:
    """Both curves, the root mean square of their difference, and of that between seeds, averaged over the steps."""
    ours = np.array([curve(_ours(), name, seed, steps) for seed in seeds])
    theirs = np.array([curve(_originals(), name, seed, steps) for seed in seeds])
    return {
        "loss": name,
        "seeds": list(seeds),
        "steps": steps,
        "apart": float(np.sqrt(np.mean((ours - theirs) ** 2))),
        "noise": float(np.sqrt(np.mean(np.var(theirs, axis=0, ddof=1)))) if len(seeds) > 1 else None,
        "first": float(theirs[:, 0].mean()),
        "last_ours": float(ours[:, -10:].mean()),
        "last_original": float(theirs[:, -10:].mean()),
    }


def table(results: list[dict]) -> str:
    rows = [
        "| loss | first step | last ten, ours | last ten, the original | apart | between seeds |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        numbers = (f"{r[key]:.4f}" for key in ("first", "last_ours", "last_original"))
        rows.append(f"| {r['loss']} | {' | '.join(numbers)} | {r['apart']:.1e} | {r['noise']:.1e} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    sys.path.insert(0, str(PAGE.parent.parent))
    from benchmarks.machine import source
    from ffcl_fast.train.checkpoint import write_text

    torch.set_num_threads(1)  # a step is too small to share
    results = [compare(name) for name in LOSSES]
    for r in results:
        print(f"{r['loss']:12} {r['first']:8.4f} -> {r['last_ours']:8.4f} ours, {r['last_original']:8.4f} original;"
              f" apart {r['apart']:.2e}, between seeds {r['noise']:.2e}")  # fmt: skip
    stored = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "commit": source()["commit"]}
    stored["results"] = results
    write_text(RESULTS, json.dumps(stored, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(MARKERS[0])
    write_text(PAGE, f"{head}{MARKERS[0]}\n\n{table(results)}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}")
    return int(any(r["apart"] > 0.1 * r["noise"] for r in results))


if __name__ == "__main__":
    sys.exit(main())

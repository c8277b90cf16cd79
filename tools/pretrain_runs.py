"""Stored pretraining runs, and their table and picture in docs/large_batches.md.

python -m tools.pretrain_runs runs/pretrain-*    keep the metrics of these finished runs in docs/results/runs/
python -m tools.scale_tables --write             table and picture from what is kept

"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

from ffcl_fast.pretrain.report import points
from ffcl_fast.train.checkpoint import write_atomically

from .files import write_text

ROOT = Path(__file__).resolve().parent.parent
STORED, PICTURE = ROOT / "docs" / "results" / "runs", ROOT / "docs" / "images" / "pretrain-curves.png"
HEAD = ("run", "processes x batch", "epochs, steps", "chance", "loss: first, last epoch", "samples/s", "peak MiB")
_COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's: told apart with any kind of colour vision

Found = dict[str, Any]


def make_shards(images: Path, folder: Path, count: int = 16) -> None:
    """The training images of an image folder's .tar, shuffled, with labels and the class's name as caption."""
    import webdataset

    with tarfile.open(images) as archive:
        files = [m for m in archive.getmembers() if m.isfile() and Path(m.name).parts[-3] == "train"]
        classes = sorted({Path(m.name).parent.name for m in files})
        random.Random(0).shuffle(files)
        folder.mkdir(parents=True, exist_ok=True)
        with webdataset.ShardWriter(f"{folder}/chest-%04d.tar", maxcount=-(-len(files) // count), verbose=0) as shards:
            for number, member in enumerate(files):
                content, name = archive.extractfile(member), Path(member.name).parent.name
                assert content is not None
                sample = {"jpeg": content.read(), "cls": classes.index(name), "txt": name}
                shards.write({"__key__": f"{number:06d}", **sample})


def load() -> dict[str, Found]:
    """Every stored run by name."""
    return {
        path.stem.removeprefix("pretrain-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(STORED.glob("pretrain-*.json"))
    }


def keep(run: Path, commit: dict[str, Any]) -> Path:
    """Copy a finished run's metrics, with where and from which sources they came. Raises ValueError for another one."""
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if found.get("status") != "finished" or not run.name.startswith("pretrain-"):
        raise ValueError(f"{run} is no finished run of ffcl pretrain named pretrain-...")
    path = STORED / f"{run.name}.json"
    write_text(path, json.dumps({**found, **commit}, separators=(",", ":")) + "\n")
    return path


def chance(found: Found) -> float:
    """The loss where all similarities are equal."""
    batch = found["processes"] * found["config"]["batch_size"]
    return math.log(batch if found["config"]["method"] == "clip" else 2 * batch - 1)


def rows() -> list[list[str]]:
    """A line of the table for each stored run."""
    lines = []
    for name, found in load().items():
        epochs, loss = found["epochs"], points(found["epochs"], "loss")
        seconds = sum(e["seconds"] for e in epochs)
        speed = sum(e["samples_per_second"] * e["seconds"] for e in epochs) / seconds
        lines.append(
            [
                name,
                f"{found['processes']} x {found['config']['batch_size']}",
                f"{len(epochs)}, {sum(e['steps'] for e in epochs)}",
                f"{chance(found):.2f}",
                f"{loss[0]:.2f}, {epochs[-1]['loss']:.2f}",
                f"{speed:.0f}",
                f"{max(e['peak_mib'] for e in epochs):.0f}",
            ]
        )
    return lines


def sources() -> str:
    """Where the stored runs were made."""
    stamps = {f"{found['device']}, {found['when']}, commit {found['commit']}" for found in load().values()}
    return "; ".join(sorted(stamps))


def digest() -> str:
    """What the picture was drawn from; stored inside it."""
    return "runs:" + hashlib.sha256(json.dumps(load(), sort_keys=True).encode()).hexdigest()[:16]


def draw() -> None:
    """Loss against steps of every stored run, a dashed line for chance, :func:`digest` in the metadata."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    stored = load()
    figure, axes = plt.subplots(
        1, len(stored), figsize=(3 * len(stored), 2.8), layout="constrained", dpi=130, squeeze=False
    )
    try:
        for axis, (name, found) in zip(axes[0], stored.items(), strict=True):
            axis.plot(points(found["epochs"], "step"), points(found["epochs"], "loss"), color=_COLOURS[0], lw=1.4)
            axis.axhline(chance(found), color=_COLOURS[1], lw=1, ls="--", label="chance")
            for end in [e["trace"]["step"][-1] for e in found["epochs"]][:-1]:
                axis.axvline(end, color="0.85", lw=0.6, zorder=0)
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("step (lines: ends of epochs)", fontsize=8)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=8)
        axes[0, 0].set_ylabel("loss", fontsize=8)
        axes[0, 0].legend(fontsize=8, frameon=False)
        write_atomically(PICTURE, lambda scratch: figure.savefig(scratch, metadata={"Description": digest()}))
    finally:
        plt.close(figure)


def is_current() -> bool:
    """Whether the picture was drawn from what is stored."""
    return PICTURE.exists() and digest().encode() in PICTURE.read_bytes()


def main(argv: list[str] | None = None) -> int:
    from benchmarks.machine import device
    from benchmarks.store import stamp

    parser = argparse.ArgumentParser(prog="pretrain_runs", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs, named pretrain-...")
    parser.add_argument("--shards", type=Path, nargs=2, metavar=("TAR", "FOLDER"), help="make shards of its images")
    flags = parser.parse_args(argv)
    if flags.shards:
        make_shards(*flags.shards)
    known = stamp()
    commit = {"device": device()["name"], "when": known["when"], "commit": known["commit"]}
    for run in flags.runs:
        print(keep(run, commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())

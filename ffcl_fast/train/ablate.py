"""``ffcl ablate``: a table of variants of one run, each over several seeds. Resumable, since each run is.

A plan is a YAML file, or the default plan below:

    seeds: [0, 1, 2]
    settings: {data: chest_xray_224.tar, image_size: 64}       of every run
    rows:
      - {name: no pretraining, settings: {stages: [downstream]}}
      - {name: FFCL}

``out`` gets ablation.json (every run), ablation.md, ablation.png and runs/ROW-sSEED/. Seeds are the outer loop, so that
an unfinished ablation has every row over the seeds so far. A finished run's weights are deleted: the numbers stay.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import write_text
from .config import FIELDS, Config, load_config, read_yaml, shown, unknown_setting
from .data import Data, prepare
from .errors import Interrupted, UserError
from .kinds import kind_of
from .model import check_backbone
from .parallel import device_for
from .report import error_bars
from .run import CONFIG, METRICS, check_place, is_finished, resumed_config, train
from .scoring import CHECKPOINTS, finished

SEEDS = (0, 1, 2)
JSON, TABLE, PLOT = "ablation.json", "ablation.md", "ablation.png"
_SCORES = {"accuracy": "accuracy, %", "macro_f1": "macro F1, %", "auc": "AUC, %"}
_OWN = ("seed", "name", "out", "preset")  # settings of a run that the ablation itself decides
_DATA = ("data", "data_dir", "image_size")  # settings that decided what the images are


@dataclass(frozen=True)
class Row:
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


# The method's own ablations: which stages, then which loss.
ROWS = (
    Row("no pretraining", {"stages": ("downstream",)}),
    Row("local only", {"stages": ("local", "downstream")}),
    Row("global only", {"stages": ("global", "downstream")}),
    Row("FFCL: local, then global"),
    Row("FFCL, balanced pairs", {"pairs": "balanced"}),
    Row("FFCL, leaf modules as layers", {"local_layers": "leaves"}),
    Row("sum of squares per layer, then global", {"local_loss": "sum_squares"}),
    Row("InfoNCE per layer and at the output", {"local_loss": "info_nce", "global_loss": "info_nce"}),
    Row("SupCon per layer and at the output", {"local_loss": "sup_con", "global_loss": "sup_con"}),
    Row("SimCLR: NT-Xent at the output only", {"stages": ("global", "downstream"), "global_loss": "nt_xent"}),
)


@dataclass(frozen=True)
class Plan:
    """Rows, the settings that all share, and seeds. Raises UserError for rows that could not run or be told apart."""

    rows: Sequence[Row] = ROWS
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = SEEDS

    def __post_init__(self) -> None:
        slugs = [row.slug for row in self.rows]
        if not slugs or "" in slugs or len(set(slugs)) != len(slugs):
            raise UserError(f"rows: expected names that differ in their letters, got {[row.name for row in self.rows]}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds: expected different whole numbers, got {list(self.seeds)}")
        for row in self.rows:
            config = self.config(row, self.seeds[0], Path("."))
            if "downstream" not in config.stages:
                raise UserError(f"rows: {row.name!r} has no downstream stage, so nothing to compare")

    def config(self, row: Row, seed: int, out: Path) -> Config:
        """The settings of one run."""
        given = {**self.settings, **row.settings}
        for name in _OWN[:3]:
            if name in given:
                raise UserError(f"{name}: is the ablation's own to set, not a row's")
        return load_config({**given, "seed": seed, "out": str(out / "runs"), "name": f"{row.slug}-s{seed}"})


def read_plan(file: str | Path | None, flags: Mapping[str, Any], seeds: str | None = None) -> Plan:
    """The plan in ``file`` (or the default one), with ``flags`` over its settings and ``seeds`` as in "0,1,2".

    Raises UserError that names what is wrong in it.
    """
    values = {} if file is None else read_yaml(file)
    unknown = [key for key in values if key not in ("seeds", "settings", "rows")]
    if unknown:
        raise UserError(f"config {file}: unknown key {shown(unknown[0])}; an ablation has seeds, settings and rows")
    settings = values.get("settings") or {}
    rows = values.get("rows")
    if not isinstance(settings, dict):
        raise UserError(f"config {file}: settings must be 'setting: value' lines")
    if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UserError(f"config {file}: rows must be a list of {{name: ..., settings: ...}}")
    parsed = ROWS if rows is None else [_row(row, file) for row in rows]
    for name in {**settings, **{key: 0 for row in parsed for key in row.settings}}:
        if name not in FIELDS:
            raise UserError(f"config {file}: {unknown_setting(name, FIELDS)}")
    numbers = values.get("seeds", list(SEEDS)) if seeds is None else seeds.split(",")
    try:
        numbers = [int(str(number)) for number in numbers]
    except (TypeError, ValueError):
        raise UserError(f"seeds: expected whole numbers such as 0,1,2, got {shown(numbers)}") from None
    return Plan(parsed, {**settings, **flags}, numbers)


def _row(values: dict[str, Any], file: Any) -> Row:
    settings = values.get("settings") or {}
    if set(values) - {"name", "settings"} or not isinstance(values.get("name"), str) or not isinstance(settings, dict):
        raise UserError(f"config {file}: a row has a name and settings, got {shown(values)}")
    return Row(values["name"], settings)


def ablate(
    plan: Plan, out: str | Path, *, log: Callable[[str], None] = print, bars: bool = False, **options: Any
) -> dict[str, Any]:
    """Run what ``out`` does not hold yet, and return what ``ablation.json`` then says.

    ``options`` go to every :func:`ffcl_fast.train.train` (``backbone_factory()`` makes its ``backbone`` anew).
    Raises UserError for a run in ``out`` that has other settings or damaged metrics, and as ``train`` does; what can be
    told of any run without its data is told before the first.
    """
    out = Path(out)
    factory = options.pop("backbone_factory", None)
    prepared: dict[tuple, Data] = {}
    runs = _runs(plan, out)
    due = [config for _, config, directory in runs if not is_finished(directory)]
    if due:
        check_place(out)
    for config in due:
        _check_without_data(config, factory is not None)
    for title, config, directory in runs:
        if is_finished(directory):
            continue
        log(title)
        key = tuple(getattr(config, name) for name in _DATA)
        if key not in prepared:
            prepared[key] = prepare(config)
        if factory is not None:
            torch.manual_seed(config.seed)
            options["backbone"] = factory()
        resume = directory if (directory / CONFIG).is_file() else None
        config = config if resume is None else resumed_config(directory, {})
        try:
            train(config, resume=resume, data=prepared[key], pictures=False, log=log, bars=bars, **options)
        except Interrupted:
            raise KeyboardInterrupt(f"interrupted; the same command goes on with {directory}") from None
        write(plan, out)
    return write(plan, out)


def _check_without_data(config: Config, own_backbone: bool = False) -> None:
    """UserError for what of a run does not exist, as far as that can be told before its data is read."""
    kind_of(config.data, config.data_dir)
    device_for(config)
    if not own_backbone:
        check_backbone(config)


def listing(plan: Plan, out: str | Path) -> list[str]:
    """What :func:`ablate` would run: a line a run, with the time that it took so far, and one on them all.

    Raises UserError for a run in ``out`` that has other settings or damaged metrics, and for one that is to run whose
    data, device or backbone does not exist. Reads no data and writes nothing.
    """
    lines, to_run = [], []
    took: dict[str, list[float]] = {}  # settings apart from the seed -> seconds of its finished runs
    runs = _runs(plan, Path(out))
    for title, config, directory in runs:
        row = (config.name or "").rpartition("-s")[0]
        seconds = _seconds(directory)
        if is_finished(directory):
            took.setdefault(row, []).append(seconds)
            state = f"done in {seconds:.0f} s"
        else:
            _check_without_data(config)
            to_run.append((row, seconds))
            state = f"begun, {seconds:.0f} s so far" if (directory / CONFIG).is_file() else "to run"
        lines.append(f"{title}: {state}")
    last = f"{len(to_run)} of {len(runs)} runs to go"
    if to_run and took:
        each = [seconds for row in took.values() for seconds in row]
        left = sum(max(0.0, statistics.fmean(took.get(row, each)) - seconds) for row, seconds in to_run)
        last += f", about {left / 60:.0f} minutes if they take as long as those that are done"
    return [*lines, last]


def _runs(plan: Plan, out: Path) -> list[tuple[str, Config, Path]]:
    """Title, settings and folder of every run, seeds outermost. Raises UserError where a folder holds another run,
    or a finished one of damaged metrics."""
    pairs = [(row, seed) for seed in plan.seeds for row in plan.rows]
    runs = []
    for number, (row, seed) in enumerate(pairs, 1):
        config = plan.config(row, seed, out)
        directory = Path(config.out) / str(config.name)
        _refuse_another(directory, config)
        if is_finished(directory):
            finished(directory)
        runs.append((f"[{number}/{len(pairs)}] {row.name}, seed {seed}", config, directory))
    return runs


def _seconds(directory: Path) -> float:
    """What a run took so far: all of it where it is finished, else the training of its stored epochs."""
    try:
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
        epochs = [record for stage in metrics["stages"].values() for record in stage["epochs"]]
        return float(metrics.get("seconds") or sum(record["seconds"] for record in epochs))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return 0.0


def _refuse_another(directory: Path, config: Config) -> None:
    """Raise UserError where the run in ``directory`` has other settings than ``config``: its numbers are not ours."""
    if not (directory / CONFIG).is_file():
        return
    stored = load_config({}, directory / CONFIG).as_dict()
    free = ("workers", "data_dir", "device", *_OWN)
    changed = [k for k, v in config.as_dict().items() if k not in free and v != stored[k]]
    if changed:
        raise UserError(
            f"{changed[0]}: {directory} was run with {stored[changed[0]]!r}, now {getattr(config, changed[0])!r};"
            " choose another --out"
        )


def write(plan: Plan, out: Path) -> dict[str, Any]:
    """Collect the finished runs into ablation.json, the table and the plot, and delete their weights."""
    found: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "settings": Plan([Row("all")], plan.settings, [0]).config(Row("all"), 0, out).as_dict(),
        "seeds": list(plan.seeds),
        "machine": {"system": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "rows": [],
    }
    for name in _OWN:
        del found["settings"][name]
    for row in plan.rows:
        runs = []
        for seed in plan.seeds:
            directory = Path(plan.config(row, seed, out).out) / f"{row.slug}-s{seed}"
            if is_finished(directory):
                runs.append(_summary(directory, seed))
                shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
        found["rows"].append({"name": row.name, "settings": _plain(row.settings), "runs": runs})
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / JSON, json.dumps(found, indent=1))
    write_text(out / TABLE, markdown(found))
    draw(out / PLOT, found)
    return found


def digest(found: dict[str, Any]) -> str:
    """What a plot of these runs was drawn from; stored inside it."""
    return "runs:" + hashlib.sha256(json.dumps(found["rows"], sort_keys=True).encode()).hexdigest()[:16]


def draw(path: Path, found: dict[str, Any]) -> None:
    """Accuracy of every run, with means and error bars, :func:`digest` in the picture's metadata."""
    rows = {row["name"]: [run["test"]["accuracy"] for run in row["runs"]] for row in found["rows"]}
    error_bars(path, rows, digest(found))


def _summary(directory: Path, seed: int) -> dict[str, Any]:
    metrics = finished(directory)
    stages = {
        name: {
            "best_epoch": s["best_epoch"],
            "epochs": len(s["epochs"]),
            "val": s["epochs"][s["best_epoch"] - 1]["val"],
        }
        for name, s in metrics["stages"].items()
    }
    keep = ("data", "backbone", "parameters", "versions", "machine", "seconds", "test")
    return {"seed": seed, "stages": stages, **{key: metrics[key] for key in keep}}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def markdown(found: dict[str, Any]) -> str:
    """One table: mean and sample standard deviation over seeds, and the difference to the first row in the mean of the
    seeds that both have."""
    first = {run["seed"]: run["test"]["accuracy"] for run in found["rows"][0]["runs"]}
    head = ["pretraining", *_SCORES.values(), f"accuracy against {found['rows'][0]['name']}, points", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in found["rows"]:
        cells = [spread([100 * run["test"][name] for run in row["runs"]]) for name in _SCORES]
        gain = [100 * (r["test"]["accuracy"] - first[r["seed"]]) for r in row["runs"] if r["seed"] in first]
        cells.append("" if row is found["rows"][0] else spread(gain, sign="+"))
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {len(row['runs'])} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """``mean ± standard deviation`` (n - 1), a lone value, or a dash."""
    if not values:
        return "–"
    mean = format(statistics.fmean(values), f"{sign}.{digits}f")
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"

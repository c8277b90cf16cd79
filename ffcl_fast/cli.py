"""The ``ffcl`` command: parsing and messages only; each command imports what it needs when it runs.

Exit codes: 0 done; 1 ``doctor`` found something wrong; 2 a mistake of the user's, told in one line; 130 Ctrl-C;
143 SIGTERM, as a scheduler sends it, told as Ctrl-C is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .pretrain import config as pretrain_config
from .train.config import FIELDS, base_type, load_config
from .train.errors import UserError, closest, did_you_mean
from .train.kinds import kind_of

_EVALUATE = ("data", "data_dir", "workers", "device")  # settings that may differ between training and evaluation


class _Parser(argparse.ArgumentParser):
    """argparse with one line for an error in place of the whole usage. ``commands``: the parser of each."""

    commands: dict[str, _Parser]

    def unknown(self, arguments: Sequence[str]) -> str:
        """A line on arguments that no flag takes, with the flags that may have been meant."""
        flags = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        meant: list[str] = []
        for typed in (argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")):
            meant += [f"--{flag}" for flag in closest(typed, flags)]
        if "data" in flags and not arguments[0].startswith("-"):
            with contextlib.suppress(UserError):
                kind_of(arguments[0])
                meant.append(f"--data {arguments[0]}")
        hint = did_you_mean(list(dict.fromkeys(meant))[:5])
        return f"{self.prog}: unrecognized arguments: {' '.join(arguments)}{hint} (see {self.prog} --help)"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(prog="ffcl", description="Forward-Forward Contrastive Learning.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="run the three FFCL stages",
        description="Run the FFCL stages and write runs/NAME/: config.yaml, metrics.json, TensorBoard events, learning"
        " curves as PNG, checkpoints. Settings come from flags, over --config, over --preset, over the defaults.",
        allow_abbrev=False,
    )
    train.add_argument("--config", metavar="FILE", help="YAML file of settings, named as the flags with _ for -")
    train.add_argument("--resume", metavar="RUN", help="go on with an unfinished run: its folder, or its name in --out")
    for name in FIELDS:
        _add_setting(train, name)

    evaluate = commands.add_parser(
        "evaluate",
        help="test metrics of a finished run, with a confusion matrix, a ROC curve and embeddings as PNG",
        description="Test metrics of a finished run; writes evaluation.json, confusion_matrix.png, roc.png, layers.png"
        " (each layer's loss over time) and embeddings.png (before training and after each stage) into it.",
        allow_abbrev=False,
    )
    evaluate.add_argument("run", metavar="RUN", help="folder of a finished run, as runs/NAME")
    for name in _EVALUATE:
        _add_setting(evaluate, name)

    ablate = commands.add_parser(
        "ablate",
        help="variants of a run over several seeds: a table, its JSON and a plot",
        description="Run variants of one training over several seeds, what is not yet done only; writes ablation.md,"
        " ablation.json and ablation.png into --out. Settings come from flags, over --config, over the defaults.",
        allow_abbrev=False,
    )
    ablate.add_argument("--config", metavar="FILE", help="YAML file of seeds, settings and rows (default: FFCL's own)")
    ablate.add_argument("--seeds", metavar="N,N,...", help="seeds, separated by commas (default: 0,1,2)")
    ablate.add_argument("--out", metavar="FOLDER", default="runs/ablation", help="(default: runs/ablation)")
    ablate.add_argument(
        "--dry-run", action="store_true", help="only say what there is to run, and how long each run took so far"
    )
    for name in FIELDS:
        if name not in ("seed", "name", "out"):
            _add_setting(ablate, name)

    pretrain_config.add_arguments(
        commands.add_parser(
            "pretrain",
            help="contrastive pretraining: SimCLR, SupCon or CLIP-style, on any number of processes",
            description="Contrastive pretraining, alone or on the processes of torchrun (torchrun --nproc-per-node 2 -m"
            " ffcl_fast.pretrain ...). Writes runs/NAME/: backbone.safetensors for ffcl train --init, metrics.json,"
            " TensorBoard events, curves.png, a checkpoint an epoch.",
            allow_abbrev=False,
        )
    )

    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, and every backend checked and timed",
        description="What this machine has, which backend 'auto' picks and why, and every backend checked against the"
        " float64 reference, with its error and a quick timing.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.commands = commands.choices
    return parser


def _add_setting(parser: argparse.ArgumentParser, name: str) -> None:
    """A flag for a setting. Values stay text: the config's own checks know types and limits, from any source."""
    field = FIELDS[name]
    default = "" if field.default is None else f" (default: {_shown(field.default)})"
    parser.add_argument(
        "--" + name.replace("_", "-"),
        dest=name,
        default=argparse.SUPPRESS,
        metavar=_metavar(name),
        help=(field.metadata["help"] + default).replace("%", "%%"),
    )


def _metavar(name: str) -> str:
    choices = FIELDS[name].metadata.get("choices")
    if choices:
        return ",".join(choices) if base_type(name)[0] is tuple else "|".join(choices)
    return {int: "N", float: "X"}.get(base_type(name)[0], name.rpartition("_")[2].upper())


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's own) and return the exit code."""
    parser = _parser()
    try:
        parsed, unknown = parser.parse_known_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    arguments = vars(parsed)
    command = arguments.pop("command")
    if unknown:  # told here, since argparse would point to the help of all commands
        print((parser.commands[command] if command else parser).unknown(unknown), file=sys.stderr)
        return 2
    if arguments.pop("version"):
        from . import __version__

        print(f"ffcl {__version__}")
        return 0
    if command is None:
        parser.print_help()
        return 2
    terminated: list[int] = []
    try:
        with _terminates_as_ctrl_c() as terminated:
            return _COMMANDS[command](arguments)
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt as stop:
        print(f"\nffcl {command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 143 if terminated else 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            reason = str(error).partition("\n")[0].rstrip(".")
            problem = f"{reason}: killed, often for lack of memory; try fewer --workers, and go on with --resume"
        elif isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        else:
            problem = "out of memory; try a smaller --batch-size or --image-size"
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ffcl_fast"):
            raise
        problem = f"{error.name} is not installed; what training needs comes with: pip install 'ffcl-fast[train]'"
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder without permission
        problem = " ".join(filter(None, [str(error.filename or ""), error.strerror or str(error)]))
    print(f"ffcl {command}: {problem}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _terminates_as_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM interrupts as Ctrl-C does; the list holds it once it has come. Not under torchrun, which restarts ranks
    that may wait in a collective, where no Python handler runs."""
    came: list[int] = []

    def handle(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    usable = threading.current_thread() is threading.main_thread() and "RANK" not in os.environ
    before = signal.signal(signal.SIGTERM, handle) if usable else None
    try:
        yield came
    finally:
        if usable:
            signal.signal(signal.SIGTERM, before)


def _train(flags: dict[str, Any]) -> int:
    file, resume = flags.pop("config"), flags.pop("resume")
    if resume is None:
        config = load_config(flags, file)
        kind_of(config.data, config.data_dir)  # before the trainer's imports, which take seconds
    elif file is not None:
        raise UserError("config: cannot be given with --resume, which keeps the run's own settings")
    from .train.parallel import restarts
    from .train.run import CONFIG, CURVES, is_finished, resumed_config, train

    if resume is None and restarts() and config.name and (Path(config.out) / config.name / CONFIG).is_file():
        # torchrun has started processes anew: those of this run, or of one that may not have the name
        resume, flags = str(Path(config.out) / config.name), config.as_dict()
    directory = None
    if resume is not None:
        directory = Path(resume)
        if not directory.is_dir() and (Path(flags.get("out", "runs")) / resume).is_dir():
            directory = Path(flags.get("out", "runs")) / resume
        config = resumed_config(directory, flags)
        if is_finished(directory):
            print(f"{directory} is finished already")
            return 0
    run = train(config, resume=directory, log=_say, bars=True)
    if not run.first:
        return 0
    test = run.metrics.get("test")
    if test is None:
        print(f"no downstream stage, so nothing to test; weights in {run.directory / 'checkpoints'}")
    else:
        print(f"test accuracy {100 * test['accuracy']:.2f} %, {_rest(test)}")
    print(f"learning curves: {run.directory / CURVES}")
    return 0


def _evaluate(flags: dict[str, Any]) -> int:
    from .train.scoring import evaluate

    run = flags.pop("run")

    def told(test: dict[str, float], images: int) -> None:
        _say(f"{run}: accuracy {100 * test['accuracy']:.2f} % on {images} test images, {_rest(test)}")

    for picture in evaluate(run, flags, on_scores=told)["pictures"]:
        print(picture)
    return 0


def _pretrain(flags: dict[str, Any]) -> int:
    resume = flags.pop("resume")
    config = (
        pretrain_config.Config(**flags) if resume in (None, True) else pretrain_config.resumed_config(resume, flags)
    )
    from .distributed import LostRank
    from .pretrain.run import pretrain

    try:
        folder = pretrain(config, resume=resume is not None, log=_say)
    except LostRank as error:
        raise UserError(str(error)) from None
    if not int(os.environ.get("RANK", "0")):
        _say(f"backbone: {folder / 'backbone.safetensors'}")
    return 0


def _ablate(flags: dict[str, Any]) -> int:
    from .train.ablate import PLOT, TABLE, ablate, listing, read_plan

    out = Path(flags.pop("out"))
    file, seeds, dry = flags.pop("config"), flags.pop("seeds"), flags.pop("dry_run")
    plan = read_plan(file, flags, seeds)
    if dry:
        print("\n".join(listing(plan, out)))
        return 0
    ablate(plan, out, log=_say, bars=True)
    print((out / TABLE).read_text(encoding="utf-8"))
    print(f"{out / TABLE}\n{out / PLOT}")
    return 0


def _doctor(flags: dict[str, Any]) -> int:
    from . import doctor

    findings = doctor.examine()
    print((doctor.as_json if flags["json"] else doctor.as_text)(findings))
    return 1 if any(check["verdict"] in doctor.BAD for check in findings["checks"]) else 0


def _rest(test: dict[str, float]) -> str:
    names = {"auc": "AUC", "macro_f1": "macro F1", "precision": "precision", "recall": "recall"}
    return ", ".join(f"{label} {test[name]:.4f}" for name, label in names.items())


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)  # above a progress bar, where there is one
    sys.stdout.flush()


_COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "ablate": _ablate,
    "pretrain": _pretrain,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())

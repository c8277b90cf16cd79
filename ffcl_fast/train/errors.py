"""The one exception that the trainer raises for mistakes of its user's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong path, file, option or data set: its text is one line that names the culprit (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def did_you_mean(names: Iterable[str]) -> str:
    """A hint that ends a message: ``"; did you mean a, b or c?"``, or nothing for no names."""
    names = list(names)
    return f"; did you mean {', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]}?" if names else ""


def closest(typed: str, known: Iterable[str]) -> list[str]:
    """Which of the known names may have been meant by another: those that go on from it, else those spelt like it."""
    known = list(known)
    longer = [name for name in known if len(typed) > 2 and name.startswith(typed)]
    return longer or difflib.get_close_matches(typed, known, n=2, cutoff=0.75)


def first_line(error: BaseException) -> str:
    """What a library's exception says, in its first line; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``directory`` is the run's folder, from which it can go on."""

    def __init__(self, directory: object) -> None:
        super().__init__(f"interrupted; go on with: ffcl train --resume {directory}")

"""The one exception that the trainer raises for mistakes of its user's."""

from __future__ import annotations


class UserError(Exception):
    """A wrong path, file, option or data set: its text is one line that names the culprit (exit code 2)."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def first_line(error: BaseException) -> str:
    """What a library's exception says, in its first line; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``directory`` is the run's folder, from which it can go on."""

    def __init__(self, directory: object) -> None:
        super().__init__(f"interrupted; go on with: ffcl train --resume {directory}")

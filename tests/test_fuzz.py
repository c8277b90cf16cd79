"""A few hundred calls of each fuzzing target, at random; `make fuzz` runs them for minutes, guided by coverage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "fuzz"

# In a process of its own, whose crash would be an exit code and no end of all tests.
CALLS = """
import sys
sys.path[:0] = [{root!r}, {folder!r}]
import targets
target = targets.TARGETS[{name!r}]
for i in range({count}):
    try:
        targets.once(target, targets.RandomPick({seed} + i))
    except BaseException:
        print("seed", {seed} + i)
        raise
"""


@pytest.mark.parametrize("name, count", (("binding", 2000), ("functions", 500)))
def test_no_crash_and_only_a_users_exceptions(name, count, seed):
    script = CALLS.format(root=str(FOLDER.parents[1]), folder=str(FOLDER), name=name, count=count, seed=seed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

"""The Triton goodness kernels on a CPU: tests/interpreter/goodness.py under Triton's interpreter."""

import interpreted
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

GROUPS = ["goodness and not (linear or many)", "pair_cosine or scale", "pool"]
GROUPS.append("not (" + " or ".join(f"({group})" for group in GROUPS) + ")")


@pytest.mark.long
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group):
    interpreted.run("goodness.py", "-k", group)

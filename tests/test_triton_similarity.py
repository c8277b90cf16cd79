"""The Triton similarity kernels on a CPU: tests/interpreter/similarity.py under Triton's interpreter."""

import interpreted
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

GROUPS = [
    "forward",
    "gradient and pair",
    "gradient and self",
    "siglip",
    "not forward and not gradient and not siglip",
]


@pytest.mark.long
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group):
    interpreted.run("similarity.py", "-k", group)

"""Shared by the interpreter's tests."""

import pytest

from ffcl_fast.backends.triton import launch


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> None:
    """Plans follow from constants that tests change."""
    launch.forget_plans()

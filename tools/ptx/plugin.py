"""A pytest plugin, `-p tools.ptx.plugin [--chip sm80]`: tests of the Triton kernels run what is compiled for a chip on
the machine."""

from __future__ import annotations

import contextlib
import os

import pytest

from .. import no_gpu
from . import launch

# About which backend runs what, of which the plugin changes the answers.
NOT_OF_KERNELS = ("test_what_it_cannot_run_says_why", "test_auto_never_means_triton")
NOT_OF_CHIP = {"sm80": ("test_descriptors_load_what_pointers_load",)}  # which has no copy engine
_installed = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chip", choices=tuple(no_gpu.CHIPS), default="sm90", help="what to compile for")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "tools.ptx runs what Triton compiles: unset TRITON_INTERPRET, under which it compiles nothing"
        )
    _installed.enter_context(launch.installed(config.getoption("--chip")))


def pytest_unconfigure(config: pytest.Config) -> None:
    _installed.close()


def _left_out(config: pytest.Config) -> tuple[str, ...]:
    return (*NOT_OF_KERNELS, *NOT_OF_CHIP.get(config.getoption("--chip"), ()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.name.split("[")[0] in _left_out(config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    names = ", ".join(_left_out(config))
    terminalreporter.write_line(
        f"as compiled for {config.getoption('--chip')}; left out, for it shows nothing: {names}"
    )

"""A pytest plugin, `-p tools.ptx.plugin`: tests of the Triton kernels run what is compiled for sm_90 on the machine."""

from __future__ import annotations

import contextlib
import os

import pytest

from . import launch

# About which backend runs what, of which the plugin changes the answers.
NOT_OF_KERNELS = ("test_what_it_cannot_run_says_why", "test_auto_never_means_triton")
_installed = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(
            "tools.ptx runs what Triton compiles: unset TRITON_INTERPRET, under which it compiles nothing"
        )
    _installed.enter_context(launch.installed())


def pytest_unconfigure(config: pytest.Config) -> None:
    _installed.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.name.split("[")[0] in NOT_OF_KERNELS]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"tools.ptx: left out, for they are not about kernels: {', '.join(NOT_OF_KERNELS)}")

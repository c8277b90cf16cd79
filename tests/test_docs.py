"""The documentation: its examples run and say what they claim, and the reference leaves no public name out."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import ffcl_fast
from ffcl_fast import distributed, functional, losses, nn

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if _FENCE.search(path.read_text(encoding="utf-8")))
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(text: str) -> str:
    """Every ```pycon block, at the lines where it is in the page, so that a failure names the right one."""
    kept, end = [], 0
    for fence in _FENCE.finditer(text):
        kept += ["\n" * text.count("\n", end, fence.start(1)), fence[1]]
        end = fence.end(1)
    return "".join(kept)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page):
    code = examples(page.read_text(encoding="utf-8"))
    test = doctest.DocTestParser().get_doctest(code, {"__name__": "__main__"}, page.name, str(page), 0)
    said: list[str] = []
    done = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
    assert done.attempted and not done.failed, "".join(said)


@pytest.mark.parametrize("module", (ffcl_fast, distributed, functional, losses, nn), ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)}
    shown |= {name for names in re.findall(r"members: \[([^]]+)\]", reference) for name in names.split(", ")}
    modules = {"distributed", "functional", "nn"}  # pages of their own
    assert not set(module.__all__) - shown - modules

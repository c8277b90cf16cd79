"""The documentation: its examples run and say what they claim, and the reference leaves no public name out."""

from __future__ import annotations

import doctest
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

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


def test_code_of_large_batches(tmp_path, monkeypatch):
    """Its blocks without output, in turn, with the names that they take for given."""
    text = (ROOT / "docs" / "large_batches.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    x, y = torch.randn(8, 128, requires_grad=True), torch.randn(8, 128)
    log_scale = torch.tensor(2.0, requires_grad=True)
    model = torch.nn.Linear(128, 16)
    pixels = io.BytesIO()
    Image.new("L", (4, 4)).save(pixels, "JPEG")
    names = {
        **{"ffcl_fast": ffcl_fast, "image_features": x, "text_features": y, "logit_scale": log_scale.exp()},
        **{"model": model, "view0": x.detach(), "view1": y, "images": x.detach(), "texts": y, "query": x, "key": y},
        **{"image_encoder": model, "text_encoder": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)},
        "clip_loss": lambda image, text: ffcl_fast.ClipLoss()(image, text, log_scale.exp()),
        "samples": [(pixels.getvalue(), 1, "a chest")] * 3,
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for block in blocks:
        exec(compile(block, "large_batches.md", "exec"), names)
    assert len(blocks) == 4 and [path.name for path in (tmp_path / "shards").iterdir()] == ["images-0000.tar"]


@pytest.mark.parametrize("module", (ffcl_fast, distributed, functional, losses, nn), ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)}
    shown |= {name for names in re.findall(r"members: \[([^]]+)\]", reference) for name in names.split(", ")}
    modules = {"distributed", "functional", "nn"}  # pages of their own
    missing = sorted(set(module.__all__) - shown - modules)
    assert not missing, f"docs/api/ has no page or members for {missing}"

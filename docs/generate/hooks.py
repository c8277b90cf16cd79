"""What the site holds besides the pages in docs/: the tile pictures, the benchmarks, and the project's own papers.

All of it is made in memory while the site is built, from code, stored measurements and the files at the root.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from benchmarks import plots, report, store
from docs.generate import pictures

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: Any) -> Files:
    generated: dict[str, str] = {f"pictures/{name}.svg": draw() for name, draw in pictures.PICTURES.items()}
    generated["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    generated["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    generated |= _benchmarks()
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    return files


def _benchmarks() -> dict[str, str]:
    """The report of every device, and its plots, from the stored records."""
    all_results = store.load_all(store.RESULTS)
    found = {"benchmarks.md": report.site_page(all_results)}
    with tempfile.TemporaryDirectory() as folder:
        for results in all_results:
            slug = results["device"]["slug"]
            for name in plots.available(results):
                path = Path(folder) / f"{slug}-{name}.svg"
                plots.draw(name, results, path, report.digest(results))
                found[f"plots/{path.name}"] = path.read_text(encoding="utf-8")
    return found


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fail where a picture is named that nobody draws: mkdocs would warn of a link only."""
    for name in re.findall(r"\(pictures/([\w-]+)\.svg\)", markdown):
        if name not in pictures.PICTURES:
            raise ValueError(f"{page.file.src_uri} shows pictures/{name}.svg, which docs/generate/pictures.py lacks")
    return markdown

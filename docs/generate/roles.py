"""Sphinx roles in docstrings (:func:`goodness`) as links of this site, or as code where it has no such page."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(~?)([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda found: _link(found, obj), obj.docstring.value)


def _link(found: re.Match[str], obj: griffe.Object) -> str:
    short, name = found[1], found[2]
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    # where the package exports it is where its page is
    target = re.sub(r"^ffcl_fast\.losses\.\w+\.(\w+)$", r"ffcl_fast.\1", target)
    target = re.sub(r"^ffcl_fast\.functional\.\w+\.(\w+)$", r"ffcl_fast.functional.\1", target)
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

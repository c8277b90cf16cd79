"""The definitions of a C++ file by name, as far as hashing csrc's headers needs them: no parser, a scan of braces."""

from __future__ import annotations

import re
from collections.abc import Iterator

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TRANSPARENT = re.compile(r'\s*(?:inline\s+)?(?:namespace\b[\w:\s]*|extern\s+"C"\s*)')
_ATTRIBUTE = re.compile(r"\b__\w+__(?:\([^()]*\))?|\[\[[^\]]*\]\]")
_TYPE = re.compile(r"\s*(?:typedef\s+)?(?:struct|class|union|enum(?:\s+class)?)\s+(?:alignas\([^()]*\)\s*)?(\w+)")
_ALIAS = re.compile(r"\s*using\s+(\w+)\s*=")
_OTHER = re.compile(r"(\w+)\s*[({=\[;]")  # a function's or a variable's name is what stands before these first


def without_comments(text: str) -> str:
    return _COMMENT.sub("", text)


def words(text: str) -> str:
    """The text without differences of white space."""
    return " ".join(text.split())


def definitions(text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every definition, declaration and macro outside others, without comments; "" for a name that is
    not understood. Conditions of the preprocessor outside definitions are left out."""
    text = without_comments(text)
    start = depth = at = 0
    while at < len(text):
        char = text[at]
        if depth == 0 and char == "#":
            line = re.compile(r"(?:\\\n|[^\n])*").match(text, at)
            if macro := re.match(r"#\s*define\s+(\w+)", line[0]):
                yield macro[1], words(line[0])
            start = at = line.end()
            continue
        if char == "{" and depth == 0 and _TRANSPARENT.fullmatch(text, start, at):
            start = at + 1
        elif char in "{(":
            depth += 1
        elif char == "}" and depth == 0:  # of a namespace
            start = at + 1
        elif char in "})":
            depth -= 1
        if depth == 0 and (char == ";" or (char == "}" and start <= at)):
            if chunk := words(text[start : at + 1]).removeprefix(";").strip():
                yield _name(chunk), chunk
            start = at + 1
        at += 1


def _name(chunk: str) -> str:
    head = _ATTRIBUTE.sub("", chunk)
    while head.startswith("template"):
        head = _after_brackets(head)
    for pattern in (_TYPE, _ALIAS):
        if found := pattern.match(head):
            return found[1]
    found = _OTHER.search(head)
    return found[1] if found else ""


def _after_brackets(head: str) -> str:
    depth = 0
    for at, char in enumerate(head):
        depth += (char == "<") - (char == ">")
        if char == ">" and depth == 0:
            return head[at + 1 :].lstrip()
    return ""

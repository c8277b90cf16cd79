"""The definitions of a C++ file by name, as far as hashing csrc's headers needs them: no parser, a scan of braces."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LITERAL = r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''
_LITERALS = re.compile(_LITERAL)
_COMMENT_OR_LITERAL = re.compile(rf"//[^\n]*|/\*.*?\*/|({_LITERAL})", re.S)
_TRANSPARENT = re.compile(r'\s*(?:inline\s+)?(?:namespace\b[\w:\s]*|extern\s+"_*"\s*)')
_DIRECTIVE = re.compile(r"(?:\\\n|[^\n])*")
_ATTRIBUTE = re.compile(r"\b__\w+__(?:\([^()]*\))?|\[\[[^\]]*\]\]")
_ENUM = re.compile(r"\s*enum\b")
_TYPE = re.compile(r"\s*(?:struct|class|union)\s+(\w+)\s*[{:;]")
_FUNCTION = re.compile(r"[^(={;]*?(\w+)\s*\(")  # what stands before the first parenthesis
_UNSURE = re.compile(r"\boperator\b|\btemplate\s*<\s*>|\b(?:alignas|decltype|__attribute__)\s*\(")
ALWAYS = ("",)  # the name of what is not understood: it counts as used


def without_comments(text: str) -> str:
    return _COMMENT_OR_LITERAL.sub(lambda found: found[1] or "", text)


def words(text: str) -> str:
    """The text without differences of white space."""
    return " ".join(text.split())


def definitions(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(names, text) of every definition, declaration and macro outside others, without comments; the names of what is
    not understood are ALWAYS. Conditions of the preprocessor outside definitions are left out.

    Raises ValueError where braces do not match.
    """
    text = without_comments(text)
    scanned = _LITERALS.sub(lambda found: f'"{"_" * (len(found[0]) - 2)}"', text)
    start = depth = at = 0
    while at < len(text):
        char = scanned[at]
        if char == "#" and depth == 0:
            line = _DIRECTIVE.match(text, at)
            if macro := re.match(r"#\s*define\s+(\w+)", line[0]):
                yield (macro[1],), words(line[0])
            at = line.end()
            if not text[start : line.start()].strip(" \t\n;"):
                start = at  # else a definition goes on behind it
            continue
        if char == "{" and depth == 0 and _TRANSPARENT.fullmatch(scanned, start, at):
            start = at + 1
        elif char in "{(":
            depth += 1
        elif char == "}" and depth == 0:  # of a namespace
            start = at + 1
        elif char in "})":
            depth -= 1
        if depth == 0 and start <= at and char in ";}":
            if chunk := words(text[start : at + 1]).removeprefix(";").strip():
                yield _names(chunk), chunk
            start = at + 1
        at += 1
    if depth:
        raise ValueError("braces or parentheses do not match, or are cut by the preprocessor")


def _names(chunk: str) -> tuple[str, ...]:
    if _UNSURE.search(chunk.partition("{")[0]):
        return ALWAYS
    head = _ATTRIBUTE.sub("", chunk)
    while head.startswith("template"):
        head = _after_brackets(head)
    if _ENUM.match(head):
        return tuple(re.findall(r"\w+", head))  # its name and what it enumerates
    for pattern in (_TYPE, _FUNCTION):
        if found := pattern.match(head):
            return (found[1],)
    if head.startswith(("struct ", "class ", "union ")):
        return ALWAYS
    # A variable, several of them, or another name for a type: the last word before each initialiser.
    plain = re.sub(r"=[^,;]*", "", re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", head.rstrip(";")))
    declared = plain.removeprefix("using ").split(",")
    return tuple(found[-1] for part in declared if (found := re.findall(r"\w+", part))) or ALWAYS


def _after_brackets(head: str) -> str:
    depth = 0
    for at, char in enumerate(head):
        depth += (char == "<") - (char == ">")
        if char == ">" and depth == 0:
            return head[at + 1 :].lstrip()
    return ""

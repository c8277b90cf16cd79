"""From the text of a PTX module to instructions (PTX ISA: Syntax)."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)|(?P<text>[^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(?P<negated>!?)(?P<predicate>[%\w]+)\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)")
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>.*)")
_NUMBER = re.compile(r"-?\d")


# Operands are told apart by identity, which hashes faster than their fields.
@dataclass(frozen=True, eq=False)
class Register:
    name: str
    bits: int  # 1 of a predicate


@dataclass(frozen=True, eq=False)
class Immediate:
    text: str


@dataclass(frozen=True, eq=False)
class Symbol:
    """A label, parameter, array in shared memory, special register, or the sink `_`."""

    name: str


@dataclass(frozen=True, eq=False)
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple = ()


Operand = Register | Immediate | Symbol | Address | tuple  # a tuple is {a, b} or a|b


@dataclass(eq=False)
class Instruction:
    text: str
    opcode: str
    operands: list[Operand]
    predicate: Register | None
    negated: bool
    target: int | None = None  # of a branch
    run: Callable | None = None  # the machine's, once it has looked it up
    parts: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        self.parts = tuple(self.opcode.split("."))

    @property
    def type(self) -> str:
        """Of the operands: the last part of the opcode."""
        return self.parts[-1]


class Program:
    """The one kernel of a PTX module."""

    def __init__(self, ptx: str):
        text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", ptx, flags=re.M)
        entry = _ENTRY.search(text)
        self.name, parameters, directives = entry.groups()
        found = (re.search(r"(\w+)(?:\[\d+\])?\s*$", part) for part in parameters.split(","))
        self.parameters = {match[1]: i for i, match in enumerate(match for match in found if match)}
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", directives)[1])
        self.shared = set(re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", text))
        self.code: list[Instruction] = []
        self._registers: dict[tuple[str, int], Register] = {}
        branches = []
        for statement, scope in self._statements(text, entry.end()):
            instruction = self._instruction(statement, scope)
            self.code.append(instruction)
            if instruction.parts[0] == "bra":
                branches.append((instruction, scope))
        for instruction, scope in branches:  # labels may come after the branches to them
            instruction.target = scope[instruction.operands[0].name + ":"]

    def _statements(self, text: str, at: int) -> Iterator[tuple[str, ChainMap]]:
        """(text, scope) of each instruction. A scope has the bits of registers by name or prefix, and labels."""
        scope: ChainMap = ChainMap()
        count = 0
        while True:
            match = _STATEMENT.match(text, at)
            at = match.end()
            if match["brace"] == "{":
                scope = scope.new_child()
            elif match["brace"]:
                if len(scope.maps) == 1:
                    return
                scope = scope.parents
            elif match["label"]:
                scope[match["label"] + ":"] = count
            elif declared := _REGISTERS.match(match["text"]):
                kind = declared["type"]
                for name in declared["names"].split(","):
                    scope[name.split("<")[0].strip()] = 1 if kind == "pred" else int(kind[1:])
            elif not match["text"].startswith((".pragma", ".local")):  # nothing can be done with a local array here
                count += 1
                yield " ".join(match["text"].split()), scope

    def _instruction(self, text: str, scope: ChainMap) -> Instruction:
        match = _INSTRUCTION.fullmatch(text)
        if match is None or text.startswith("."):
            raise NotImplementedError(f"PTX: {text}")
        predicate = match["predicate"] and self._operand(match["predicate"], scope)
        operands = [self._operand(x, scope) for x in _split(match["operands"])]
        return Instruction(text, match["opcode"], operands, predicate, bool(match["negated"]))

    def _operand(self, text: str, scope: ChainMap) -> Operand:
        if text[0] == "{":
            return tuple(self._operand(x, scope) for x in _split(text[1:-1]))
        if "|" in text:
            return tuple(self._operand(x.strip(), scope) for x in text.split("|"))
        if text[0] == "[":
            return self._address(text[1:-1], scope)
        if _NUMBER.match(text):
            return Immediate(text)
        bits = scope.get(text) or scope.get(text.rstrip("0123456789"))
        if bits is None:
            return Symbol(text)
        return self._registers.setdefault((text, bits), Register(text, bits))

    def _address(self, text: str, scope: ChainMap) -> Address:
        base, *rest = _split(text)
        if rest:
            return Address(self._operand(base, scope), 0, self._operand(rest[0], scope))
        base, _, offset = base.partition("+")
        return Address(self._operand(base.strip(), scope), int(offset or "0", 0))


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]

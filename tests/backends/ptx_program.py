"""PTX as a list of instructions, for ``ptx_machine.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

NOTHING = (
    "setmaxnreg", "fence", "bar.warp", "wgmma.fence", "wgmma.commit", "wgmma.wait", "cp.async.bulk.commit",
    "cp.async.bulk.wait",
)  # fmt: skip
"""Starts of names without effect where everything is done at once."""
WAITING = ("bar.", "barrier.", "mbarrier.try_wait")
"""Those of what a warp may wait at for others."""


@dataclass(frozen=True)
class Instruction:
    """``@!guard name.of.parts operands``; an operand is a register, a number, ``{a, b}`` or ``[address]``.

    One runs thousands of times, so what its name says is worked out once.
    """

    guard: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """As it is written."""
        return ".".join(self.parts)

    @cached_property
    def kind(self) -> str:
        """The first part of it."""
        return self.parts[0]

    @cached_property
    def does_nothing(self) -> bool:
        """Whether it is left out here."""
        return self.name.startswith(NOTHING)

    @cached_property
    def waits(self) -> bool:
        """Whether other warps may have to go on first."""
        return not self.does_nothing and self.name.startswith(WAITING)


@dataclass(frozen=True)
class Program:
    """A kernel: where labels stand, the labels that jump tables list, its threads, and how many parameters it has."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    tables: dict[str, tuple[str, ...]]
    threads: int
    num_params: int


def parse(ptx: str) -> Program:
    """The only kernel of a module."""
    head, _, body = ptx.partition(".entry")[2].partition("\n{")
    body = re.sub(r"//[^\n]*", "", body.partition("// -- End function")[0])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, tuple[str, ...]] = {}
    for text in _statements(_without_blocks(body)):
        label = re.match(r"([$\w]+):\s*(?:\.branchtargets\s+(.*))?$", text, re.DOTALL)
        if label is None:
            instructions.append(_instruction(text))
        elif label[2]:
            tables[label[1]] = tuple(name.strip() for name in label[2].split(","))
        else:
            labels[label[1]] = len(instructions)
    threads = re.search(r"\.reqntid (\d+)", head)
    if threads is None:
        raise ValueError("a kernel without .reqntid")
    return Program(tuple(instructions), labels, tables, int(threads[1]), head.count(".param "))


def _without_blocks(body: str) -> str:
    """Blocks ``{ ... }`` of inline PTX laid open, their own registers and labels with the number of the block."""
    block, start = re.compile(r"(?<=[\s;])\{(\s[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}(?=\s)"), 0
    for number in range(len(body)):
        found = block.search(body, start)
        if found is None:
            return body
        start = found.start()
        inner = found[1]
        declared = re.findall(r"\.reg\s+\.\w+\s+([^;]*);", inner)
        registers = [name.strip() for names in declared for name in names.split(",")]
        targets = re.findall(r"(?:^|[;\s])([A-Za-z]\w*):(?!:)", inner)
        inner = re.sub(r"\.reg\s[^;]*;", "", inner)
        for prefix, names in (("%", registers), ("$", targets)):
            for name in names:
                if not name.startswith("%"):
                    inner = re.sub(rf"(?<![\w%$.]){name}(?!\w)", f"{prefix}{name}_{number}", inner)
        body = body[: found.start()] + inner + body[found.end() :]
    return body


def _statements(body: str) -> list[str]:
    """Instructions and labels in order, without directives."""
    found = []
    for text in re.split(r";|(?<=\w:)(?=\s+[^:\s.])", body):
        lines = [line for line in text.split("\n") if not re.match(r"\s*\.(loc|file|reg|pragma)", line)]
        statement = " ".join(" ".join(lines).split())
        while label := re.match(r"([$\w]+:)\s+(?!\.branchtargets)(.*)$", statement):
            found.append(label[1])
            statement = label[2]
        if statement and statement not in "{}":
            found.append(statement)
    return found


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", text)
    if found is None:
        raise ValueError(f"no instruction: {text!r}")
    operands = re.findall(r"\{[^{}]*\}|\[(?:[^\[\]{}]|\{[^{}]*\})*\]|[^,\s|]+", found[4])
    return Instruction(found[2], found[1] == "!", tuple(found[3].split(".")), tuple(operands))

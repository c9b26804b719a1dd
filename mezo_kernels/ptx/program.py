"""The text of a compiled kernel (PTX, NVIDIA's assembly language) taken apart into blocks of instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of PTX.

    Args:
        opcode: with all its modifiers, such as "ld.global.v4.b32".
        operands: a register, a number, a label, an address as (base, offset), or a list of registers.
        guard: the predicate register without which a thread passes over it, or "".
        wanted: the value that the guard must have.
        line: of the source, such as "tile.py:120", or "".
        inline: somebody wrote it, as inline assembly; the compiler did not make it.
    """

    opcode: str
    operands: tuple
    guard: str
    wanted: bool
    line: str
    inline: bool


@dataclass(frozen=True)
class Program:
    """One kernel.

    Args:
        blocks: lists of instructions; only the last one of a block may branch.
        labels: name -> number of the block that it stands before.
        bits: prefix of a register's name -> its width; 1 of predicates.
        threads: of one program of the grid.
        shared: bytes of shared memory of one program.
    """

    blocks: list[list[Instruction]]
    labels: dict[str, int]
    bits: dict[str, int]
    threads: int
    shared: int


def parse(ptx: str, shared: int) -> Program:
    """Take the text of one kernel apart.

    Args:
        ptx: as the compiler wrote it.
        shared: bytes of shared memory that a program asks for.
    Raises:
        ValueError: the text has no entry, or two, or does not say how many threads a program has.
    """
    if ptx.count(".entry") != 1 or not (threads := re.search(r"\.reqntid (\d+)", ptx)):
        raise ValueError("expected the PTX of one kernel, with one .entry and its .reqntid")
    body = ptx[ptx.index("{", ptx.index(".entry")) + 1 : ptx.rindex("}")]
    declared = re.findall(r"\.reg \.(\w+)\s+([^<;]+)[<;]", body)
    bits = {
        name.strip().rstrip("0123456789"): 1 if kind == "pred" else int(kind[1:])
        for kind, names in declared
        for name in names.split(",")
    }
    blocks, labels = [[]], {}
    for statement, line, inline in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(blocks)
            blocks.append([])
            continue
        blocks[-1].append(_instruction(statement, line, inline))
        if blocks[-1][-1].opcode.startswith(("bra", "ret")):
            blocks.append([])
    return Program(blocks, labels, bits, int(threads[1]), shared)


def _statements(body: str) -> Iterator[tuple[str, str, bool]]:
    """(label or instruction, line of the source that it comes from, whether it is inline assembly)."""
    line, inline = "", False
    for text in body.splitlines():
        code, _, comment = text.partition("//")
        if comment.strip() in ("begin inline asm", "end inline asm"):
            inline = comment.strip().startswith("begin")
        elif code.lstrip().startswith(".loc"):
            line = (re.search(r"[\w.]+:\d+", comment) or [""])[0]
        elif code.strip() not in "{}":  # the scope of inline assembly
            found = (part.strip() for part in code.split(";"))
            yield from ((part, line, inline) for part in found if part and not part.startswith("."))


def _instruction(statement: str, line: str, inline: bool) -> Instruction:
    negated, guard, opcode, rest = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", statement).groups()
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", rest)
    return Instruction(opcode, tuple(map(_operand, parts)), guard or "", not negated, line, inline)


def _operand(text: str):
    if text.startswith("{"):
        return re.findall(r"[^,\s{}]+", text)
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return base, int(offset or "0")
    return text

"""`mezo models`: what was proved of each model family."""

from dataclasses import dataclass

from mezo.cli.parsing import parse


@dataclass(frozen=True)
class Options:
    """List model families: what is trained by default, how they are scored, what a trunk cache keeps, and what SGLang
    does with them. Runs of the tests wrote the table; a family that is not in it is scored by its own forward pass."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parse(argv, "mezo models", Options)
    from mezo.models.proved import rows

    table = rows()
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    for *row, last in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), last]))
    return 0

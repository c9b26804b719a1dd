"""`mezo leaderboard`: its options, and what it prints."""

from dataclasses import dataclass
from typing import Annotated

from rich.table import Table

from mezo.cli.parsing import POSITIONAL, parse
from mezo.errors import UserError
from mezo.progress import console as new_console
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Print finished runs beside each other at what they cost: a row for each set of runs that differ in their seed
    alone, with mean (standard deviation) of its test figures, the rows it scored and its seconds."""

    runs: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Run directories."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo leaderboard", Options)
    if not options.runs:
        raise UserError("mezo leaderboard: give at least one run directory")
    starting()
    from mezo.report import leaderboard

    table = Table(*leaderboard.HEAD, show_header=True)
    for row in leaderboard.cells(leaderboard.leaderboard(options.runs)):
        table.add_row(*row)
    new_console(highlight=False).print(table)
    return 0

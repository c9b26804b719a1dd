"""`mezo report`: its options, and what it prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table

from mezo.cli.parsing import POSITIONAL, parse
from mezo.errors import UserError
from mezo.progress import console as new_console
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Print what finished runs did (results, noise, tokens, seconds by part), and write it with curves as a web page.

    The page is one file that opens offline: RUN/report.html, which a run writes at its end, or --html. Several runs
    share a page if --html names one.
    """

    runs: Annotated[tuple[str, ...], POSITIONAL] = ()
    """Run directories."""
    html: str = ""
    """The page; by default report.html in the run directory, of one run."""
    png: str = ""
    """Directory for the page's figures as PNG pictures, made if missing; pictures of the same names are replaced."""


def _print(console: Console, title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
    if not rows:
        return
    table = Table(*head, title=title, title_justify="left", show_header=bool(head))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo report", Options)
    if not options.runs:
        raise UserError("mezo report: give at least one run directory")
    starting()
    from mezo.report import page, tables

    console = new_console(highlight=False)
    if len(options.runs) > 1:
        names = page.names_of(options.runs)
        for title, (head, *rows) in page.beside(options.runs, names).items():
            _print(console, title, rows, head)
    for run in options.runs:
        if len(options.runs) > 1:
            console.print(f"\n{run}", style="bold", markup=False)
        for title, rows in tables.tables(run).items():
            head, rest = tables.headed(title, rows)
            _print(console, title, rest, head)
        for text in tables.warnings(run):
            console.print(f"warning: {text}", markup=False)
    if options.html or len(options.runs) == 1:
        path = Path(options.html) if options.html else Path(options.runs[0]) / "report.html"
        page.write(options.runs, path)
        console.print(f"page: {path}", soft_wrap=True, markup=False)
    if options.png:
        for path in page.write_pictures(options.runs, Path(options.png)):
            console.print(f"picture: {path}", soft_wrap=True, markup=False)
    return 0

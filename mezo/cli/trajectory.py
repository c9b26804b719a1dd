"""`mezo trajectory`: a run's log shown, checked or cut back."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mezo.cli.parsing import POSITIONAL, parse
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Show, check or cut back a run's log."""

    action: Annotated[Literal["show", "verify", "truncate"], POSITIONAL]
    """show: a summary; verify: that every line follows from the header and config; truncate: cut back to --step."""
    run: Annotated[str, POSITIONAL]
    """Run directory."""
    step: int = -1
    """Steps to keep, for truncate; what is cut off is kept in the run directory."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo trajectory", Options)
    starting()
    from mezo.run import logbook

    if options.action == "show":
        for label, text in logbook.summary(options.run).items():
            print(f"{label:<17} {text}")
    elif options.action == "verify":
        print(f"{options.run}: {logbook.verify(options.run)} steps, each follows from the header and config.json")
    else:
        kept = logbook.truncate(options.run, options.step)
        print(f"cut {options.run} back to {options.step} steps; what was there is in {kept}")
    return 0

"""`mezo trajectory`: a run's log shown, checked or cut back."""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class _TrajectoryOptions:
    """Show, check or cut back a run's log."""

    action: tyro.conf.Positional[Literal["show", "verify", "truncate"]]
    """show: a summary; verify: that every line follows from the header and config; truncate: cut back to --step."""
    run: tyro.conf.Positional[str]
    """Run directory."""
    step: int = -1
    """Steps to keep, for truncate; what is cut off is kept in the run directory."""


def main(argv: list[str]) -> int:
    options = tyro.cli(_TrajectoryOptions, args=argv, prog="mezo trajectory")
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

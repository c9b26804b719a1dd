"""`mezo replay`: what a run's log gives."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mezo.cli.parsing import POSITIONAL, parse
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Rebuild a run's adapter from its log alone, or its model from log and base model, bit for bit."""

    run: Annotated[str, POSITIONAL]
    """Run directory."""
    output_dir: str
    """Directory to create, of an adapter or a model."""
    until: str = "best"
    """best (what the run kept), last, or a number of steps."""
    model: str = ""
    """Where the base of a --tuning full run is now, if it was moved; it must be the same to the bit."""
    backend: Literal["auto", "reference", "numba", "triton"] = "auto"
    """Backend of the fused ops; auto goes by device."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo replay", Options)
    starting()
    from mezo.api import replay

    backend = None if options.backend == "auto" else options.backend
    steps = replay(options.run, options.output_dir, options.until, backend, options.model)
    print(f"replayed {steps} steps of {options.run} into {options.output_dir}")
    return 0

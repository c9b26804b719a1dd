"""`mezo replay`: what a run's log gives."""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class _ReplayOptions:
    """Rebuild a run's adapter from its log alone, or its model from log and base model, bit for bit."""

    run: tyro.conf.Positional[str]
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
    options = tyro.cli(_ReplayOptions, args=argv, prog="mezo replay")
    from mezo.api import replay

    backend = None if options.backend == "auto" else options.backend
    steps = replay(options.run, options.output_dir, options.until, backend, options.model)
    print(f"replayed {steps} steps of {options.run} into {options.output_dir}")
    return 0

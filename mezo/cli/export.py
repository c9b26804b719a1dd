"""`mezo export`: what a run kept, for others."""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class _ExportOptions:
    """Write a run's best adapter or model for others to use."""

    run: tyro.conf.Positional[str]
    """Run directory, or any adapter directory."""
    output_dir: str
    """Directory to create."""
    format: Literal["peft", "sglang", "merged"] = "peft"
    """peft: the adapter; sglang: the same in a form its --lora-paths takes; merged: base model and adapter in one, or
    the model that --tuning full trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the merged model; auto is that of the base checkpoint."""


def main(argv: list[str]) -> int:
    options = tyro.cli(_ExportOptions, args=argv, prog="mezo export")
    from mezo.run.export import export

    export(options.run, options.output_dir, options.format, options.dtype)
    print(f"exported {options.run} to {options.output_dir}")
    return 0

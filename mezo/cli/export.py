"""`mezo export`: what a run kept, for others."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mezo.cli.parsing import POSITIONAL, parse
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Write a run's best adapter or model for others to use."""

    run: Annotated[str, POSITIONAL]
    """Run directory, or any adapter directory."""
    output_dir: str
    """Directory to create."""
    format: Literal["peft", "sglang", "merged"] = "peft"
    """peft: the adapter; sglang: the same in a form its --lora-paths takes; merged: base model and adapter in one, or
    the model that --tuning full trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the merged model; auto is that of the base checkpoint."""
    trust_remote_code: bool = False
    """Run the code that the base brings, with your rights."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo export", Options)
    starting()
    from mezo.run.export import export

    export(options.run, options.output_dir, options.format, options.dtype, options.trust_remote_code)
    print(f"exported {options.run} to {options.output_dir}")
    return 0

"""`mezo demo`: a small model, film reviews, from download to result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mezo.cli.parsing import parse
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Fetch a small model and labelled film reviews, fine-tune the last layer, and check the result.

    The first time about 100 MB are downloaded; after that it works offline.
    """

    prompt: Literal["it-was", "sentiment"] = "it-was"
    """'{text} It was' with terrible / great, or 'Review: {text} Sentiment:' with negative / positive."""
    runtime: Literal["hf", "sglang"] = "hf"
    """What computes the losses."""
    preset: Literal["none", "few-steps"] = "few-steps"
    """few-steps: the options of `mezo train --preset few-steps`. none: MeZO as it was published, LoRA and one direction
    a step, 4000 steps, or 1000 with sglang, whose engine is made for GPUs."""
    steps: int = 0
    """Optimisation steps; 0 is those that the preset has."""
    output_dir: str = "runs/demo"
    """Run directory; an unfinished one is resumed, a finished one is kept and a numbered one made beside it."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = parse(argv, "mezo demo", Options)
    starting()
    from mezo.studies import demo

    return demo.run(options.prompt, options.steps, Path(options.output_dir), options.runtime, options.preset)

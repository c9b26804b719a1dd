"""`mezo eval`: scores of an adapter, or of a model without one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mezo.cli.parsing import POSITIONAL, given
from mezo.cli.showing import show_examples, show_splits
from mezo.config import Config
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Score a run, an adapter or a model alone on the given examples.

    `mezo eval RUN` needs no option; `mezo eval ADAPTER` and `mezo eval --model MODEL` need --task or files.
    """

    target: Annotated[str, POSITIONAL] = ""
    """Directory of a run, whose best step is scored on the run's own data, or of an adapter; none for the model
    alone."""
    config: str = ""
    """YAML file that may give any of the options below by name; flags win over it."""
    trust_reward: bool = False
    """Run the code of the reward that a run names, if its file is the one the run began with."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    options = {name: dataclasses.replace(option, marks=()) for name, option in Config.options().items()}
    values = given(argv or ["--help"], "mezo eval", Options, options)  # a run brings what a new one would require
    target = values.pop("target", "")
    starting()
    from mezo.api import evaluate_target

    trust = values.pop("trust_reward", False)
    splits = evaluate_target(values, Path(target) if target else None, trust, examples=True)
    show_splits(splits)
    show_examples(splits)
    return 0

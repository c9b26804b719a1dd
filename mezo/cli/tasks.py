"""`mezo tasks`: what --task takes."""

import json
from dataclasses import dataclass

from mezo.cli.parsing import parse


@dataclass(frozen=True)
class Options:
    """List what --task of mezo train and mezo eval takes: prompts, label words, and what is trained and reported."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parse(argv, "mezo tasks", Options)
    from mezo.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name}  (trains {task.objective}, reports {task.metric})")
        for kind, prompt in (("continues", task.prompt), ("fills a mask", task.masked)):
            if prompt:
                words = " ".join(map(repr, prompt.label_words)) or "each row's own options"
                print(f"    {kind:<12} {json.dumps(prompt.template, ensure_ascii=False)}  {words}")
    return 0

"""`mezo tasks`: what --task takes."""

import json

from mezo.errors import UserError


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    if argv:
        raise UserError(f"mezo tasks takes no options, got {argv[0]}")
    from mezo.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name}  (trains {task.objective}, reports {task.metric})")
        for kind, prompt in (("continues", task.prompt), ("fills a mask", task.masked)):
            if prompt:
                words = " ".join(map(repr, prompt.label_words)) or "each row's own options"
                print(f"    {kind:<12} {json.dumps(prompt.template, ensure_ascii=False)}  {words}")
    return 0

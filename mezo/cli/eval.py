"""`mezo eval`: scores of an adapter, or of a model without one."""

from pathlib import Path

from mezo.cli.parsing import parse
from mezo.cli.showing import show_splits
from mezo.errors import UserError

EVAL_USAGE = """usage: mezo eval RUN_OR_ADAPTER [data options of mezo train]
       mezo eval --model MODEL [data options of mezo train]

Scores an adapter, or a model without one, on the given splits. --num-demonstrations N puts N training examples with
their answers in front of each prompt (in-context learning)."""


def main(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(EVAL_USAGE)
        return 0 if argv else 2
    from mezo.api import evaluate, refuse_other_adapter, run_to_score
    from mezo.run.adapter import adapter_options

    if argv[0].startswith("-"):
        config = parse(argv, "mezo eval", {"output_dir": "unused"})
        refuse_other_adapter(config, {}, "the model alone")
        show_splits(evaluate(config, None))
        return 0
    target, rest = Path(argv[0]), argv[1:]

    if (target / "trajectory.jsonl").is_file():
        base, target = run_to_score(target)
    elif (target / "config.json").is_file():
        raise UserError(f"mezo eval {target}: that is a model: use mezo eval --model {target}")
    else:
        base = {"output_dir": "unused", **adapter_options(target)}
    config = parse(rest, "mezo eval", base)
    refuse_other_adapter(config, base, argv[0])
    show_splits(evaluate(config, target))
    return 0

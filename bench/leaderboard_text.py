"""LEADERBOARD.md from what its JSON files have."""

from collections.abc import Iterator, Mapping, Sequence

from leaderboard_rows import FILMS, TASKS, Row, Task

REACHED = 0.912  # the demo's AUC of dev, see demo.json
MEZO = ("mezo", "mezo-constant")  # rows that the others are held against


def page(
    made: Mapping[str, dict], rows: Mapping[str, Row], budgets: Sequence[int], encoder: tuple[dict, dict] | None = None
) -> Iterator[str]:
    """LEADERBOARD.md, by lines.

    Args:
        made: what JSON has of each task that there is.
        rows: of the table.
        budgets: scored rows that each row is to be tried with.
        encoder: what encoder_head.json has, and reproduce_small.json, if both are there.
    """
    films = made.get(FILMS) or {**next(iter(made.values())), "cells": {}}
    machine, cells = films["machine"], films["cells"]
    yield "# Leaderboard: accuracy at equal forward passes"
    yield ""
    yield (
        "What a budget of scored rows (an example under one copy of the weights is a row) buys on the demo's film"
        " reviews: SmolLM2-135M-Instruct restored from a 4-bit file, the last layer's query, output and MLP projections"
        " adapted, 512 examples to train on. Test accuracy and AUC as mean (standard deviation) over seeds; cosine"
        " schedule; lr by dev loss on another seed, from a grid of factors of two that grows at an end that wins. CPU:"
        f" {machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}; it was shared with"
        " much other work, so seconds are upper bounds and their ratios mean little. Rows that lose stay."
        " Made by `make leaderboard`, which does what is missing; `mezo leaderboard RUNS...` prints such a table from"
        " run directories. The prompts that lora_A is calibrated on count as scored rows. AdamW, by backpropagation"
        " through the same adapter, is the line to reach: a row of it is a"
        " forward pass and a pass back."
    )
    if cells:
        yield ""
        yield from _race(cells, rows)
    for task, found in made.items():
        if task != FILMS:
            yield ""
            yield from _further(TASKS[task], found["cells"])
    if encoder:
        yield ""
        yield from _encoder(*encoder)
    for budget in _budgets(cells):
        each = {name: own[str(budget)] for name, own in cells.items() if str(budget) in own}
        yield ""
        yield f"## {budget:,} scored rows"
        yield ""
        before = next(iter(each.values()))["before"]
        yield "| row | parameters | steps | lr | runs | test accuracy, % | test AUC | dev AUC | seconds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield f"| zero-shot | 0 | 0 | | | {100 * before['accuracy']:.1f} | {before['auc']:.3f} | | |"
        for row in sorted(each.values(), key=lambda row: row["auc"]["mean"]):
            lr = f"{row['lr']:g}{' (end of grid)' if row['lr_at_end_of_grid'] else ''}"
            figures = [_shown(row["accuracy"], 100, 1), _shown(row["auc"], 1, 3), _shown(row["dev_auc"], 1, 3)]
            facts = [row["title"], f"{row['parameters']:,}", f"{row['steps']:,}", lr, str(len(row["auc"]["of"]))]
            yield "| " + " | ".join([*facts, *figures, f"{row['seconds']['mean']:.1f}"]) + " |"
        for cpu, titles in _elsewhere(each, machine["cpu"]).items():
            yield ""
            yield f"Made on another machine ({cpu}), whose seconds are not to be held against the others: {titles}."
        missing = [row.title for name, row in rows.items() if name not in each]
        if missing and budget in budgets:  # others are a few rows alone
            yield ""
            yield f"Not made yet: {'; '.join(missing)}."
    if missing := [f"{budget:,}" for budget in budgets if budget not in _budgets(cells)]:
        yield ""
        yield f"Budgets not made yet: {' and '.join(missing)} scored rows."


def _budgets(cells: dict) -> list[int]:
    return sorted({int(budget) for own in cells.values() for budget in own})


def _elsewhere(cells: dict, cpu: str) -> dict[str, str]:
    """By CPU other than `cpu`, the titles of the rows that were made on it."""
    found: dict[str, list[str]] = {}
    for own in cells.values():
        if (other := own.get("cpu", cpu)) != cpu:  # older cells name none
            found.setdefault(other, []).append(own["title"])
    return {other: "; ".join(titles) for other, titles in found.items()}


def _further(task: Task, cells: dict) -> Iterator[str]:
    """A task beside the demo's: a line for each row, its budgets side by side."""
    budgets = _budgets(cells)
    title = task.title[0].upper() + task.title[1:]
    yield f"## {title}: {' and '.join(f'{budget:,}' for budget in budgets)} scored rows"
    yield ""
    yield f"{title} of the same study, split in the same way; {task.shown}."
    yield ""
    heads = [f"{budget:,} rows: {figure}" for budget in budgets for figure in ("accuracy, %", "AUC", "dev AUC")]
    yield "| " + " | ".join(["row", "runs", *heads]) + " |"
    yield "|---" * (2 + len(heads)) + "|"
    best = lambda own: own[max(own, key=int)]  # noqa: E731
    if cells:
        before = best(next(iter(cells.values())))["before"]
        zero = [f"{100 * before['accuracy']:.1f}", f"{before['auc']:.3f}", ""] * len(budgets)
        yield "| " + " | ".join(["zero-shot", "", *zero]) + " |"
    for own in sorted(filter(None, cells.values()), key=lambda own: best(own)["auc"]["mean"]):
        figures = [
            _shown(own[str(budget)][name], factor, digits) if str(budget) in own else ""
            for budget in budgets
            for name, factor, digits in (("accuracy", 100, 1), ("auc", 1, 3), ("dev_auc", 1, 3))
        ]
        yield "| " + " | ".join([best(own)["title"], str(len(best(own)["auc"]["of"])), *figures]) + " |"
    ends = [
        f"{each['title']} ({int(budget):,} rows)"
        for own in cells.values()
        for budget, each in own.items()
        if each["lr_at_end_of_grid"]
    ]
    yield ""
    yield "Steps, learning rates and seconds are in the JSON." + (
        f" The best lr lies at the end of what was tried: {'; '.join(ends)}." if ends else ""
    )


def _encoder(found: dict, beside: dict) -> Iterator[str]:
    """A linear head from zeros, beside what the encoder's part of `make reproduce-small` has at 512 a class."""
    cells, others = found["cells"], beside["encoder"]["shots"]["512"]
    budgets, first = _budgets(cells), next(iter(next(iter(cells.values())).values()))
    shown = {name: _shown(others[name]["accuracy"], 100, 1) for name in ("mezo", "adamw", "probe")}
    best = max(own[str(budgets[-1])]["accuracy"]["mean"] for own in cells.values())
    below = 100 * (others["adamw"]["accuracy"]["mean"] - best)
    yield "## An encoder with a linear head from zeros"
    yield ""
    yield (
        "all-MiniLM-L6-v2, film reviews, 512 a class. The head alone is trained, on the mean hidden states of the"
        " frozen encoder (`bench/encoder_head.py`, a study: `mezo train` calibrates no head). Test accuracy in %, mean"
        f" (standard deviation) over {len(first['accuracy']['of'])} samples of data,"
        f" {first['runs'] // len(first['accuracy']['of'])} runs each; lr by dev loss of other runs, from a grid of"
        f" {len(first['dev_loss_by_lr'])}. A calibrated head reads the mean and the principal directions of some"
        " training sentences, which count as rows."
    )
    yield ""
    yield "| row | " + " | ".join(f"{budget:,} rows" for budget in budgets) + " | logistic regression on the same |"
    yield "|---" * (2 + len(budgets)) + "|"
    for own in cells.values():
        values = [_shown(own[str(budget)]["accuracy"], 100, 1) for budget in budgets]
        last = own[str(budgets[-1])]
        yield (
            "| " + " | ".join([last["title"], *values, _shown(last["logistic regression"]["accuracy"], 100, 1)]) + " |"
        )
    yield ""
    yield (
        "By `make reproduce-small`, on the same data: MeZO on head and LoRA, 1,100 steps of batch 8 (17,600 rows),"
        f" {shown['mezo']}; AdamW on head and LoRA {shown['adamw']}; a linear probe on hidden states of length one"
        f" {shown['probe']}. The best head here is {below:.1f} points below AdamW. What stands between them is in"
        " [DESIGN.md](DESIGN.md)."
    )


def _shown(value: dict, factor: int, digits: int) -> str:
    std = "" if value["std"] is None else f" ({factor * value['std']:.{digits}f})"
    return f"{factor * value['mean']:.{digits}f}{std}"


def reached(cells: dict) -> dict[str, dict]:
    """By name, the cell of the smallest budget with which a row's mean AUC of dev is that of the demo."""
    found = {}
    for name, own in cells.items():
        good = [int(budget) for budget, each in own.items() if each["dev_auc"]["mean"] >= REACHED]
        if good:
            found[name] = own[str(min(good))]
    return found


def _race(cells: dict, rows: Mapping[str, Row]) -> Iterator[str]:
    """The smallest budgets that reach the demo, beside that of MeZO."""
    found = reached(cells)
    mezo = min((found[n] for n in found if n in MEZO), key=lambda each: each["rows"], default=None)
    yield f"## The smallest budget that reaches the demo's dev AUC of {REACHED}"
    yield ""
    yield (
        "Mean over the seeds, of the budgets that were tried (each with its own lr and schedule). The ratios are those"
        " of MeZO, with the better of its two schedules, to the row; they are coarse where the budgets are."
    )
    yield ""
    yield "| row | rows scored | steps | seconds | times fewer rows | times fewer steps | times faster |"
    yield "|---|---|---|---|---|---|---|"
    for each in sorted(found.values(), key=lambda each: (each["rows"], each["steps"])):
        values = (each["rows"], each["steps"], each["seconds"]["mean"])
        of_mezo = (mezo["rows"], mezo["steps"], mezo["seconds"]["mean"]) if mezo else ()
        ratios = [f"{theirs / ours:.1f}" for theirs, ours in zip(of_mezo, values, strict=False)] or [""] * 3
        if mezo and each.get("cpu") != mezo.get("cpu"):
            ratios[-1] = "another machine"
        yield f"| {each['title']} | {values[0]:,} | {values[1]:,} | {values[2]:.1f} | {' | '.join(ratios)} |"
    if others := [row.title for name, row in rows.items() if name in cells and name not in found]:
        yield ""
        yield f"Not reached by the budgets that were tried: {'; '.join(others)}."

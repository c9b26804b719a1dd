"""Results as tables in a terminal."""

from rich.table import Table

from mezo.progress import console as new_console


def show_result(result: dict, run: str = "RUN") -> None:
    """Print what result.json says of a run.

    Args:
        result: its content.
        run: directory of the run, for the commands.
    """
    from mezo.report.tables import time_spent  # brings torch, which --help does without
    from mezo.report.verdict import verdicts

    for split in ("train", "test"):
        if split in result:
            show_splits({f"{split} before": result[split]["before"], f"{split} after": result[split]["after"]})
    console = new_console()
    best, steps, seconds = result["best_step"], result["steps"], result["seconds_training"]
    console.print(f"best step {best} of {steps}; {seconds:.1f} s of steps, {result['steps_per_second']:.1f} steps/s")
    scored, reused = result["tokens_scored"], result["tokens_reused"]
    console.print(f"{scored:,} tokens scored, {reused:,} of them reused; {result['skipped_steps']} steps skipped")
    table = Table("time", "", "", "", "", show_header=False)
    for row in time_spent(result):
        table.add_row(*row)
    console.print(table)
    for text in verdicts(result, run):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if "checked_steps" in result:
        console.print(
            f"the run is finished; its log gives what it kept, bit for bit ({result['checked_steps']} steps replayed)"
        )


def show_splits(splits: dict[str, dict]) -> None:
    """Print a table with a line for each split, from its figures by name."""
    names = {"accuracy": "accuracy", "auc": "AUC", "f1": "F1", "exact_match": "exact match", "reward": "reward"}
    keys = [key for key in (*names, "loss") if any(key in row for row in splits.values())]
    table = Table("split", *(names.get(key, key) for key in keys))
    for split, row in splits.items():
        cells = ("-" if row.get(key) is None else f"{row[key]:.4f}" for key in keys)
        table.add_row(split, *cells)
    new_console().print(table)


def show_examples(splits: dict[str, dict]) -> None:
    """Print what evaluations show of single examples: texts, answers by class, the surest mistakes."""
    from mezo.report import samples  # brings torch

    console = new_console(highlight=False)
    for split, row in splits.items():
        names = samples.class_names(row)
        found = {
            f"texts of {split}": samples.texts(text=row),
            f"answers on {split}": samples.answered(row, names),
            f"mistakes on {split} it is surest of": samples.mistakes(row, names),
        }
        for title, (head, *rows) in ((title, rows) for title, rows in found.items() if rows):
            table = Table(*head, title=title, title_justify="left")
            for cells in rows:
                table.add_row(*cells)
            console.print(table)

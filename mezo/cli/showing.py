"""Results as tables in a terminal."""

from rich.console import Console
from rich.table import Table


def show_result(result: dict) -> None:
    """Print what result.json says of a run."""
    from mezo.report.tables import time_spent  # brings torch, which --help does without

    for split in ("train", "test"):
        if split in result:
            show_splits({f"{split} before": result[split]["before"], f"{split} after": result[split]["after"]})
    console = Console()
    best, steps, seconds = result["best_step"], result["steps"], result["seconds_training"]
    console.print(f"best step {best} of {steps}; {seconds:.1f} s of steps, {result['steps_per_second']:.1f} steps/s")
    scored, reused = result["tokens_scored"], result["tokens_reused"]
    console.print(f"{scored:,} tokens scored, {reused:,} of them reused; {result['skipped_steps']} steps skipped")
    table = Table("time", "", "", "", "", show_header=False)
    for row in time_spent(result):
        table.add_row(*row)
    console.print(table)
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
    Console().print(table)

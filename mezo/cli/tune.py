"""`mezo tune`: its options, and what it prints."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

from rich.table import Table

from mezo.cli.parsing import given
from mezo.config import Config
from mezo.config.options import flag_of
from mezo.errors import UserError
from mezo.progress import console as new_console
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Choose lr and eps for a run: all its options as for `mezo train`, and --output-dir for the sweep.

    lr and eps are estimated from the noise and the curvature of the loss, then short runs around them are compared by
    dev loss (by Optuna); a run goes on after a rung if it is in the better half of those before it. --resume DIR,
    alone, continues a sweep.
    """

    config: str = ""
    """YAML file that may give any of the options below by name; flags win over it."""
    resume: str = ""
    """Directory of a sweep that was stopped: it goes on; no other option may be given beside it."""
    grid_lr: tuple[float, ...] = ()
    """Learning rates to try; by default they are sought from a tenth of the estimated one to ten times it."""
    grid_eps: tuple[float, ...] = ()
    """Perturbation scales to try; by default they are sought from a third of the estimated one to three times it."""
    rungs: int = 3
    """Comparisons of trials, each after twice the steps of the one before."""
    trial_steps: int = 0
    """Steps of the last rung; 0 is a quarter of --steps."""
    num_trials: int = 0
    """Trials; 0 is 8, or every pair where both grids are given."""
    trust_reward: bool = False
    """With --resume: run the code of the reward that the sweep names, if its file is the one the sweep began with."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    values = given(argv, "mezo tune", Options, Config.options())
    path, trust = values.pop("resume", ""), values.pop("trust_reward", False)
    reward = values.pop("reward", "") if path else ""
    if path and values:
        raise UserError(
            f"mezo tune --resume {path} takes no other option, got {flag_of(next(iter(values)))}: the plan is fixed"
        )
    options = {field.name: values.pop(field.name) for field in fields(Options) if field.name in values}
    if values.get("adapter"):
        starting()
        from mezo.run.adapter import with_base

        values = with_base(values)
    config = None if path else Config.of(**values)
    starting()
    from mezo.studies import tune

    result = tune.resume(path, reward, trust) if path else tune.tune(config, **options)
    if result is None:
        return 130
    _show(result, tune.edges)
    return 0


def _show(result: dict, edges: Callable[[dict, list[dict]], list[str]]) -> None:
    console, estimate = new_console(highlight=False), result["estimate"]
    if estimate:
        lr = "none, the loss curves down" if estimate["lr"] is None else f"{estimate['lr']:g}"
        console.print(
            f"estimated at the start: eps {estimate['eps']:g}, lr {lr} (loss {estimate['loss']:.4f} with noise"
            f" {estimate['loss_noise']:.2g}, slope {estimate['slope']:.3g}, curvature {estimate['curvature']:.3g})"
        )
    figures = [key for key in result["best"] if key.startswith("dev_")]
    table = Table("rung", "lr", "eps", "steps", *(key.replace("_", " ") for key in figures))
    for row in result["rungs"]:
        shown = (str(row["rung"] + 1), f"{row['lr']:g}", f"{row['eps']:g}", str(row["steps"]))
        values = ["-" if row[key] is None else f"{row[key]:.4f}" for key in figures]
        table.add_row(*shown, *(values if row["failed"] is None else ["failed"]))
    console.print(table)
    for text in edges(result["best"], result["rungs"]):
        console.print(text, soft_wrap=True)
    print(result["command"], file=sys.stdout)

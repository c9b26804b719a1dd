"""Runs side by side at what they cost: test figures as mean and deviation over seeds, for the rows they scored."""

import statistics
from collections.abc import Sequence

from mezo.config import Config
from mezo.config.options import RESUMABLE, shown
from mezo.report.tables import finished

FIGURES = ("accuracy", "auc", "loss")
LEFT_OUT = {"seed", "output_dir", "report", "noise"}
"""Options in which the runs of one row may differ, beside those that a resumed run may have otherwise."""


def rows_scored(config: Config, trained_on: int | None = None) -> int:
    """Rows that the forward passes of a run score in training, of examples with one row each, and calibrate with.

    Args:
        config: the run's.
        trained_on: examples of its training set; None: no fewer than it calibrates with at most.

    >>> rows_scored(Config.of(model="m", output_dir="o", task="sst2", batch_size=32, directions=8, steps=100))
    6400
    """
    method, tuning = config.method, config.model.tuning
    calibrated = tuning.calibration_examples if getattr(tuning, "lora_a", "") == "calibrated" else 0
    calibrated = calibrated if trained_on is None else min(calibrated, trained_on)
    return calibrated + method.steps * method.batch_size * method.rule.passes(method.num_perturbations)


def leaderboard(runs: Sequence[str]) -> list[dict]:
    """A row for each set of runs that differ in their seed alone, the best mean test AUC (else accuracy) first.

    Args:
        runs: directories of finished runs that scored test examples.
    Returns:
        Of each row: `options` that tell it from the others, `rows` scored, `steps`, `seeds`, `seconds` of training, and
        by figure of the test set, and `dev_auc`, {"mean", "std"}; std is None of one run.
    Raises:
        UserError: a run is not finished.
    """
    groups: dict[tuple, list] = {}
    for run in runs:
        directory = finished(run)
        config = directory.read_config()
        told = {o.name for o in Config.options().values() if RESUMABLE not in o.marks} - LEFT_OUT
        key = tuple((name, value) for name, value in config.to_dict().items() if name in told)
        groups.setdefault(key, []).append((config, directory.read_result(), directory.read_metrics()))
    differing = {name for one in groups for name, value in one if any(dict(each).get(name) != value for each in groups)}
    rows = [_row(dict(key), members, differing) for key, members in groups.items()]
    return sorted(rows, key=lambda row: -(row.get("auc") or row.get("accuracy") or {"mean": 0.0})["mean"])


def _row(options: dict, members: list, differing: set[str]) -> dict:
    config = members[0][0]
    dev = [[line["auc"] for line in metrics if line.get("is_best")][-1:] for _, _, metrics in members]
    values = {
        figure: [result["test"]["after"][figure] for _, result, _ in members if result.get("test")]
        for figure in FIGURES
    }
    values["dev_auc"] = [found[0] for found in dev if found]
    row = {
        "options": {name: value for name, value in options.items() if name in differing},
        "rows": rows_scored(config, members[0][1].get("examples", {}).get("train")),
        "steps": config.method.steps,
        "seeds": sorted(config.method.seed for config, _, _ in members),
        "seconds": statistics.mean(result["seconds_training"] for _, result, _ in members),
    }
    return row | {name: mean(numbers) for name, numbers in values.items() if numbers and None not in numbers}


def mean(values: Sequence[float]) -> dict:
    """Mean and standard deviation.

    >>> mean([1.0, 3.0])
    {'mean': 2.0, 'std': 1.4142135623730951, 'of': [1.0, 3.0]}
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "of": list(values)}


def cells(rows: Sequence[dict]) -> list[list[str]]:
    """The rows as texts under `HEAD`."""
    return [
        [
            ", ".join(f"{name} {shown(value)}" for name, value in row["options"].items()) or "(all alike)",
            f"{row['rows']:,}",
            f"{row['steps']:,}",
            str(len(row["seeds"])),
            *(_figure(row.get(name), digits) for name, digits in (("accuracy", 1), ("auc", 3), ("dev_auc", 3))),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]


HEAD = ("options", "rows scored", "steps", "runs", "test accuracy, %", "test AUC", "dev AUC", "seconds")


def _figure(value: dict | None, digits: int) -> str:
    if value is None:
        return ""
    factor = 100 if digits == 1 else 1
    std = "" if value["std"] is None else f" ({factor * value['std']:.{digits}f})"
    return f"{factor * value['mean']:.{digits}f}{std}"

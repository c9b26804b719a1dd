"""What is looked at between steps: dev, test and train scores, the instruments, which step was best."""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from mezo.config import Machine, Method
from mezo.data.answers import METRICS, best
from mezo.data.example import Example
from mezo.data.rewards import Judge
from mezo.method.objectives import evaluate, predictions, standard_error
from mezo.progress import EVERY, told
from mezo.report.monitor import Monitor
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.run.files import write_line
from mezo.run.trajectory import StepRecord
from mezo.runtimes.base import Runtime, Serves
from mezo.training.clock import Clock
from mezo.training.details import Decode, answers, texts
from mezo.training.instruments import Instruments
from mezo.training.measurement import Measurement

TENTHS = 10


class Evaluations:
    """Rows of metrics.jsonl, made when they are due; the best theta is kept.

    Args:
        method, machine: groups of the run's configuration.
        runtime: at theta of the step that is evaluated.
        splits: examples; `decode` of `Splits` gives the texts that are shown.
        judges: of generated text, by the name that a row has.
        run: its directory.
        done: steps done already.
        clock: its totals go into every row.
        measurement: of a step's losses, for the instruments.
    """

    def __init__(
        self,
        method: Method,
        machine: Machine,
        runtime: Runtime,
        splits: dict[str, Sequence[Example]],
        judges: dict[str, Judge],
        run: RunDirectory,
        done: int,
        clock: Clock,
        measurement: Measurement,
    ):
        self.method, self.machine, self.runtime, self.run = method, machine, runtime, run
        self.splits, self.judges, self.decode = splits, judges, getattr(splits, "decode", None)
        self.clock, self.instruments = clock, Instruments(method, runtime, measurement, clock)
        self.metrics = [row for row in run.read_metrics() if row["step"] <= done]
        self.every = evaluation_interval(method)

    def due(self, step: int) -> bool:
        """Whether anything is to be looked at after so many steps."""
        return step % self.every == 0 or step == self.method.steps

    def make(self, records: Sequence[StepRecord], monitor: Monitor) -> None:
        """Evaluate dev, and test and train before the first step; keep theta if it is the best."""
        step = len(records)
        if step == 0:
            for split in self._before_and_after():
                self.evaluate(split, step, monitor)
        known = {row["split"] for row in self.metrics if row["step"] == step}
        if "dev" in self.splits and "dev" not in known:
            self.evaluate("dev", step, monitor)
        for row in self.instruments.rows(records, self.metrics):
            self.log(row)
            monitor.instrument(row)

    def evaluate(self, split: str, step: int, monitor: Monitor) -> dict:
        """Score a split at theta; return its row, which is on the disk."""
        with self.clock.measuring("evaluation"):
            figures = evaluate_split(
                self.method, self.machine, self.runtime, split, self.splits[split], self.judges, self.decode
            )
            row = {"step": step, "split": split, **figures}
            if split == "dev":
                row["is_best"] = self._beats(row)
                if row["is_best"]:
                    outcome.save(self.run, self.runtime)
        self.log(row)
        monitor.evaluation(row)
        if row.get("is_best") and isinstance(self.runtime, Serves):
            self.runtime.promote(step)
        return row

    def _before_and_after(self) -> list[str]:
        splits = ["test", "train"] if self.method.eval_train else ["test"]
        known = {row["split"] for row in self.metrics}
        return [split for split in splits if split in self.splits and split not in known]

    def log(self, row: dict) -> None:
        """Add a row, on the disk before any later step is."""
        row["clock"] = self.clock.row()
        self.metrics.append(row)
        with open(self.run.metrics, "ab") as file:
            write_line(file.fileno(), json.dumps(row, allow_nan=False) + "\n")
            os.fsync(file.fileno())

    def _beats(self, row: dict) -> bool:
        """Whether a row of dev is the first or `beats` the best before it; never a NaN."""
        earlier = [r for r in self.metrics if r["split"] == "dev" and r["step"] < row["step"]]
        best = [r for r in earlier if r["is_best"]]
        if not best:
            return row[best_by(self.method)[1]] is not None
        return beats(row, best[-1], self.method, len(self.splits["dev"]))


def beats(row: dict, best: dict, method: Method, n: int) -> bool:
    """Whether an evaluation of dev is better than the best before it, by what the run is for (`best_by`).

    Under the default an accuracy that differs by no more than its standard error decides nothing, the loss does: of
    150 examples the best of ten accuracies is mostly luck.

    Args:
        row, best: of metrics.jsonl.
        method: of the run.
        n: examples of dev.

    >>> rows = [{"accuracy": 0.50, "loss": 0.7}, {"accuracy": 0.53, "loss": 0.8}, {"accuracy": 0.53, "loss": 0.6}]
    >>> [beats(row, rows[0], Method(), 150) for row in rows], beats(rows[1], rows[0], Method(), 1500)
    ([False, False, True], True)
    """
    sign, key = best_by(method)
    if row[key] is None:
        return False
    gain = sign * (row[key] - best[key])
    strict = key != "accuracy" or method.best_metric != "auto" or "accuracy" in method.objectives
    if strict or None in (row["loss"], best["loss"]):
        return gain > 0
    error = standard_error(max(row[key], best[key]), n)
    return gain > error or (gain >= -error and row["loss"] < best["loss"])


def evaluation_interval(method: Method) -> int:
    """Steps from one evaluation to the next."""
    return method.eval_every or max(1, method.steps // TENTHS)


def best_by(method: Method) -> tuple[int, str]:
    """Which figure of dev chooses the best step, and its sign: 1 where more is better.

    Unless the run asks for another: the reward if one is trained, F1 where text is generated, the loss where the
    objective has no options to be right about, else the accuracy.
    """
    if method.best_metric != "auto":
        return (-1, "loss") if method.best_metric == "loss" else (1, "accuracy")
    if "reward" in method.objectives:
        return 1, "reward"
    if method.generates:
        return 1, "f1"
    return (-1, "loss") if "lm_cross_entropy" in method.objectives else (1, "accuracy")


def evaluate_split(
    method: Method,
    machine: Machine,
    runtime: Runtime,
    split: str,
    examples: Sequence[Example],
    judges: dict[str, Judge],
    decode: Decode | None = None,
) -> dict[str, Any]:
    """Everything that is reported of a split at theta.

    Args:
        method, machine: groups of the run's configuration.
        runtime: with the examples prepared.
        split: name of the split.
        examples: all of it.
        judges: of generated text, by the name of the figure.
        decode: from token ids to the text of a prompt that is shown.

    Returns:
        What `details.py` shows of single examples, and figures as `evaluate` gives them; where the options are answers
        with names f1 and exact_match are those of the chosen one, and accuracy takes every right one; where text is
        generated, the mean of what each judge says of it.
    """
    size, n = machine.eval_batch_size or method.batch_size, len(examples)
    figures, shown = dict.fromkeys(("accuracy", "loss", "f1", "auc")), {}
    if all(example.options for example in examples):
        scores = score_split(runtime, split, n, size)
        alone = "lm_cross_entropy" in method.objectives or scores.shape[1] == 1
        labels = torch.tensor([example.label for example in examples])
        figures = evaluate(scores, labels, "lm_cross_entropy" if alone else "cross_entropy")
        if all(example.names for example in examples) and figures["accuracy"] is not None:
            figures |= _of_named_options(scores, examples)
        shown = answers(scores, examples, decode)
    if judges:
        parts = [range(i, min(n, i + size)) for i in range(0, n, size)]
        outputs = [
            text
            for part in told(parts, f"texts of {split}, batches", EVERY)
            for text in runtime.generate(split, part, method.max_new_tokens, method.stops)
        ]
        verdicts = {name: list(map(judge, examples, outputs)) for name, judge in judges.items()}
        figures |= {name: sum(values) / n for name, values in verdicts.items()}
        shown |= texts(examples, outputs, verdicts, decode)
    return figures | shown


def _of_named_options(scores: torch.Tensor, examples: Sequence[Example]) -> dict[str, float]:
    """As ReCoRD is judged: the chosen option's name against every right one (Zhang et al. 2018, arXiv 1810.12885)."""
    chosen = [example.names[i] for example, i in zip(examples, predictions(scores).tolist(), strict=True)]
    pairs, n = list(zip(chosen, examples, strict=True)), len(examples)
    means = {
        k: sum(best(metric, name, example.references) for name, example in pairs) / n for k, metric in METRICS.items()
    }
    return {"accuracy": sum(name in example.references for name, example in pairs) / n, **means}


def score_split(runtime: Runtime, split: str, n: int, size: int) -> torch.Tensor:
    """Option scores of all examples of a split at theta, float64 (n, options), padded with -inf to one width.

    Args:
        runtime: with the examples prepared.
        split: its name.
        n: examples of the split.
        size: examples scored at a time.
    """
    batches = [range(i, min(n, i + size)) for i in range(0, n, size)]
    parts = [runtime.score(split, batch) for batch in told(batches, f"scoring {split}, batches", EVERY)]
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])

"""What is looked at between steps: dev, test and train scores, the instruments, which step was best."""

import json
import os
from collections.abc import Sequence

import torch

from mezo.checkpoint import RunDirectory, save_adapter
from mezo.clock import Clock
from mezo.config import Config
from mezo.instruments import Instruments
from mezo.measurement import Measurement
from mezo.monitor import Monitor
from mezo.objectives import evaluate
from mezo.runtimes.base import Runtime
from mezo.trajectory import StepRecord, write_line

TENTHS = 10


class Evaluations:
    """Rows of metrics.jsonl, made when they are due; the best adapter is kept.

    Args:
        config: the run's.
        runtime: at theta of the step that is evaluated.
        labels: of each split's examples.
        run: its directory.
        done: steps done already.
        clock: its totals go into every row.
        measurement: of a step's losses, for the instruments.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        labels: dict[str, torch.Tensor],
        run: RunDirectory,
        done: int,
        clock: Clock,
        measurement: Measurement,
    ):
        self.config, self.runtime, self.labels, self.run = config, runtime, labels, run
        self.clock, self.instruments = clock, Instruments(config, runtime, measurement, clock)
        self.metrics = [row for row in run.read_metrics() if row["step"] <= done]
        self.every = config.eval_every or max(1, config.steps // TENTHS)

    def due(self, step: int) -> bool:
        """Whether anything is to be looked at after so many steps."""
        return step % self.every == 0 or step == self.config.steps

    def make(self, records: Sequence[StepRecord], monitor: Monitor) -> None:
        """Evaluate dev, and test and train before the first step; keep the adapter if it is the best."""
        step = len(records)
        if step == 0:
            for split in self._before_and_after():
                self.evaluate(split, step, monitor)
        known = {row["split"] for row in self.metrics if row["step"] == step}
        if "dev" in self.labels and "dev" not in known:
            self.evaluate("dev", step, monitor)
        for row in self.instruments.rows(records, self.metrics):
            self.log(row)
            monitor.instrument(row)

    def evaluate(self, split: str, step: int, monitor: Monitor) -> dict:
        """Score a split at theta; return its row, which is on the disk."""
        with self.clock.measuring("evaluation"):
            size = self.config.eval_batch_size or self.config.batch_size
            scores = score_split(self.runtime, split, len(self.labels[split]), size)
            row = {"step": step, "split": split, **evaluate(scores, self.labels[split], self.config.objective)}
            if split == "dev":
                row["is_best"] = self._beats(row)
                if row["is_best"]:
                    save_adapter(self.run.adapter, self.runtime.spec.peft, self.runtime.theta())
        self.log(row)
        monitor.evaluation(row)
        return row

    def _before_and_after(self) -> list[str]:
        splits = ["test", "train"] if self.config.eval_train else ["test"]
        known = {row["split"] for row in self.metrics}
        return [split for split in splits if split in self.labels and split not in known]

    def log(self, row: dict) -> None:
        """Add a row, on the disk before any later step is."""
        row["clock"] = self.clock.row()
        self.metrics.append(row)
        with open(self.run.metrics, "ab") as file:
            write_line(file.fileno(), json.dumps(row, allow_nan=False) + "\n")
            os.fsync(file.fileno())

    def _beats(self, row: dict) -> bool:
        """Higher dev accuracy, or lower dev loss where the objective has no options to be right about; never a NaN."""
        sign, key = (-1, "loss") if self.config.objective == "lm_cross_entropy" else (1, "accuracy")
        others = [r[key] for r in self.metrics if r["split"] == "dev" and r["step"] < row["step"]]
        return row[key] is not None and all(sign * row[key] > sign * other for other in others if other is not None)


def score_split(runtime: Runtime, split: str, n: int, size: int) -> torch.Tensor:
    """Option scores of all n examples of a split at theta, `size` at a time, padded with -inf to one width."""
    parts = [runtime.score(split, range(i, min(n, i + size))) for i in range(0, n, size)]
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])

"""A linear head from zeros on a frozen encoder's mean hidden states, by forward passes alone: what calibration gains.

The head is R A: A stays, R is trained from zero, with a direction for each example of a batch. A plain A is the
identity, so R is the head of `--head linear`. A calibrated A has directions of what the head is given, the mean and the
principal ones beside it, each as large as the others (mezo/models/calibration.py); no label is read for it. It is a
study: `mezo train` calibrates what is beside linear layers, not a head. The sentences are those of the encoder's part
of `make reproduce-small` at 512 a class, whose figures with MeZO, AdamW and a linear probe stand beside. The encoder is
run once for every sentence, since nothing below the head is trained; rows are counted as if it were run each time.

Run: python bench/encoder_head.py --output JSON
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import describe
from reproduce_decoder import SEEDS, SHOTS, load
from reproduce_encoder import config_of, features, labels, start_of
from sklearn.linear_model import LogisticRegression

from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy, evaluate
from mezo.method.schedule import learning_rate
from mezo.models.calibration import Sketch
from mezo.report.leaderboard import mean
from mezo.runtimes.calibration import some_of

BUDGETS = (5_000, 20_000, 100_000)
EVALUATIONS = 20
EPS = 0.1
LRS = tuple(0.4 / 2**k for k in range(8))
FIRST = 0  # seed of the run that an lr is chosen on; others are reported
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # C of logistic regression on the same directions
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Row:
    """A head and how it is trained.

    Args:
        title: for people.
        batch: examples a step.
        r: directions of a calibrated A; 0: the identity.
        examples: that A is calibrated on; they count as scored rows.
        alone: a direction for each example; else one for all.
    """

    title: str
    batch: int
    r: int = 0
    examples: int = 0
    alone: bool = True


ROWS = {
    "plain-1": Row("head, one direction a step, batch 32", 32, alone=False),
    "plain-128": Row("head, a direction an example, batch 128", 128),
    **{f"calibrated{r}-{n}": Row(f"head, calibrated on {n:,}, r {r}, a direction an example, batch 128", 128, r, n)
       for r, n in ((16, 256), (24, 256), (16, 1024), (24, 1024))},
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """What the head is given of the sentences of one data seed, (examples, hidden_size), and their labels, by split."""

    x: dict[str, torch.Tensor]
    y: dict[str, torch.Tensor]

    def through(self, row: Row) -> dict[str, torch.Tensor]:
        """x A' by split."""
        if not row.r:
            return self.x
        sketch = Sketch(row.r)
        sketch.add(self.x["train"][some_of(len(self.x["train"]), row.examples)])
        a = sketch.even()
        return {split: x @ a.T for split, x in self.x.items()}


def given(scratch: Path) -> dict[int, Given]:
    """By data seed, what the bare encoder gives."""
    found, base = {}, config_of(scratch)
    for seed in SEEDS:
        config = base.replace(**SHOTS[512], data_seed=seed, seed=seed, steps=1, output_dir=str(scratch / str(seed)))
        runtime, splits = load(config)
        theta = start_of(config, runtime, splits)
        x = {split: torch.from_numpy(features(runtime, theta, splits[split])) for split in SPLITS}
        found[seed] = Given(x, {split: torch.tensor(labels(splits[split])) for split in SPLITS})
    return found


def trained(row: Row, own: Given, budget: int, lr: float, seed: int) -> dict:
    """A run: figures of test and loss of dev at the evaluation of dev with the least loss."""
    x, y, began = own.through(row), own.y, time.process_time()
    generator = torch.Generator().manual_seed(seed)
    steps = (budget - row.examples) // (2 * row.batch)
    batches, best = Batches(len(y["train"]), row.batch, seed), {"dev_loss": float("inf")}
    head = torch.zeros(2, x["train"].shape[1])
    for step in range(steps):
        batch = batches(step)
        z = torch.randn(row.batch if row.alone else 1, *head.shape, generator=generator)
        plus, minus = (_losses(head + sign * EPS * z, x["train"][batch], y["train"][batch]) for sign in (1, -1))
        # estimate = mean over the examples of (l_i(head + eps z_i) - l_i(head - eps z_i)) / (2 eps) z_i
        grads = (plus - minus) / (2 * EPS)
        estimate = (grads[:, None, None] * z).mean(0)
        head = head - learning_rate(step, steps, lr, "cosine", 0) * estimate
        if (step + 1) % max(1, steps // EVALUATIONS) == 0:
            loss = cross_entropy((x["dev"] @ head.T).double(), y["dev"]).item()
            if loss < best["dev_loss"]:
                best = {"dev_loss": loss, "head": head}
    measured = evaluate((x["test"] @ best.pop("head").T).double(), y["test"])
    return best | {name: measured[name] for name in ("accuracy", "auc")} | {"seconds": time.process_time() - began}


def _losses(heads: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each example under its head, or that of all: (examples,)."""
    scores = (heads @ x[:, :, None])[:, :, 0]
    return -scores.log_softmax(-1).gather(1, y[:, None])[:, 0]


def by_gradients(row: Row, own: Given) -> dict:
    """Logistic regression on what R is given, its C chosen by dev loss."""
    x, tried = own.through(row), []
    for strength in STRENGTHS:
        fitted = LogisticRegression(max_iter=5000, C=strength).fit(x["train"], own.y["train"])
        margin = {split: torch.from_numpy(fitted.decision_function(x[split])) for split in ("dev", "test")}
        scores = {split: torch.stack([-m / 2, m / 2], -1) for split, m in margin.items()}
        tried.append((cross_entropy(scores["dev"], own.y["dev"]).item(), evaluate(scores["test"], own.y["test"])))
    measured = min(tried, key=lambda each: each[0])[1]
    return {name: measured[name] for name in ("accuracy", "auc")}


def cell(row: Row, budget: int, data: dict[int, Given], seeds: int) -> dict:
    """A row at a budget: lr by the mean loss of dev over data seeds, then means over data seeds of means over runs."""
    losses = {
        lr: mean([trained(row, own, budget, lr, FIRST)["dev_loss"] for own in data.values()])["mean"] for lr in LRS
    }
    lr = min(losses, key=losses.__getitem__)
    runs = [[trained(row, own, budget, lr, FIRST + 1 + k) for k in range(seeds)] for own in data.values()]
    each = lambda name: mean([mean([run[name] for run in own])["mean"] for own in runs])  # noqa: E731
    gradients = [by_gradients(row, own) for own in data.values()]
    return {
        "title": row.title,
        "rows": budget,
        "runs": len(data) * seeds,
        "lr": lr,
        "dev_loss_by_lr": losses,
        **{name: each(name) for name in ("accuracy", "auc", "seconds")},
        "logistic regression": {name: mean([own[name] for own in gradients]) for name in ("accuracy", "auc")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rows that are missing; write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; rows that are there stay")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each of the five data seeds")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        data = given(Path(scratch))
    cells = json.loads(options.output.read_text())["cells"] if options.output.exists() else {}
    for name, row in ROWS.items():
        if name not in cells:
            cells[name] = {str(budget): cell(row, budget, data, options.seeds) for budget in BUDGETS}
            options.output.write_text(json.dumps({"machine": describe(), "cells": cells}, indent=1))
            print(json.dumps({name: cells[name]}), flush=True)


if __name__ == "__main__":
    main()

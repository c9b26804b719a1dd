"""Accuracy at equal forward passes: ways to estimate and to step, each with its own lr, on the demo's film reviews.

A cell is a row of the table at a budget of scored rows. Its learning rate is chosen by dev loss on one seed, from a
grid of factors of two that grows at an end that wins; other seeds are then reported. Every run is an ordinary run
directory under --runs, whose log replays; a cell that is there is not run again, so the table can be made in parts.
AdamW, which has gradients, is the line to reach; its runs are a file each.

Run: make leaderboard, or python bench/leaderboard.py --runs RUNS --output JSON --markdown LEADERBOARD.md [--rows ...]
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import figures
import torch
from machine import describe

from mezo.api import carry_on, start
from mezo.config import Config
from mezo.errors import Diverged
from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy
from mezo.method.schedule import learning_rate
from mezo.models.load import load_tokenizer
from mezo.report.leaderboard import FIGURES, mean, rows_scored
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.hf.trunk import Trunk
from mezo.runtimes.rows import RowBatch
from mezo.studies import demo
from mezo.tasks import load_splits
from mezo.training.evaluation import evaluate_split
from mezo_kernels import lora_init

FIRST = 0  # the seed that a learning rate is chosen on; others are reported
BUDGETS = (5_000, 20_000, 100_000)
EVALUATIONS = 5  # of a run, on dev; the best one is kept
GROWTH = 3  # times that a grid may grow at its end
HELD = 3  # models in memory
REACHED = 0.912  # the demo's AUC of dev, see demo.json
MEZO = ("mezo", "mezo-constant")  # rows that the others are held against
XS = {"tuning": "lora-xs", "r": 32, "lora_alpha": 32}
XS16 = {"tuning": "lora-xs", "r": 16, "lora_alpha": 16}
XS8 = {"tuning": "lora-xs", "r": 8, "lora_alpha": 8}
CALIBRATED = {**XS8, "lora_a": "calibrated"}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        title: for people.
        lrs: grid that the search begins with, in order.
        options: flat options that differ from the demo's.
        gradients: AdamW by backpropagation; a row scored is a forward pass and the pass back, which costs more.
    """

    title: str
    lrs: tuple[float, ...]
    options: dict = field(default_factory=dict)
    gradients: bool = False

    def scored(self, config: Config) -> int:
        """Rows that a run of this row scores in training."""
        return config.method.steps * config.method.batch_size if self.gradients else rows_scored(config)


ROWS = {
    "adamw": Row("AdamW with gradients, batch 32", (1e-3, 2e-3, 4e-3), gradients=True),
    "mezo": Row("MeZO: one direction a step, batch 32", (8e-3, 16e-3)),
    "mezo-constant": Row("MeZO, constant lr", (4e-3, 8e-3), {"lr_schedule": "constant"}),
    "n-spsa": Row("n-SPSA: 4 directions for all of a batch of 8", (8e-3, 16e-3),
                  {"batch_size": 8, "num_perturbations": 4}),
    "fzoo": Row("FZOO: 7 one-sided directions for all of a batch of 8", (1e-4, 2e-4, 4e-4),
                {"batch_size": 8, "num_perturbations": 7, "update_rule": "fzoo"}),
    "directions-8": Row("8 directions, batch 32", (8e-3, 16e-3), {"directions": 8}),
    "directions-32": Row("a direction an example, batch 32", (8e-3, 16e-3), {"directions": 32}),
    "directions-128": Row("a direction an example, batch 128", (8e-3, 16e-3, 32e-3),
                          {"batch_size": 128, "directions": 128}),
    "one-sided": Row(
        "one-sided: 7 directions for all of a batch of 8",
        (8e-3, 16e-3),
        {"batch_size": 8, "num_perturbations": 7, "update_rule": "one-sided"},
    ),
    "guided": Row("guided: a vector from 6 directions for all of a batch of 8, a pair along it", (2e-3, 4e-3, 8e-3),
                  {"batch_size": 8, "num_perturbations": 6, "update_rule": "guided"}),
    "ranks-32": Row(
        "a direction an example, batch 32, ranks of the losses",
        (1e-2, 2e-2, 4e-2),
        {"directions": 32, "update_rule": "ranks"},
    ),
    "adam-32": Row("a direction an example, batch 32, Adam", (5e-4, 1e-3, 2e-3),
                   {"directions": 32, "update_rule": "adam"}),
    "subspace-32": Row("a direction an example, batch 32, Adam in a subspace of 10 steps", (2e-3, 4e-3, 8e-3),
                       {"directions": 32, "update_rule": "subspace-adam", "refresh_every": 10, "beta2": 0.95}),
    "lora-b-32": Row("lora-b, a direction an example, batch 32", (8e-3, 16e-3),
                     {"directions": 32, "tuning": "lora-b"}),
    "xs-1": Row("lora-xs r 32, one direction a step, batch 32", (8e-3, 16e-3), XS),
    "xs-32": Row("lora-xs r 32, a direction an example, batch 32", (4e-3, 8e-3, 16e-3), {**XS, "directions": 32}),
    "xs-128": Row("lora-xs r 32, a direction an example, batch 128", (16e-3, 32e-3),
                  {**XS, "batch_size": 128, "directions": 128}),
    "xs8-1": Row("lora-xs r 8, one direction a step, batch 32", (16e-3, 32e-3), XS8),
    "xs8-32": Row("lora-xs r 8, a direction an example, batch 32", (16e-3, 32e-3, 64e-3), {**XS8, "directions": 32}),
    "xs16-128": Row("lora-xs r 16, a direction an example, batch 128", (32e-3, 64e-3),
                    {**XS16, "batch_size": 128, "directions": 128}),
    "xs8-128": Row("lora-xs r 8, a direction an example, batch 128", (64e-3, 128e-3),
                   {**XS8, "batch_size": 128, "directions": 128}),
    "calibrated-b-32": Row("lora-b r 8, calibrated, a direction an example, batch 32", (0.125, 0.25),
                           {"tuning": "lora-b", "r": 8, "lora_alpha": 8, "lora_a": "calibrated", "directions": 32}),
    "calibrated-1": Row("lora-xs r 8, calibrated, one direction a step, batch 32", (0.125, 0.25), CALIBRATED),
    "calibrated-32": Row("lora-xs r 8, calibrated, a direction an example, batch 32", (0.125, 0.25),
                         {**CALIBRATED, "directions": 32}),
    "calibrated-64": Row("lora-xs r 8, calibrated, a direction an example, batch 64", (0.25, 0.5),
                         {**CALIBRATED, "batch_size": 64, "directions": 64}),
    "calibrated-128": Row("lora-xs r 8, calibrated, a direction an example, batch 128", (0.25, 0.5),
                          {**CALIBRATED, "batch_size": 128, "directions": 128}),
    "calibrated16-128": Row("lora-xs r 16, calibrated, a direction an example, batch 128", (0.25, 0.5),
                            {**XS16, "lora_a": "calibrated", "batch_size": 128, "directions": 128}),
}  # fmt: skip


def config_of(row: Row, budget: int) -> Config:
    """The run of a row that scores at most so many rows, its lr and directory aside."""
    base = demo.demo_config("it-was", 1, Path("unused")).replace(
        noise=False, report=False, best_metric="loss", **({"lr_schedule": "cosine"} | row.options)
    )
    each = row.scored(base.replace(steps=2)) - row.scored(base)
    steps = (budget - (row.scored(base) - each)) // each  # less what it calibrates with
    # the kernels are compared with the reference at the start and the end alone, which costs more than short runs do
    return base.replace(steps=steps, eval_every=max(1, steps // EVALUATIONS), verify_every=steps)


class Runtimes:
    """Prepared runtimes by what they train. All adapt the same layer, so what is computed below it is shared.

    Args:
        file: where that is kept for the next part of the table.
    """

    def __init__(self, file: Path):
        self.held: dict[str, tuple] = {}
        self.file, self.captured = file, torch.load(file, weights_only=False) if file.exists() else {}
        capture = Trunk._capture

        def captured(trunk: Trunk, batch: RowBatch) -> list:
            key = batch.ids.numpy().tobytes()
            if key not in self.captured:
                self.captured[key] = capture(trunk, batch)
            return self.captured[key]

        Trunk._capture = captured

    def of(self, config: Config) -> tuple[HFRuntime, dict]:
        """The runtime for a run, and the data."""
        model, machine, work = config.for_runtime
        key = repr((model, work.rule, work.directions, work.perturbations))
        if key not in self.held:
            while len(self.held) >= HELD:
                del self.held[next(iter(self.held))]
            splits = load_splits(config, load_tokenizer(config.model.base))
            runtime = HFRuntime(model, machine, work)
            known = len(self.captured)
            runtime.prepare(splits)
            self.held[key] = runtime, splits
            if len(self.captured) > known:
                torch.save(self.captured, self.file)
        runtime, splits = self.held[key]
        if not config.method.eval_test:
            splits = copy.copy(splits)
            del splits["test"]
        return runtime, splits


@dataclass(frozen=True)
class Made:
    """What a run is judged by: its evaluations of dev, the test set before and after, and seconds of training."""

    dev: list[dict]
    before: dict
    after: dict
    seconds: float

    @property
    def best(self) -> dict:
        """The evaluation of dev with the least loss."""
        return min(self.dev, key=lambda line: line["loss"])


def cell(row: Row, budget: int, folder: Path, seeds: int, runtimes: Runtimes, lrs: Sequence[float]) -> dict:
    """The lr of a row at a budget, and its runs.

    Args:
        row, budget: which cell.
        folder: of its runs.
        seeds: runs that are reported.
        runtimes: what they run on.
        lrs: that the search begins with, each twice the one before.
    """
    config, tried = config_of(row, budget), {}
    make = by_gradients if row.gradients else by_forward_passes

    def dev_loss(lr: float) -> None:
        directory = str(folder / f"search-lr-{lr:g}")
        chosen = config.replace(lr=lr, seed=FIRST, output_dir=directory, eval_test=False)
        tried[lr] = make(chosen, runtimes).best["loss"]

    for lr in lrs:
        dev_loss(lr)
    for _ in range(GROWTH):
        best = min(tried, key=tried.__getitem__)
        if best == max(tried):
            dev_loss(2 * best)
        elif best == min(tried):
            dev_loss(best / 2)
        else:
            break
    lr = min(tried, key=tried.__getitem__)
    chosen = config.replace(lr=lr)
    numbers = range(FIRST + 1, FIRST + 1 + seeds)
    runs = [make(chosen.replace(seed=s, output_dir=str(folder / f"seed-{s}-lr-{lr:g}")), runtimes) for s in numbers]
    return {
        "title": row.title,
        "options": row.options,
        "gradients": row.gradients,
        "parameters": runtimes.of(chosen)[0].master.n_elements,
        "rows": row.scored(chosen),
        "steps": chosen.method.steps,
        "lr": lr,
        "dev_loss_by_lr": dict(sorted(tried.items())),
        "lr_at_end_of_grid": lr in (min(tried), max(tried)),
        **{name: mean([run.after[name] for run in runs]) for name in FIGURES},
        "before": {name: runs[0].before[name] for name in FIGURES},
        "dev_auc": mean([run.best["auc"] for run in runs]),
        "seconds": mean([run.seconds for run in runs]),
    }


def first_lrs(row: Row, budget: int, cells: dict) -> tuple[float, ...]:
    """Where the search of a row begins: the lr of the next smaller budget and half of it, if that has been found."""
    smaller = [int(known) for known in cells if int(known) < budget]
    if not smaller:
        return row.lrs
    lr = cells[str(max(smaller))]["lr"]
    return lr / 2, lr


def by_forward_passes(config: Config, runtimes: Runtimes) -> Made:
    """A run, made or carried through unless it is there; one that diverges is judged by the best that it kept."""
    path = Path(config.machine.output_dir)
    run, judged = RunDirectory(path), path / "diverged.json"
    if not (run.result.is_file() or judged.is_file()):
        runtime, splits = runtimes.of(config)
        try:
            if path.exists():
                carry_on(RunDirectory.open(str(path)), run.read_config(), runtime, splits)
            else:
                start(config, runtime, splits)
        except Diverged as error:
            runtime.load(outcome.read(run, runtime.spec))
            judged.write_text(json.dumps({"error": str(error), "after": _scored(config, runtime, splits, "test")}))
    lines = run.read_metrics()
    dev = [line for line in lines if line["split"] == "dev" and line["loss"] is not None]
    seconds = lines[-1]["clock"]["training"]
    if not config.method.eval_test:
        return Made(dev, {}, {}, seconds)
    before = next(line for line in lines if line["split"] == "test")
    after = run.read_result()["test"]["after"] if run.result.is_file() else json.loads(judged.read_text())["after"]
    return Made(dev, before, after, seconds)


def by_gradients(config: Config, runtimes: Runtimes) -> Made:
    """AdamW by backpropagation through the same adapter, from the same start, on the same batches."""
    file = Path(config.machine.output_dir) / "made.json"
    if file.is_file():
        return Made(**json.loads(file.read_text()))
    (runtime, splits), method = runtimes.of(config), config.method
    theta = {
        name: (lora_init(method.seed, name, shape) if "lora_A" in name else torch.zeros(shape)).requires_grad_()
        for name, shape in runtime.spec.shapes.items()
    }
    optimizer, dev, after = torch.optim.AdamW(theta.values(), lr=method.lr), [], {}
    labels = torch.tensor([example.label for example in splits["train"]])
    batches, seconds = Batches(len(labels), method.batch_size, method.seed), 0.0
    put = lambda: runtime.load({name: t.detach() for name, t in theta.items()})  # noqa: E731
    put()
    tested = lambda: _scored(config, runtime, splits, "test") if method.eval_test else {}  # noqa: E731
    before = tested()
    for step in range(method.steps + 1):
        put()
        if step % method.eval_every == 0 or step == method.steps:
            dev.append(_scored(config, runtime, splits, "dev"))
            if dev[-1] is min(dev, key=lambda line: line["loss"]):
                after = tested()
        if step == method.steps:
            break
        began, batch = time.perf_counter(), batches(step)
        grads = runtime.gradient("train", batch, lambda s, b=batch: cross_entropy(s, labels[b]))
        for name, tensor in theta.items():
            tensor.grad = grads[name]
        optimizer.param_groups[0]["lr"] = learning_rate(step, method.steps, method.lr, method.lr_schedule, 0)
        optimizer.step()
        seconds += time.perf_counter() - began
    made = Made(dev, before, after, seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(made)))
    return made


def _scored(config: Config, runtime: HFRuntime, splits: dict, split: str) -> dict:
    found = evaluate_split(config.method, config.machine, runtime, split, splits[split], {})
    return {name: found[name] for name in FIGURES}


def table(found: dict) -> Iterator[str]:
    """LEADERBOARD.md."""
    machine = found["machine"]
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
    if found["cells"]:
        yield ""
        yield from _race(found["cells"])
    for budget in sorted({int(b) for cells in found["cells"].values() for b in cells}):
        rows = {name: cells[str(budget)] for name, cells in found["cells"].items() if str(budget) in cells}
        yield ""
        yield f"## {budget:,} scored rows"
        yield ""
        before = next(iter(rows.values()))["before"]
        yield "| row | parameters | steps | lr | runs | test accuracy, % | test AUC | dev AUC | seconds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield f"| zero-shot | 0 | 0 | | | {100 * before['accuracy']:.1f} | {before['auc']:.3f} | | |"
        for row in sorted(rows.values(), key=lambda row: row["auc"]["mean"]):
            lr = f"{row['lr']:g}{' (end of grid)' if row['lr_at_end_of_grid'] else ''}"
            figures = [_shown(row["accuracy"], 100, 1), _shown(row["auc"], 1, 3), _shown(row["dev_auc"], 1, 3)]
            facts = [row["title"], f"{row['parameters']:,}", f"{row['steps']:,}", lr, str(len(row["auc"]["of"]))]
            yield "| " + " | ".join([*facts, *figures, f"{row['seconds']['mean']:.1f}"]) + " |"
        missing = [row.title for name, row in ROWS.items() if name not in rows]
        if missing and budget in BUDGETS:  # others are a few rows alone
            yield ""
            yield f"Not made yet: {'; '.join(missing)}."
    made = {int(budget) for cells in found["cells"].values() for budget in cells}
    if missing := [f"{budget:,}" for budget in BUDGETS if budget not in made]:
        yield ""
        yield f"Budgets not made yet: {' and '.join(missing)} scored rows."


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


def _race(cells: dict) -> Iterator[str]:
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
        yield f"| {each['title']} | {values[0]:,} | {values[1]:,} | {values[2]:.1f} | {' | '.join(ratios)} |"
    if others := [row.title for name, row in ROWS.items() if name in cells and name not in found]:
        yield ""
        yield f"Not reached by the budgets that were tried: {'; '.join(others)}."


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing; write the JSON and the table after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="directory of the run directories")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; cells that are there stay")
    parser.add_argument("--markdown", type=Path, help="LEADERBOARD.md to write")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="rows to make")
    parser.add_argument("--budgets", nargs="*", type=int, default=list(BUDGETS), help="scored rows of a run")
    parser.add_argument("--lrs", nargs="*", type=float, help="where searches begin, each twice the one before")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell")
    options = parser.parse_args(argv)
    found = {"machine": describe(), "cells": {}}
    if options.output.exists():
        found["cells"] = json.loads(options.output.read_text())["cells"]
    if options.markdown:
        options.markdown.write_text("\n".join(table(found)) + "\n")
    options.runs.mkdir(parents=True, exist_ok=True)
    runtimes = Runtimes(options.runs / "trunk.pt")
    for budget in options.budgets:
        for name in options.rows:
            cells = found["cells"].setdefault(name, {})
            if len(cells.get(str(budget), {}).get("auc", {}).get("of", ())) < options.seeds:
                folder = options.runs / name / str(budget)
                lrs = options.lrs or first_lrs(ROWS[name], budget, cells)
                cells[str(budget)] = cell(ROWS[name], budget, folder, options.seeds, runtimes, lrs)
            options.output.write_text(json.dumps(found, indent=1))
            figures.draw_leaderboard(found["cells"], found["machine"], options.output.with_suffix(".svg"))
            if options.markdown:
                options.markdown.write_text("\n".join(table(found)) + "\n")
            print(json.dumps({"row": name, "budget": budget, **cells[str(budget)]}), flush=True)


if __name__ == "__main__":
    main()

"""Accuracy at equal forward passes: ways to estimate and to step, each with its own lr, on three tasks.

The film reviews are the demo's; --task product and --task tweet are sentences of the same study, for fewer rows. A cell
is a row of the table at a budget of scored rows. Its learning rate is chosen by dev loss on one seed, from a grid of
factors of two that grows at an end that wins; other seeds are then reported. Every run is an ordinary run directory
under --runs, whose log replays; a cell that is there is not run again, so the table can be made in parts. AdamW, which
has gradients, is the line to reach; its runs are a file each.

Run: make leaderboard, or python bench/leaderboard.py --runs RUNS --output JSON --markdown LEADERBOARD.md [--task ...]
[--rows ...]
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import figures
import torch
from leaderboard_rows import FEWER, FILMS, ROWS, TASKS, Row
from leaderboard_text import page
from machine import describe

from mezo.api import carry_on, start
from mezo.config import Config
from mezo.errors import Diverged
from mezo.method.batches import Batches
from mezo.method.objectives import cross_entropy
from mezo.method.schedule import learning_rate
from mezo.models.load import load_tokenizer
from mezo.report.leaderboard import FIGURES, mean
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.hf.trunk import Trunk
from mezo.runtimes.rows import RowBatch
from mezo.studies import assets, demo
from mezo.tasks import load_splits
from mezo.training.evaluation import evaluate_split
from mezo_kernels import lora_init

FIRST = 0  # the seed that a learning rate is chosen on; others are reported
BUDGETS = (5_000, 20_000, 100_000)
EVALUATIONS = 5  # of a run, on dev; the best one is kept
GROWTH = 3  # times that a grid may grow at its end
HELD = 3  # models in memory


def config_of(row: Row, budget: int, task: str = FILMS) -> Config:
    """The run of a row that scores at most so many rows, its lr and directory aside."""
    base = demo.demo_config("it-was", 1, Path("unused")).replace(
        noise=False, report=False, best_metric="loss", **({"lr_schedule": "cosine"} | row.options)
    )
    if task != FILMS:
        files = assets.write_demo_data(assets.cache_root() / f"{task}-data", kind=task)
        files = {f"{split}_file": str(path) for split, path in files.items()}
        base = base.replace(prompt=TASKS[task].prompt, label_words=TASKS[task].label_words, **files)
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


def cell(row: Row, config: Config, folder: Path, seeds: int, runtimes: Runtimes, lrs: Sequence[float]) -> dict:
    """The lr of a row at a budget, and its runs.

    Args:
        row, config: which cell, see `config_of`.
        folder: of its runs.
        seeds: runs that are reported.
        runtimes: what they run on.
        lrs: that the search begins with, each twice the one before.
    """
    tried = {}
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
        "cpu": describe()["cpu"],
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


def write(options: argparse.Namespace, task: str, found: dict) -> None:
    """The task's JSON and figure, and the table of all tasks that there are."""
    file = file_of(options.output, task)
    file.write_text(json.dumps(found, indent=1))
    figures.draw_leaderboard(found["cells"], found["machine"], file.with_suffix(".svg"))
    if options.markdown:
        made = {
            name: json.loads(path.read_text())
            for name in (FILMS, *TASKS)
            if (path := file_of(options.output, name)).exists()
        }
        files = [options.output.with_name(f"{name}.json") for name in ("encoder_head", "reproduce_small")]
        encoder = tuple(json.loads(path.read_text()) for path in files) if all(map(Path.exists, files)) else None
        options.markdown.write_text("\n".join(page(made, ROWS, BUDGETS, encoder)) + "\n")


def file_of(output: Path, task: str) -> Path:
    """The JSON of a task."""
    return output if task == FILMS else output.with_name(f"{output.stem}-{task}.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing; write the JSON and the table after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="directory of the run directories")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write; cells that are there stay")
    parser.add_argument("--markdown", type=Path, help="LEADERBOARD.md to write")
    parser.add_argument("--task", choices=(FILMS, *TASKS), default=FILMS, help="another has a JSON of its own")
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="rows to make; of a further task fewer by default")
    parser.add_argument("--budgets", nargs="*", type=int, help="scored rows of a run")
    parser.add_argument("--lrs", nargs="*", type=float, help="where searches begin, each twice the one before")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each cell")
    options = parser.parse_args(argv)
    task, found = options.task, {"machine": describe(), "cells": {}}
    runs, file = options.runs if task == FILMS else options.runs / task, file_of(options.output, task)
    if file.exists():
        found = json.loads(file.read_text())  # the machine stays that of the first cells; each cell names its CPU
    if found["cells"]:
        write(options, task, found)
    runs.mkdir(parents=True, exist_ok=True)
    runtimes = Runtimes(runs / "trunk.pt")
    budgets, rows = (BUDGETS, tuple(ROWS)) if task == FILMS else (BUDGETS[:2], FEWER)
    for budget in budgets if options.budgets is None else options.budgets:
        for name in rows if options.rows is None else options.rows:
            cells = found["cells"].setdefault(name, {})
            if len(cells.get(str(budget), {}).get("auc", {}).get("of", ())) < options.seeds:
                lrs = options.lrs or first_lrs(ROWS[name], budget, cells)
                config = config_of(ROWS[name], budget, task)
                cells[str(budget)] = cell(ROWS[name], config, runs / name / str(budget), options.seeds, runtimes, lrs)
            write(options, task, found)
            print(json.dumps({"row": name, "budget": budget, **cells[str(budget)]}), flush=True)


if __name__ == "__main__":
    main()

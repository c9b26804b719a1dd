"""The decoder's parts of `make reproduce-small`: few-shot runs, and what accuracy as the objective does."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo.api import train
from mezo.config import Config
from mezo.data.example import Example
from mezo.models.load import load_tokenizer
from mezo.run.directory import RunDirectory
from mezo.run.header import initial_theta, make_header, starting_file
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies import demo
from mezo.studies.assets import demo_splits, fetch_sentences
from mezo.tasks import load_splits
from mezo.training.trainer import Trainer

SEEDS = (13, 21, 42, 87, 100)
"""Of data and run: the paper's data seeds."""
POOLS = {"train": 5000, "dev": 2000, "test": 1000}
"""Sentences that the examples of a seed are drawn from."""
SHOTS = {16: {"k_shot": 16}, 512: {"k_shot": 512, "num_dev": 256}}
"""Examples a class for training; as many for dev, but 128 beside 512."""
STEPS, NUM_TEST = 3000, 500
STUDY = {
    "best_metric": "accuracy",
    "steps": 1000,
    "num_train": 512,
    "num_dev": 200,
    "num_test": NUM_TEST,
    "eval_every": 50,
    "noise": False,
}
BATCHES, EPSILONS = (8, 32, 128), (1e-3, 1e-2, 1e-1)
STILL = 1e-6
"""A learning rate at which theta stays where it starts: what is counted is a property of that place."""
LEARNING = {"batch_size": 64, "eps": 3e-2, "lr": 3e-3}
CURVE = 20
"""Steps that a point of a curve is the mean of."""


@dataclass(frozen=True)
class Sample:
    """What every part draws its runs from.

    Args:
        config: the demo's run, of a prompt's name, steps and a run directory.
        sentences: (text, rating) of every sentence.
        pools: how many of them the examples of a seed are drawn from, by split.
        seeds: of data and run.
        shots: options of a `Config` by examples a class.
        num_test: examples to test on.
    """

    config: Callable[[str, int, Path], Config] = demo.demo_config
    sentences: Callable[[], list[tuple[str, float]]] = fetch_sentences
    pools: Mapping[str, int] = field(default_factory=lambda: POOLS)
    seeds: Sequence[int] = SEEDS
    shots: Mapping[int, dict] = field(default_factory=lambda: SHOTS)
    num_test: int = NUM_TEST


def write_pools(folder: Path, sample: Sample) -> dict[str, str]:
    """Write a sample's pools as JSON lines; return train_file, dev_file and test_file of a `Config`."""
    files = {}
    for split, rows in demo_splits(sample.sentences(), dict(sample.pools)).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[f"{split}_file"] = str(path)
    return files


def mean_std(values: Sequence[float]) -> dict:
    """Mean, standard deviation of a sample, and the values."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": list(values)}


def few_shot(scratch: Path, sample: Sample = Sample(), steps: int = STEPS) -> dict:
    """Part (b): the demo's run for each number of shots and seed, an ordinary `mezo train` each."""
    base = sample.config("it-was", steps, scratch / "unused").replace(
        **write_pools(scratch, sample), report=False, best_metric="accuracy"
    )
    shots = {}
    for k, options in sample.shots.items():
        results = []
        for seed in sample.seeds:
            own = {"data_seed": seed, "seed": seed, "output_dir": str(scratch / f"{k}-{seed}")}
            own["num_test"] = sample.num_test
            results.append(train(base.replace(**options, **own)))
        shots[str(k)] = {
            f"{metric} {when}": mean_std([result["test"][when][metric] for result in results])
            for metric in ("accuracy", "auc")
            for when in ("before", "after")
        } | {"seconds": mean_std([_seconds(result) for result in results])}
    chosen = ("steps", "batch_size", "lr", "eps", "prompt", "label_words", "target_modules", "layers_to_transform", "r")
    return {"config": {name: base.to_dict()[name] for name in chosen} | {"num_test": sample.num_test}, "shots": shots}


def _seconds(result: dict) -> float:
    parts = ("loading", "cache_filling", "compilation", "training", "evaluation")
    return sum(result[f"seconds_{part}"] for part in parts)


def accuracy_study(scratch: Path, sample: Sample = Sample(), study: Mapping[str, Any] = STUDY) -> dict:
    """Part (d): the share of zero differences over batch size and eps, and a run that learns; one trunk for all.

    Args:
        scratch: a directory for the runs.
        sample: what they draw from.
        study: options of the `Config` that all runs share; "steps" and "eval_every" are among them.
    """
    base = sample.config("it-was", study["steps"], scratch / "unused")
    base = base.replace(**write_pools(scratch, sample), **study, objective="accuracy", report=False)
    still = base.replace(lr=STILL, eval_every=study["steps"])
    configs = [
        still.replace(output_dir=str(scratch / f"{batch}-{eps}"), batch_size=batch, eps=eps)
        for batch in BATCHES
        for eps in EPSILONS
    ]
    learning = base.replace(output_dir=str(scratch / "learning"), **LEARNING)
    runtime, splits = load(base)
    runs = [train_on(runtime, splits, config) for config in (*configs, learning)]
    rows = [
        {
            "batch": c.method.batch_size,
            "eps": c.method.eps,
            "lr": c.method.lr,
            "zero_share": result["zero_gradient_share"],
        }
        for c, result in zip(configs, runs[:-1], strict=True)
    ]
    return {
        "steps": study["steps"],
        "zero_differences": rows,
        "learning": {
            **LEARNING,
            "zero_share": runs[-1]["zero_gradient_share"],
            "best_step": runs[-1]["best_step"],
            "test": runs[-1]["test"],
            "curves": curves(RunDirectory(Path(learning.machine.output_dir))),
        },
    }


def load(config: Config) -> tuple[HFRuntime, dict[str, list[Example]]]:
    """What `mezo train` loads; the runtime is prepared."""
    tokenizer = load_tokenizer(config.model.base)
    splits, runtime = (
        load_splits(config, tokenizer, masked=False),
        HFRuntime(*config.for_runtime, tokenizer.pad_token_id or 0),
    )
    runtime.prepare(splits)
    return runtime, splits


def train_on(runtime: HFRuntime, splits: dict[str, list[Example]], config: Config) -> dict:
    """The run that `mezo train` makes, on a runtime that is there already: its trunk serves several runs."""
    initial = starting_file(config, runtime)
    header = make_header(config, runtime.spec, splits, initial)
    runtime.load(initial_theta(header, initial))
    run = RunDirectory.create(config.machine.output_dir, config, header, initial)
    return Trainer(config.method, config.machine, runtime, splits, run).train()


def curves(run: RunDirectory) -> dict:
    """Training accuracy and |projected_grad| as means of CURVE steps; accuracy and cross-entropy on dev."""
    _, records = read_trajectory(run.trajectory)
    parts = [records[i : i + CURVE] for i in range(0, len(records), CURVE)]
    mean = lambda part, value: statistics.mean(value(record) for record in part)  # noqa: E731
    dev = [row for row in run.read_metrics() if row["split"] == "dev"]
    return {
        "step": [part[-1].step + 1 for part in parts],
        "training_accuracy": [-mean(part, lambda r: (r.losses.plus[0] + r.losses.minus[0]) / 2) for part in parts],
        "abs_projected_grad": [mean(part, lambda r: abs(r.projected_grads[0])) for part in parts],
        "dev_step": [row["step"] for row in dev],
        "dev_accuracy": [row["accuracy"] for row in dev],
        "dev_cross_entropy": [row["loss"] for row in dev],
    }

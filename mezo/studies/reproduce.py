"""Carries a protocol through: a run for each data seed and learning rate, then the published figure beside."""

import dataclasses
import json
import os
import statistics
from pathlib import Path

from mezo.api import resume, train, with_adapter_options
from mezo.config import Config
from mezo.errors import Diverged, RunError, UserError
from mezo.run.directory import RunDirectory
from mezo.run.files import replace_file
from mezo.studies.protocols import PROTOCOLS, Protocol
from mezo.tasks import find_task, with_objective


def find(name: str) -> Protocol:
    """The protocol of a name; UserError if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"mezo reproduce {name}: no such protocol; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def configs(protocol: Protocol, output_dir: str, changes: dict, seeds: tuple[int, ...] = ()) -> list[list[Config]]:
    """The runs of a protocol: a list for each data seed, in it one for each learning rate.

    Args:
        protocol: what to run.
        output_dir: of all; each run has a directory in it.
        changes: options of a run that replace the protocol's, such as steps, model or files. A file of one's own is
            taken whole, but for dev where it is cut from train: numbers of examples hold for the hub's splits.
        seeds: data seeds; () are the protocol's.
    """
    steps = changes.get("steps", protocol.steps)
    data = dict(protocol.data)
    for split in ("train", "dev", "test"):
        if changes.get(f"{split}_file") or (split == "dev" and changes.get("train_file")):
            data.pop(f"num_{split}", None)
    common = {
        "model": protocol.model,
        "tuning": protocol.tuning,
        "task": protocol.task,
        **data,
        **protocol.others,
        "eps": protocol.eps,
        "weight_decay": protocol.weight_decay,
        "batch_size": protocol.batch_size,
        "steps": steps,
        "eval_every": max(1, steps // protocol.evaluations),
        **changes,
    }
    folder = lambda seed, lr: str(Path(output_dir) / f"seed-{seed}-lr-{lr}")  # noqa: E731
    return [
        [Config.of(**common, data_seed=seed, seed=seed, lr=lr, output_dir=folder(seed, lr)) for lr in protocol.lrs]
        for seed in seeds or protocol.data_seeds
    ]


def run(protocol: Protocol, output_dir: str, changes: dict, seeds: tuple[int, ...] = ()) -> dict | None:
    """Do what is left of a protocol's runs and choose among them.

    A run that diverges is out of the choice: a grid goes up to learning rates that may.

    Args:
        protocol: what to run.
        output_dir: of all runs.
        changes: options of a run that replace the protocol's, as `configs` takes them.
        seeds: data seeds; () are the protocol's.
    Returns:
        What result.json in `output_dir` holds; None if Ctrl-C stopped a run.
    Raises:
        UserError: before anything is written; or a run directory holds another run.
        RunError: every learning rate of a seed diverged, or a run ended for another reason.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("mezo reproduce runs in one process: start it without torchrun, or its runs with mezo train")
    rows = []
    grid = configs(protocol, output_dir, changes, seeds)
    for config in (config for runs in grid for config in runs):
        _refuse_other(config)
    for runs in grid:
        outcomes = []
        for config in runs:
            try:
                outcome = _carry_through(config)
            except Diverged as error:
                outcome = {"diverged": str(error)}
            if outcome is None:
                return None
            outcomes.append(outcome)
        rows.append(_best(runs, outcomes))
    scores = [100 * row["test"] for row in rows]
    result = {
        "protocol": dataclasses.asdict(protocol),
        "changes": changes,
        "seeds": rows,
        "mean": statistics.mean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
    }
    replace_file(Path(output_dir) / "result.json", json.dumps(result, indent=2).encode())
    return result


def _refuse_other(config: Config) -> None:
    directory = RunDirectory(Path(config.machine.output_dir))
    wanted = with_objective(with_adapter_options(config).absolute())
    if directory.path.exists() and directory.read_config() != wanted:
        raise UserError(f"{directory.path} holds a run with other options: choose another --output-dir")


def _carry_through(config: Config) -> dict | None:
    directory = RunDirectory(Path(config.machine.output_dir))
    if directory.result.is_file():
        return directory.read_result()
    known = directory.path.exists()  # `_refuse_other` found it to be of this configuration
    return resume(str(directory.path), reward=config.method.reward) if known else train(config)


def _best(runs: list[Config], results: list[dict]) -> dict:
    """The run of a data seed whose kept step dev prefers by the task's metric; the first of equals."""
    metric = find_task(runs[0].data).metric
    dev = {i: score for i, result in enumerate(results) if (score := _kept_score(result, metric)) is not None}
    if not dev:
        why = results[0].get("diverged", f"no finite {metric} on dev")
        raise RunError(f"{runs[0].machine.output_dir} and the other learning rates of its seed: {why}")
    at = max(dev, key=dev.__getitem__)
    return {
        "data_seed": runs[at].data.data_seed,
        "lr": runs[at].method.lr,
        "best_step": results[at]["best_step"],
        "dev": dev[at],
        "test_before": results[at]["test"]["before"][metric],
        "test": results[at]["test"]["after"][metric],
        "diverged": [config.method.lr for i, config in enumerate(runs) if i not in dev],
    }


def _kept_score(result: dict, metric: str) -> float | None:
    """What dev said of the step that a run kept; None if it diverged."""
    return next((row[metric] for row in result.get("dev", ()) if row["step"] == result["best_step"]), None)


def departures(result: dict) -> list[str]:
    """What of a result is not as published, a line each.

    >>> protocol = {"steps": 100, "data_seeds": (1, 2), "differs": "no head", "others": {"dtype": "float16"}}
    >>> seeds = [{"data_seed": 1, "diverged": [0.1]}]
    >>> for line in departures({"protocol": protocol, "changes": {"steps": 20, "dtype": "float32"}, "seeds": seeds}):
    ...     print(line)
    no head
    steps 20 (published: 100)
    dtype float32 (published: float16)
    data seeds 1 (published: 1, 2)
    data seed 1: lr 0.1 diverged
    """
    protocol, listed = result["protocol"], lambda seeds: ", ".join(map(str, seeds))
    lines = [protocol["differs"]] if protocol["differs"] else []
    for name, value in result["changes"].items():
        published = protocol.get(name, protocol["others"].get(name))
        if value != published:
            lines.append(f"{name} {value}" + (f" (published: {published})" if published is not None else ""))
    seeds = [row["data_seed"] for row in result["seeds"]]
    if seeds != list(protocol["data_seeds"]):
        lines.append(f"data seeds {listed(seeds)} (published: {listed(protocol['data_seeds'])})")
    lines += [f"data seed {row['data_seed']}: lr {lr} diverged" for row in result["seeds"] for lr in row["diverged"]]
    return lines

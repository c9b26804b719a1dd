"""Choosing lr and eps before a long run: short runs, the worse half dropped at each rung (successive halving).

Jamieson and Talwalkar 2016 (arXiv 1502.07943). A trial is an ordinary run that is paused at the end of a rung and
resumed in the next; all share one loaded model.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mezo.api import carry_on, loaded, start, with_adapter_options
from mezo.config import Config
from mezo.config.options import flag_of
from mezo.data.example import Example
from mezo.data.rewards import judges
from mezo.errors import Diverged, RunError, UserError
from mezo.run.directory import RunDirectory, refuse_existing
from mezo.run.files import drop_torn_line, read_lines, replace_file, write_line
from mezo.run.header import initial_theta, make_header, starting_file
from mezo.runtimes.base import Runtime
from mezo.studies.step_sizes import StepSizes, estimate
from mezo.tasks import with_objective
from mezo.training.evaluation import best_by
from mezo.training.ranks import Ranks

AROUND = 0.1, 0.3, 1.0, 3.0  # times the estimated lr: the grid where none is given
SMOOTH = {"cross_entropy", "lm_cross_entropy"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep does, fixed at its start: plan.json.

    Args:
        config: options of the run that is tuned for, as given.
        rungs: steps at which trials are compared.
        trials: name of each run directory -> {"lr", "eps"}.
        estimate: fields of `StepSizes`, or None where both grids were given.
    """

    config: dict
    rungs: list[int]
    trials: dict[str, dict[str, float]]
    estimate: dict | None


def tune(
    config: Config, grid_lr: Sequence[float] = (), grid_eps: Sequence[float] = (), rungs: int = 3, trial_steps: int = 0
) -> dict | None:
    """Sweep lr and eps under `config.output_dir`; return what result.json there holds, or None after Ctrl-C.

    Args:
        config: of the run that is tuned for.
        grid_lr, grid_eps: values to try; where none are given, those around the estimated lr, and the estimated eps.
        rungs: times that trials are compared; half of them are left each time.
        trial_steps: length of the last rung; 0 is a quarter of the run's steps.
    Raises:
        UserError: before anything is written.
    """
    _refuse_ranks()
    refuse_existing(config.machine.output_dir)
    config = with_objective(with_adapter_options(config).absolute())
    steps = rung_steps(rungs, trial_steps or max(2 ** (rungs - 1), config.method.steps // 4))
    if not (grid_lr and grid_eps) and not config.method.objectives.keys() <= SMOOTH:
        raise UserError(
            f"--objective {config.method.objective} has no slope to estimate: give --grid-lr and --grid-eps"
        )
    if not (grid_lr and grid_eps) and config.method.rule.one_sided:
        rule = config.method.rule.name
        raise UserError(
            f"--update-rule {rule}: lr and eps are estimated for two-sided steps: give --grid-lr and --grid-eps"
        )
    if not grid_lr and config.method.rule.kernel():
        raise UserError(
            f"--update-rule {config.method.rule.name}: lr is estimated for steps of plain SGD: give --grid-lr"
        )
    if config.machine.follows:
        raise UserError("--engine-arg node_rank: a sweep is run by the first machine; start the others with mezo train")
    for lr in grid_lr or (config.method.lr,):  # values that cannot be are refused before the model is loaded
        for eps in grid_eps or (config.method.eps,):
            trial_config(config, steps, "trial", lr, eps)
    with loaded(trial_config(config, steps, "trial", config.method.lr, config.method.eps), need="train") as (
        runtime,
        splits,
        _,
    ):
        _check_dev(splits)
        found = None if grid_lr and grid_eps else _estimate(config, runtime, splits)
        lrs = grid_lr or [float(f"{x * ((found.lr if found else None) or config.method.lr):.1g}") for x in AROUND]
        trials = {f"lr-{lr:g}-eps-{eps:g}": {"lr": lr, "eps": eps} for eps in grid_eps or (found.eps,) for lr in lrs}
        plan = Plan(config.to_dict(), steps, trials, dataclasses.asdict(found) if found else None)
        Path(config.machine.output_dir).mkdir(parents=True)
        replace_file(
            Path(config.machine.output_dir) / "plan.json", json.dumps(dataclasses.asdict(plan), indent=2).encode()
        )
        return _climb(Path(config.machine.output_dir), plan, runtime, splits)


def resume(path: str) -> dict | None:
    """Go on with a sweep where it was stopped; a finished one gives its result."""
    _refuse_ranks()
    directory = Path(path)
    try:
        plan = Plan(**json.loads((directory / "plan.json").read_text()))
        config = Config.of_run(plan.config)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {path}: not a sweep of mezo tune, no readable plan.json there ({error})") from error
    if (directory / "result.json").is_file():
        return json.loads((directory / "result.json").read_text())
    config = config.replace(output_dir=path)
    with loaded(trial_config(config, plan.rungs, "trial", config.method.lr, config.method.eps), need="train") as (
        runtime,
        splits,
        _,
    ):
        return _climb(directory, plan, runtime, splits)


def rung_steps(rungs: int, longest: int) -> list[int]:
    """Steps at the end of each rung, doubling up to at most `longest`.

    >>> rung_steps(3, 100)
    [25, 50, 100]
    """
    if rungs < 1:
        raise UserError(f"--rungs must be at least 1, got {rungs}")
    first = longest // 2 ** (rungs - 1)
    if first < 1:
        raise UserError(f"--trial-steps {longest} is too short for {rungs} rungs: give at least {2 ** (rungs - 1)}")
    return [first * 2**i for i in range(rungs)]


def trial_config(config: Config, rungs: Sequence[int], name: str, lr: float, eps: float) -> Config:
    """A trial's run: as long as the last rung, evaluated on dev at every rung, never on test."""
    return config.replace(
        output_dir=str(Path(config.machine.output_dir) / name),
        steps=rungs[-1],
        eval_every=rungs[0],
        warmup_steps=min(config.method.warmup_steps, rungs[-1]),
        lr=lr,
        eps=eps,
        eval_test=False,
        eval_train=False,
        early_stopping=0,
        true_gradient=False,
    ).absolute()


def command(config: Config, lr: float, eps: float) -> str:
    """The `mezo train` call of the run that was tuned for.

    >>> command(Config.of(model="m", output_dir="o", task="sst2", layers_to_transform=(3, 4), noise=False), 0.1, 0.01)
    'mezo train --task sst2 --model m --layers-to-transform 3 4 --lr 0.1 --no-noise --output-dir RUN'
    """
    chosen = config.replace(lr=lr, eps=eps, output_dir="RUN")
    words = ["mezo", "train"]
    for name, value in chosen.changes().items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def compared_by(config: Config) -> tuple[int, str]:
    """Which figure of dev ranks trials, and its sign: the loss, or what a run of generated text is for."""
    return best_by(config) if config.method.generates else (-1, "loss")


def order(rows: Sequence[dict], sign: int = -1, key: str = "loss") -> list[dict]:
    """Best first: by that figure of dev, then accuracy; a trial that failed or has no finite figure comes last."""
    value = lambda row: math.inf if row[f"dev_{key}"] is None else -sign * row[f"dev_{key}"]  # noqa: E731
    return sorted(rows, key=lambda row: (row["failed"] is not None, value(row), -(row["dev_accuracy"] or 0)))


def _estimate(config: Config, runtime: Runtime, splits: dict[str, Sequence[Example]]) -> StepSizes:
    initial = starting_file(config, runtime)
    first_line = make_header(config, runtime.spec, splits, initial)
    runtime.load(initial_theta(first_line, initial))
    return estimate(config, runtime, splits["train"], judges(config.method))


def _climb(directory: Path, plan: Plan, runtime: Runtime, splits: dict) -> dict | None:
    """Carry every trial to the end of its last rung, from wherever rungs.jsonl ends."""
    log, say = directory / "rungs.jsonl", Console(stderr=True)
    if log.exists():
        drop_torn_line(log)
    rows = [row for _, row in read_lines(log)] if log.exists() else []
    config, names = Config.of_run(plan.config).replace(output_dir=str(directory)), list(plan.trials)
    for number, steps in enumerate(plan.rungs):
        say.rule(f"rung {number + 1} of {len(plan.rungs)}: {len(names)} trials to step {steps}")
        known = {row["trial"] for row in rows if row["rung"] == number}
        for name in (name for name in names if name not in known):
            say.print(name, highlight=False)
            trial = trial_config(config, plan.rungs, name, **plan.trials[name])
            row = _run(trial, steps, runtime, splits)
            if row is None:
                say.print(f"stopped; continue with: mezo tune --resume {directory}", highlight=False, soft_wrap=True)
                return None
            rows.append({"rung": number, "trial": name, **plan.trials[name], "steps": steps, **row})
            _append(log, rows[-1])
        ordered = order([row for row in rows if row["rung"] == number], *compared_by(config))
        names = [row["trial"] for row in ordered[: math.ceil(len(ordered) / 2)] if row["failed"] is None]
        if not names:
            raise RunError(f"{directory}: every trial failed, the first with: {ordered[0]['failed']}; lower --grid-lr")
    best = ordered[0]
    found = {
        "best": best,
        "command": command(Config.of_run(plan.config), best["lr"], best["eps"]),
        "estimate": plan.estimate,
        "rungs": rows,
    }
    replace_file(directory / "result.json", json.dumps(found, indent=2).encode())
    return found


def _run(config: Config, steps: int, runtime: Runtime, splits: dict) -> dict | None:
    """Carry a trial on to the end of a rung; its dev scores there, or None after Ctrl-C."""
    for count in (runtime.tokens, runtime.eval_tokens):
        count.scored, count.computed = 0, 0.0
    run, figures = RunDirectory(Path(config.machine.output_dir)), {"loss", "accuracy", compared_by(config)[1]}
    try:
        if run.config.is_file():
            carry_on(RunDirectory.open(config.machine.output_dir), config, runtime, splits, until=steps)
        else:
            start(config, runtime, splits, until=steps)
    except Diverged as error:
        return {**dict.fromkeys(sorted(f"dev_{key}" for key in figures)), "failed": str(error)}
    rows = [row for row in run.read_metrics() if row["split"] == "dev" and row["step"] == steps]
    return {**{f"dev_{key}": rows[0][key] for key in sorted(figures)}, "failed": None} if rows else None


def _append(path: Path, row: dict) -> None:
    with open(path, "ab") as file:
        write_line(file.fileno(), json.dumps(row, allow_nan=False) + "\n")


def _check_dev(splits: dict) -> None:
    if "dev" not in splits:
        raise UserError("mezo tune compares trials by dev loss: give --dev-file")


def _refuse_ranks() -> None:
    if Ranks().size > 1:
        raise UserError("mezo tune runs in one process: start it without torchrun")

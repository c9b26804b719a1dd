"""Choosing lr and eps before a long run: short runs, which Optuna proposes and ends early.

Values are proposed by a tree-structured Parzen estimator around the estimated ones (Bergstra et al. 2011), or come from
grids. At the end of a rung a trial goes on if it is in the better half of those that were there before (asynchronous
successive halving: Li et al. 2018, arXiv 1810.05934). A trial is an ordinary run that is paused at each rung's end; all
trials share one loaded model. Optuna's journal, study.jsonl in the sweep's directory, is what a sweep resumes from.
"""

import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from mezo.api import carry_on, loaded, start, with_adapter_options, with_layers
from mezo.config import Config
from mezo.config.options import flag_of
from mezo.data.example import Example
from mezo.data.rewards import judges, reward_hash, trusted_reward
from mezo.errors import Diverged, RunError, UserError
from mezo.progress import console as new_console
from mezo.run.directory import RunDirectory, refuse_existing
from mezo.run.files import drop_torn_line, replace_file
from mezo.run.header import initial_theta, make_header, starting_file
from mezo.runtimes.base import Runtime
from mezo.studies.step_sizes import StepSizes, estimate
from mezo.tasks import with_objective
from mezo.training.evaluation import best_by
from mezo.training.ranks import Ranks

AROUND = {"lr": 10.0, "eps": 3.0}
"""Without a grid a value is sought from the estimated one over this factor to the estimated one times it."""
TRIALS, AT_RANDOM = (
    8,
    4,
)  # of a sweep unless it says otherwise; and those of them that the estimator knows too little for
STUDY = "study.jsonl"
SMOOTH = {"cross_entropy", "lm_cross_entropy"}


def tune(
    config: Config,
    grid_lr: Sequence[float] = (),
    grid_eps: Sequence[float] = (),
    rungs: int = 3,
    trial_steps: int = 0,
    num_trials: int = 0,
) -> dict | None:
    """Sweep lr and eps under its output_dir; return what result.json there holds, or None after Ctrl-C.

    Args:
        config: of the run that is tuned for.
        grid_lr, grid_eps: values to try; where none are given, they are sought around the estimated one.
        rungs: times that trials are compared, each after twice the steps of the time before.
        trial_steps: length of the last rung; 0 is a quarter of the run's steps.
        num_trials: number of trials; 0 is TRIALS, or every pair of two grids.
    Raises:
        UserError: before anything is written.
        RunError: every trial failed, or an engine died; the latter can be resumed.
    """
    _refuse_ranks()
    refuse_existing(config.machine.output_dir)
    config = with_objective(with_adapter_options(config).absolute())
    steps = rung_steps(rungs, trial_steps or max(2 ** (rungs - 1), config.method.steps // 4))
    _check_options(config, grid_lr, grid_eps, num_trials)
    for lr in grid_lr or (config.method.lr,):  # values that cannot be are refused before the model is loaded
        for eps in grid_eps or (config.method.eps,):
            trial_config(config, steps, "trial", lr, eps)
    config = with_layers(config)
    with loaded(trial_config(config, steps, "trial", config.method.lr, config.method.eps), need="train") as (
        runtime,
        splits,
        _,
    ):
        if "dev" not in splits:
            raise UserError("mezo tune compares trials by dev loss: give --dev-file")
        sizes = None if grid_lr and grid_eps else _estimate(config, runtime, splits)
        centre = {} if sizes is None else {"lr": sizes.lr or config.method.lr, "eps": sizes.eps}
        grids = {"lr": list(dict.fromkeys(grid_lr)), "eps": list(dict.fromkeys(grid_eps))}
        pairs = [{"lr": lr, "eps": eps} for eps, lr in itertools.product(grids["eps"], grids["lr"])]
        first = pairs[: num_trials or None] or [{name: centre[name] for name, grid in grids.items() if not grid}]
        plan = {
            "config": config.to_dict(),
            "rungs": steps,
            "grids": grids,
            "centre": centre,
            "trials": len(pairs[: num_trials or None]) or num_trials or TRIALS,
            "estimate": dataclasses.asdict(sizes) if sizes else None,
            "reward_hash": reward_hash(config.method.reward) if config.method.reward else None,
        }
        Path(config.machine.output_dir).mkdir(parents=True)
        direction = "maximize" if compared_by(config)[0] > 0 else "minimize"
        study = optuna.create_study(
            storage=_journal(Path(config.machine.output_dir)), study_name="mezo", direction=direction
        )
        for values in first:
            study.enqueue_trial(values)
        study.set_user_attr("plan", plan)
        return _sweep(Path(config.machine.output_dir), study, runtime, splits, config.method.reward)


def resume(path: str, reward: str = "", trust_reward: bool = False) -> dict | None:
    """Go on with a sweep where it was stopped; a finished one gives its result.

    Args:
        path: its directory.
        reward: the sweep's own reward, wherever its file is now.
        trust_reward: run the code of the reward that the sweep names.
    """
    _refuse_ranks()
    directory = Path(path)
    try:
        drop_torn_line(directory / STUDY)
        study = optuna.load_study(study_name="mezo", storage=_journal(directory))
        plan = study.user_attrs["plan"]
        config = Config.of_run(plan["config"]).replace(output_dir=path)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"--resume {path}: not a sweep of mezo tune, no readable {STUDY} there ({error})") from error
    if (directory / "result.json").is_file():
        return json.loads((directory / "result.json").read_text())
    trusted = trusted_reward(config.method.reward, plan.get("reward_hash"), reward, trust_reward, path)
    config = config.replace(reward=trusted)
    with loaded(
        trial_config(config, plan["rungs"], "trial", config.method.lr, config.method.eps), need="train"
    ) as loaded_before:
        return _sweep(directory, study, *loaded_before[:2], config.method.reward)


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
    """A trial's run: as long as the last rung, evaluated on dev at every rung, never on test.

    Args:
        config: of the run that is tuned for; its output_dir is the sweep's.
        rungs: steps at the end of each.
        name: of the trial's directory.
        lr, eps: the trial's.
    """
    return config.replace(
        output_dir=str(Path(config.machine.output_dir) / name),
        steps=rungs[-1],
        eval_every=rungs[0],
        warmup_steps=min(config.method.warmup_steps, rungs[-1]),
        lr=lr,
        eps=eps,
        eval_test=False,
        report=False,
        eval_train=False,
        early_stopping=0,
        true_gradient=False,
    ).absolute()


def command(config: Config, lr: float, eps: float) -> str:
    """The `mezo train` call of the run that was tuned for.

    Args:
        config: of that run.
        lr, eps: chosen.

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
    return best_by(config.method) if config.method.generates else (-1, "loss")


def order(rows: Sequence[dict], sign: int = -1, key: str = "loss") -> list[dict]:
    """Best first: most steps, then that figure of dev, then accuracy; a trial that failed comes last.

    Args:
        rows: of result.json.
        sign: 1 where more is better.
        key: the figure.
    """
    failed = {row["trial"] for row in rows if row["failed"]}
    value = lambda row: math.inf if row[f"dev_{key}"] is None else -sign * row[f"dev_{key}"]  # noqa: E731
    by = lambda row: (row["trial"] in failed, -row["steps"], value(row), -(row["dev_accuracy"] or 0))  # noqa: E731
    return sorted(rows, key=by)


def edges(best: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence on each of lr and eps whose best value has none better tried beyond it.

    Args:
        best: row of the best trial.
        rows: of all trials.

    >>> edges({"lr": 0.1, "eps": 0.01}, [{"lr": 0.01, "eps": 0.01}, {"lr": 0.1, "eps": 0.01}])
    ['the best lr, 0.1, is the largest that was tried: a larger one may be better still, such as --grid-lr 0.1 0.3 1']
    """
    texts = []
    for name in AROUND:
        tried = {row[name] for row in rows}
        value, factors = best[name], {max(tried): ("largest", "larger", 3, 10)}
        factors[min(tried)] = ("smallest", "smaller", 1 / 3, 0.1)
        if len(tried) > 1 and value in factors:
            which, beyond, *others = factors[value]
            grid = " ".join(f"{float(f'{value * factor:.1g}'):g}" for factor in (1, *others))
            texts.append(
                f"the best {name}, {value:g}, is the {which} that was tried: a {beyond} one may be better still, such"
                f" as --grid-{name} {grid}"
            )
    return texts


def _estimate(config: Config, runtime: Runtime, splits: dict[str, Sequence[Example]]) -> StepSizes:
    initial = starting_file(config, runtime)
    first_line = make_header(config, runtime.spec, splits, initial)
    runtime.load(initial_theta(first_line, initial))
    return estimate(config, runtime, splits["train"], judges(config.method))


def _journal(directory: Path) -> optuna.storages.JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.JournalStorage(JournalFileBackend(str(directory / STUDY)))


def _sweep(directory: Path, study: optuna.Study, runtime: Runtime, splits: dict, reward: str) -> dict | None:
    """Make what is left of a sweep's trials, and its result; None after Ctrl-C."""
    plan, say = study.user_attrs["plan"], new_console(stderr=True, highlight=False)
    config = Config.of_run(plan["config"]).replace(output_dir=str(directory), reward=reward)
    study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=plan["rungs"][0], reduction_factor=2)
    while (trial := _next_trial(study, plan["trials"])) is not None:
        values = {name: _suggest(trial, name, plan) for name in AROUND}
        name = f"lr-{values['lr']:g}-eps-{values['eps']:g}"
        trial.set_user_attr("run", {"trial": name, **values})
        say.rule(f"trial {trial.number + 1} of {plan['trials']}: {name}")
        if not _carry(trial, trial_config(config, plan["rungs"], name, **values), plan["rungs"], runtime, splits):
            say.print(f"stopped; continue with: mezo tune --resume {directory}", soft_wrap=True)
            return None
    rows = _rows(study, plan["rungs"])
    best = order(rows, *compared_by(config))[0]
    if best["failed"]:
        raise RunError(f"{directory}: every trial failed, the first with: {best['failed']}; lower --grid-lr")
    chosen = command(Config.of_run(plan["config"]), best["lr"], best["eps"])
    result = {"best": best, "command": chosen, "estimate": plan["estimate"], "rungs": rows}
    replace_file(directory / "result.json", json.dumps(result, indent=2).encode())
    return result


def _next_trial(study: optuna.Study, count: int) -> Trial | None:
    """The trial that a stopped sweep was in, else a new one, until there are `count`."""
    finished = sum(trial.state.is_finished() for trial in study.trials)
    if finished >= count:
        return None
    # a seed for each trial: a resumed sweep proposes what one that was never stopped would
    study.sampler = optuna.samplers.TPESampler(seed=finished, n_startup_trials=AT_RANDOM)
    running = study.get_trials(states=[TrialState.RUNNING])
    return Trial(study, running[0]._trial_id) if running else study.ask()


def _suggest(trial: Trial, name: str, plan: dict) -> float:
    """A value of the grid, or one near the centre, to two digits."""
    if plan["grids"][name]:
        return trial.suggest_categorical(name, plan["grids"][name])
    centre, factor = plan["centre"][name], AROUND[name]
    return float(f"{trial.suggest_float(name, centre / factor, centre * factor, log=True):.2g}")


def _carry(trial: Trial, config: Config, rungs: list[int], runtime: Runtime, splits: dict) -> bool:
    """Carry a trial from rung to rung until it is complete, pruned or failed; False after Ctrl-C."""
    key = f"dev_{compared_by(config)[1]}"
    for steps in rungs:
        figures = trial.user_attrs.get(str(steps)) or _run(config, steps, runtime, splits)
        if figures is None:
            return False
        if "pruned" not in figures:  # a kill between the next lines costs a pruning at worst: the trial goes on
            if not figures["failed"]:
                trial.report(figures[key], steps)
            figures["pruned"] = not figures["failed"] and steps < rungs[-1] and trial.should_prune()
            trial.set_user_attr(str(steps), figures)
        if figures["failed"] or figures["pruned"]:
            trial.study.tell(trial, state=TrialState.FAIL if figures["failed"] else TrialState.PRUNED)
            return True
    trial.study.tell(trial, figures[key])
    return True


def _run(config: Config, steps: int, runtime: Runtime, splits: dict) -> dict | None:
    """Carry a trial's run on to the end of a rung; its dev scores there and why it failed, or None after Ctrl-C."""
    for count in (runtime.tokens, runtime.eval_tokens):
        count.scored, count.computed = 0, 0.0
    run, key = RunDirectory(Path(config.machine.output_dir)), compared_by(config)[1]
    names = sorted({"loss", "accuracy", key})
    scored = lambda: [row for row in run.read_metrics() if row["split"] == "dev" and row["step"] == steps]  # noqa: E731
    try:
        if not run.config.is_file():
            start(config, runtime, splits, until=steps)
        elif not scored() or (steps == config.method.steps and not run.result.is_file()):
            carry_on(RunDirectory.open(config.machine.output_dir), config, runtime, splits, until=steps)
    except (Diverged, ArithmeticError) as error:
        return {**{f"dev_{name}": None for name in names}, "failed": str(error)}
    if not scored():
        return None
    failed = None if scored()[0][key] is not None else f"dev has no finite {key} after step {steps}"
    return {**{f"dev_{name}": scored()[0][name] for name in names}, "failed": failed}


def _rows(study: optuna.Study, rungs: list[int]) -> list[dict]:
    """A row for each rung that a trial came to, rung by rung."""
    return [
        {"rung": number, **trial.user_attrs["run"], "steps": steps, **trial.user_attrs[str(steps)]}
        for number, steps in enumerate(rungs)
        for trial in study.trials
        if str(steps) in trial.user_attrs
    ]


def _check_options(config: Config, grid_lr: Sequence[float], grid_eps: Sequence[float], num_trials: int) -> None:
    if num_trials < 0:
        raise UserError(f"--num-trials must be 0 or more, got {num_trials}")
    if not (grid_lr and grid_eps) and not config.method.objectives.keys() <= SMOOTH:
        raise UserError(
            f"--objective {config.method.objective} has no slope to estimate: give --grid-lr and --grid-eps"
        )
    rule = config.method.rule
    if not (grid_lr and grid_eps) and (rule.one_sided or rule.guides):
        raise UserError(
            f"--update-rule {rule.name}: lr and eps are estimated for two-sided steps: give --grid-lr and --grid-eps"
        )
    if not grid_lr and (rule.kernel() or rule.remembers):
        raise UserError(f"--update-rule {rule.name}: lr is estimated for steps of plain SGD: give --grid-lr")
    if config.machine.follows:
        raise UserError("--engine-arg node_rank: a sweep is run by the first machine; start the others with mezo train")


def _refuse_ranks() -> None:
    if Ranks().size > 1:
        raise UserError("mezo tune runs in one process: start it without torchrun")

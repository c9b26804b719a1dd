"""What each command does, as functions; cli.py parses arguments and prints errors."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezo.config import Config
from mezo.config.checks import LORA
from mezo.data.rewards import judges
from mezo.errors import UserError
from mezo.models.load import is_masked, load_tokenizer
from mezo.run import outcome
from mezo.run.adapter import adapter_options, load_adapter
from mezo.run.directory import RunDirectory, launch_id, refuse_existing
from mezo.run.export import refuse_output
from mezo.run.header import INITIAL, initial_theta, make_header, starting_file
from mezo.run.replay import rebuild, replay_records
from mezo.run.stopping import stalled
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.base import Runtime
from mezo.tasks import load_splits, with_objective
from mezo.training.evaluation import evaluate_split
from mezo.training.ranks import Ranks
from mezo.training.trainer import Trainer


def train(config: Config, until: int | None = None) -> dict | None:
    """Start a run and carry it through. Under torchrun all ranks call this; after an elastic restart it resumes.

    Args:
        config: the run's.
        until: number of steps after which it pauses.
    Returns:
        What result.json holds ({} on ranks above 0), or None if Ctrl-C stopped it or it paused.
    Raises:
        UserError: before anything is written.
    """
    if config.num_demonstrations:
        raise UserError("--num-demonstrations is for mezo eval, training prompts have none: leave it out")
    if config.follows:
        return follow(with_objective(with_adapter_options(config).absolute()))
    ranks, config = Ranks(), with_objective(with_adapter_options(config).absolute())
    if ranks.restarted and _started_here(config):
        return resume(config.output_dir, ranks, until=until)
    if ranks.leads:
        refuse_existing(config.output_dir)
    _check_ranks(config, ranks)
    with loaded(config, need="train") as (runtime, splits, seconds):
        return start(config, runtime, splits, seconds, ranks, until)


def start(
    config: Config, runtime: Runtime, splits: dict, seconds: float = 0.0, ranks: Ranks | None = None, until=None
) -> dict | None:
    """`train` on what is loaded already, which took so many seconds."""
    ranks = ranks or Ranks()
    initial = starting_file(config, runtime)
    header = make_header(config, runtime.spec, splits, initial)
    runtime.load(initial_theta(header, initial))
    if initial is not None and ranks.size > 1:
        ranks.check_equal(runtime.theta(), 0, "make the adapter on one machine and start from it: --adapter")
    if ranks.leads:
        run = RunDirectory.create(config.output_dir, config, header, initial)
    else:
        run = RunDirectory(Path(config.output_dir))
    trainer = Trainer(config, runtime, splits, run, ranks=ranks, seconds_loading=seconds)
    return _carry_through(trainer, ranks, until)


def follow(config: Config) -> dict:
    """Run this machine's part of an engine, `node_rank` of `nnodes`, until the trainer on the first machine ends it.

    Args:
        config: the trainer's, but for node_rank; its run directory is not touched.
    Raises:
        RunError: the engine ended before the trainer did.
    """
    with loaded(config, need="train") as (runtime, _, _):
        runtime.follow()
    return {}


def with_adapter_options(config: Config) -> Config:
    """The configuration with what its --adapter fixes: rank, scale, modules and layers are the adapter's own."""
    if not config.adapter:
        return config
    fixed = fixed_by_adapter(config)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, value in fixed.items():
        given = getattr(config, name)
        if given != defaults[name] and _unordered(given) != _unordered(value):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given} contradicts --adapter {config.adapter}, which has {value}: leave it out")
    return dataclasses.replace(config, **fixed)


def fixed_by_adapter(config: Config) -> dict:
    """Options that --adapter leaves no choice of, itself among them."""
    options = adapter_options(config.adapter)
    return {"adapter": config.adapter} | {name: value for name, value in options.items() if name != "model"}


def _unordered(value):
    return sorted(value) if isinstance(value, (tuple, list)) else value


def _started_here(config: Config) -> bool:
    """True if this launch of torchrun made the run directory, before one of its ranks died."""
    run = RunDirectory(Path(config.output_dir))
    known = run.launch.is_file() and run.launch.read_text() == launch_id() != ""
    return known and run.read_config() == config


def resume(path: str, ranks: Ranks | None = None, machine: dict | None = None, until: int | None = None) -> dict | None:
    """Carry an interrupted run through, to the bit; check a finished one.

    Args:
        path: run directory.
        ranks: the processes that share the work.
        machine: options of `mezo.config.MACHINE` that differ from the run's: where and how it goes on.
        until: number of steps after which it pauses again.
    Returns:
        As `train`; for a finished run, its result.
    """
    if machine and (config := dataclasses.replace(RunDirectory(Path(path)).read_config(), **machine)).follows:
        return follow(config)
    ranks = ranks or Ranks()
    run = RunDirectory.open(path) if ranks.leads else RunDirectory(Path(path))
    config = dataclasses.replace(run.read_config(), **(machine or {}))
    _, records = read_trajectory(run.trajectory)
    ended = len(records) >= config.steps or stalled(run.read_metrics(), config.early_stopping)
    # the patience that ended a run may have been given when it was resumed; without an option nobody asks it to go on
    if run.result.is_file() and (ended or (not machine and run.read_result().get("stopped_early"))):
        return _check_finished(run)
    _check_ranks(config, ranks)
    with loaded(config, need="train") as (runtime, splits, seconds):
        return carry_on(run, config, runtime, splits, seconds, ranks, until)


def carry_on(
    run: RunDirectory, config: Config, runtime: Runtime, splits: dict, seconds: float = 0.0, ranks=None, until=None
) -> dict | None:
    """`resume` an open run on what is loaded already, which took so many seconds."""
    ranks = ranks or Ranks()
    first_line, records = read_trajectory(run.trajectory)
    # the adapter it started from has been copied into the run: its source may be gone
    own = dataclasses.replace(config, adapter="")
    _same_run(first_line, make_header(own, runtime.spec, splits), str(run.path))
    runtime.load(initial_theta(first_line, run.path / INITIAL))
    if ranks.leads:
        run.result.unlink(missing_ok=True)  # of a run that ended early and now goes on
        run.write_metrics([row for row in run.read_metrics() if row["step"] <= len(records)])
    replay_records(runtime.step, records)
    trainer = Trainer(config, runtime, splits, run, records, ranks, seconds_loading=seconds)
    return _carry_through(trainer, ranks, until)


def _carry_through(trainer: Trainer, ranks: Ranks, until: int | None) -> dict | None:
    try:
        result = trainer.train(until)
    finally:
        trainer.run.release()
    ranks.close()
    return result


def _check_ranks(config: Config, ranks: Ranks) -> None:
    shared = config.batch_size if config.parallel == "data" else config.num_perturbations
    if shared < ranks.size:
        name = "batch-size" if config.parallel == "data" else "num-perturbations"
        raise UserError(f"--{name} {shared} cannot be shared by {ranks.size} ranks: raise it or start fewer")


def evaluate(config: Config, adapter: Path | None) -> dict[str, dict]:
    """Score an adapter on the splits that `config` names.

    Args:
        config: model and data; its run settings are not used.
        adapter: adapter directory, or None for the model itself (a fresh adapter's output is zero).
    Returns:
        As `evaluate_split`, by split; with num_demonstrations train gives these and is not scored.
    """
    config = dataclasses.replace(with_objective(config), trunk_cache="off", eval_test=True, eval_train=True)
    if adapter is None and config.tuning == "prefix":
        raise UserError("--tuning prefix: without a run or an adapter there is no prefix to score; leave it out")
    if adapter is None and config.head == "linear":
        raise UserError("--head linear: without a run or an adapter the head is zero; leave it out, or give one")
    if config.follows:
        raise UserError("--engine-arg node_rank: only mezo train runs on several machines; use one, or --runtime hf")
    with loaded(config) as (runtime, splits, _):
        if adapter is not None:
            runtime.load(load_adapter(adapter, runtime.spec.shapes))
        judged = judges(config)
        return {split: evaluate_split(config, runtime, split, own, judged) for split, own in splits.items()}


def refuse_other_adapter(config: Config, base: dict, target: str) -> None:
    """Raise UserError if options say otherwise of an adapter than it does itself.

    Args:
        config: with the options.
        base: what is so: a run's options or those that an adapter fixes, {} for a model alone.
        target: the adapter, run or model, for the message.
    """
    if config.adapter != base.get("adapter", ""):
        path = config.adapter
        raise UserError(f"--adapter {path}: mezo eval takes an adapter in front of its options: mezo eval {path} ...")
    for name in ("tuning", "head", "num_prefix_tokens", *LORA):
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        if name in base and _unordered(value) != _unordered(base[name]):
            raise UserError(f"{flag} {value} contradicts {target}, which has {base[name]}: leave it out")


def run_to_score(path: Path) -> tuple[dict, Path | None]:
    """Options and adapter with which `evaluate` scores what a run kept; a trained model stands in for its base.

    Raises:
        UserError: no run, or its model is not there.
    """
    run = RunDirectory(path)
    config = run.read_config()
    if config.tuning != "full":
        return dataclasses.asdict(config), run.adapter
    if not run.model.is_dir():
        raise UserError(f"{path} has no model/ yet: let the run finish, or rebuild one with mezo replay")
    return {**dataclasses.asdict(config), "model": str(run.model)}, None


def replay(run: str, output_dir: str, until: str = "best", backend: str | None = None, model: str = "") -> int:
    """Rebuild theta from a run's log and write it as the run keeps it; return the number of steps applied."""
    refuse_output(output_dir)
    theta, header, steps = rebuild(run, until, backend, model)
    outcome.write(Path(output_dir), header, theta)
    return steps


@contextmanager
def loaded(config: Config, need: str | None = None) -> Iterator[tuple[Runtime, dict, float]]:
    """Runtime, examples and the seconds it took. Data first: it is quick to load, and most mistakes are there."""
    started = time.perf_counter()
    config.refuse_missing_files()
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config, tokenizer, masked=is_masked(config.model))
    if not config.eval_test:
        splits.pop("test", None)
    if need is not None and need not in splits:
        raise UserError("--train-file is missing: give one, or a --task")
    if need is not None and config.early_stopping and "dev" not in splits:
        raise UserError(f"--early-stopping {config.early_stopping} needs a dev set: give --dev-file, or leave it out")
    for judge in judges(config).values():  # a reward that takes nothing is found before the model is loaded
        judge(next(iter(splits.values()))[0], "")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    runtime = _runtime(config, pad)
    try:
        runtime.prepare(splits)
        yield runtime, splits, time.perf_counter() - started - runtime.seconds_filling
    finally:
        runtime.close()


def _runtime(config: Config, pad: int) -> Runtime:
    """The runtime that --runtime names; the other one's libraries are not imported."""
    if config.runtime == "sglang":
        try:
            from mezo.runtimes.sglang.runtime import SGLangRuntime
        except ImportError as error:
            raise UserError(f"--runtime sglang: {error}; install it: pip install 'mezo-kernels[sglang]'") from error

        return SGLangRuntime(config, pad)
    from mezo.runtimes.hf.runtime import HFRuntime

    return HFRuntime(config, pad)


def _same_run(logged: dict, now: dict, path: str) -> None:
    for key in ("run_seed", "data_hash", "reward_hash", "rule", "dtype", "peft", "shapes", "model_hash"):
        a, b = logged.get(key), now.get(key)
        if key == "shapes":
            a, b = ({name: tuple(shape) for name, shape in shapes.items()} for shapes in (a, b))
        if a != b:
            what = {"reward_hash": "the file", "rule": "config.json"}.get(key, "the model")
            raise UserError(
                f"--resume {path}: {key} of the log and of {what} at hand differ: {_short(a)} and {_short(b)}"
            )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_finished(run: RunDirectory) -> dict:
    """Rebuild theta of a finished run from its log and compare it with what the run kept."""
    theta, first_line, steps = rebuild(run.path)
    different = outcome.difference(run, first_line, theta)
    if different:
        raise UserError(
            f"{run.path}: {outcome.path(run, first_line['peft']).name}/ is not what the log gives"
            f" ({different} differs);"
            f" rebuild it with: mezo replay {run.path} --output-dir NEW"
        )
    return {**run.read_result(), "checked_steps": steps}

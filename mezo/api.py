"""What each command does, as functions that scripts may call; `mezo/cli/` parses arguments and prints errors."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mezo.config import Config, refuse_contradiction
from mezo.config.options import over, refuse_strangers
from mezo.data.large import looked_at
from mezo.data.rewards import judges, trusted_reward
from mezo.data.tokenization import oddities, refuse_unknown_ids
from mezo.errors import UserError
from mezo.models.load import Checkpoint, load_tokenizer
from mezo.progress import say, waiting
from mezo.report import dashboards
from mezo.run import outcome
from mezo.run.adapter import adapter_options, base_of, check_base, load_adapter, quantised_here
from mezo.run.agreement import check_lines
from mezo.run.directory import RunDirectory, launch_id, refuse_existing
from mezo.run.export import refuse_output
from mezo.run.feedback import FeedbackLog
from mezo.run.header import INITIAL, initial_theta, make_header, starting_file
from mezo.run.replay import rebuild, replay_records
from mezo.run.stopping import stalled
from mezo.run.trajectory import read_header, read_trajectory
from mezo.runtimes.base import Follower, Runtime, require
from mezo.tasks import load_splits, with_objective
from mezo.training.details import figures_of
from mezo.training.evaluation import evaluate_split, evaluation_interval
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
    if config.data.num_demonstrations:
        raise UserError("--num-demonstrations is for mezo eval, training prompts have none: leave it out")
    if config.machine.follows:
        return follow(with_layers(with_objective(with_adapter_options(config).absolute())))
    ranks, config = Ranks(), with_objective(with_adapter_options(config).absolute())
    if ranks.restarted and _started_here(config):
        return resume(config.machine.output_dir, ranks, until=until, reward=config.method.reward)
    if ranks.leads:
        refuse_existing(config.machine.output_dir)
        dashboards.check(config.machine.report_to)
    _check_ranks(config, ranks)
    config = with_layers(config, ranks)
    adapter = config.model.tuning.adapter
    with loaded(_with_one_product(config, ranks), need="train", adapter=adapter) as (runtime, splits, seconds):
        return start(config, runtime, splits, seconds, ranks, until)


def _with_one_product(config: Config, ranks: Ranks) -> Config:
    """The configuration with one --linear for all ranks: oneDNN's product only where every rank finds it faster."""
    if ranks.size == 1 or config.machine.runtime.name != "hf" or config.machine.runtime.linear != "auto":
        return config
    from mezo.models.linear import SMALLEST, width_of
    from mezo.runtimes.hf.runtime import product_of

    checkpoint = _checkpoint_of(config)
    if width_of(checkpoint.config) < SMALLEST:
        return config.replace(linear="torch")
    mine = product_of(config.model, config.machine, checkpoint).name
    agreed = all(found for (found,) in ranks.gather([float(mine != "torch")]))
    return config.replace(linear=mine if agreed else "torch")


def _checkpoint_of(config: Config) -> Checkpoint:
    model = config.model
    return Checkpoint.of(model.base, model.tuning.head, model.quantization, model.trust_remote_code)


def _with_product_of(config: Config, first_line: dict) -> Config:
    """The configuration of a run that goes on: --linear auto is what its log says, so that it stays the same run.

    Where that cannot be here, as on a GPU, torch's own product takes over.
    """
    if config.machine.runtime.linear != "auto":
        return config
    if config.machine.runtime.name == "hf":
        from mezo.runtimes.hf.runtime import has_product
    else:
        from mezo.runtimes.sglang.arguments import has_product

    product = first_line.get("linear", "torch")
    return config.replace(linear=product if has_product(product, config.model, config.machine) else "torch")


def start(
    config: Config,
    runtime: Runtime,
    splits: dict,
    seconds: float = 0.0,
    ranks: Ranks | None = None,
    until: int | None = None,
) -> dict | None:
    """`train` on what is loaded already.

    Args:
        config: the run's.
        runtime: prepared.
        splits: tokenised examples by split, as `loaded` gives them.
        seconds: what loading took.
        ranks: the processes that share the work; by default those that torchrun started.
        until: number of steps after which it pauses.
    Returns:
        As `train`.
    """
    ranks = ranks or Ranks()
    return carry_through(begin(config, runtime, splits, seconds, ranks), ranks, until)


def begin(config: Config, runtime: Runtime, splits: dict, seconds: float = 0.0, ranks: Ranks | None = None) -> Trainer:
    """A new run on what is loaded already, as `start` carries it through: its directory is there, no step is done."""
    ranks = ranks or Ranks()
    _refuse_more_directions_than_parameters(config, runtime)
    initial = starting_file(config, runtime)
    header = make_header(config, runtime.spec, splits, initial, getattr(runtime, "linear", "torch"))
    theta = initial_theta(header, initial)
    runtime.load(theta)
    if initial is not None and ranks.size > 1:
        ranks.check_equal(theta, 0, "make the adapter on one machine and start from it: --adapter")
    runtime.prove_adapter()
    if ranks.leads:
        outcome.prove(runtime, header, initial, config.machine.output_dir)
        run = RunDirectory.create(config.machine.output_dir, config, header, initial)
    else:
        run = RunDirectory(Path(config.machine.output_dir))
    loading = {"ranks": ranks, "seconds_loading": seconds, "feedback": FeedbackLog(run.path, header["data_hash"])}
    return Trainer(config.method, config.machine, runtime, splits, run, **loading)


def _refuse_more_directions_than_parameters(config: Config, runtime: Runtime) -> None:
    """Raise UserError where a rule that projects has more directions than there are parameters."""
    directions, rule = config.method.perturbations, config.method.rule
    parameters = sum(map(math.prod, runtime.spec.shapes.values()))
    if rule.projects and directions > parameters:
        raise UserError(
            f"--update-rule {rule.name}: {directions} directions a step, but {parameters} parameters are trained: lower"
            " --directions or --num-perturbations"
        )


def follow(config: Config) -> dict:
    """Run this machine's part of an engine, `node_rank` of `nnodes`, until the trainer on the first machine ends it.

    Args:
        config: the trainer's, but for node_rank; its run directory is not touched.
    Raises:
        RunError: the engine ended before the trainer did.
    """
    with loaded(config, need="train") as (runtime, _, _):
        require(runtime, Follower, "--engine-arg node_rank", other="sglang").follow()
    return {}


def with_adapter_options(config: Config) -> Config:
    """The configuration with what its --adapter fixes: the kind of tuning, and the options of that."""
    path = config.model.tuning.adapter
    if not path:
        return config
    fixed = {"adapter": path} | {name: value for name, value in adapter_options(path).items() if name != "model"}
    given = {name: value for name, value in config.to_dict().items() if name in config.given}
    refuse_contradiction(given, fixed, f"--adapter {path}")
    refuse_strangers(Config.options(), given | fixed)
    return config.replace(**fixed)


def with_layers(config: Config, ranks: Ranks | None = None) -> Config:
    """The configuration with the layer that --layers-to-transform auto stands for, the first process's on all.

    Raises:
        UserError: there is none.
    """
    if "auto" not in getattr(config.model.tuning, "layers_to_transform", ()):
        return config
    from mezo.models.outliers import first_outlier

    with waiting(f"looking for the first activation outlier of {config.model.base}"):
        model = config.model
        checkpoint = Checkpoint.of(model.base, "model", model.quantization, model.trust_remote_code)
        layer, ratios = first_outlier(checkpoint)
    if ranks is not None and ranks.size > 1:
        layer = int(ranks.gather([float(layer)])[0][0])
    seen = ", ".join(f"{ratio:.0f}" for ratio in ratios)
    say(f"layer {layer} has the first activation outlier and is trained (largest over median, layer by layer: {seen})")
    return config.replace(layers_to_transform=(layer,))


def _started_here(config: Config) -> bool:
    """True if this launch of torchrun made the run directory, before one of its ranks died."""
    run = RunDirectory(Path(config.machine.output_dir))
    if not run.launch.is_file() or run.launch.read_text() != launch_id() or not launch_id():
        return False
    saved = run.read_config()
    if "auto" in getattr(config.model.tuning, "layers_to_transform", ()):  # the run has what was chosen for it
        saved = saved.replace(layers_to_transform=("auto",))
    return saved == config


def resume(
    path: str,
    ranks: Ranks | None = None,
    machine: dict | None = None,
    until: int | None = None,
    reward: str = "",
    trust_reward: bool = False,
) -> dict | None:
    """Carry an interrupted run through, to the bit; check a finished one.

    Args:
        path: run directory.
        ranks: the processes that share the work.
        machine: options that a resumed run may have otherwise (marked RESUMABLE): where, how and how far it goes on;
            and `steps`, if there are more than the run has.
        until: number of steps after which it pauses again.
        reward: the run's own reward, wherever its file is now.
        trust_reward: run the code of the reward that the run names.
    Returns:
        As `train`; for a finished run, its result.
    """
    if machine and (config := RunDirectory(Path(path)).read_config().replace(**machine)).machine.follows:
        sha256 = read_header(RunDirectory(Path(path)).trajectory).get("reward_hash")
        return follow(config.replace(reward=trusted_reward(config.method.reward, sha256, reward, trust_reward, path)))
    ranks = ranks or Ranks()
    run = RunDirectory.open(path) if ranks.leads else RunDirectory(Path(path))
    saved = run.read_config()
    config = longer(saved, machine or {})
    first_line, records = read_trajectory(run.trajectory)
    stuck = stalled(run.read_metrics(), config.method.early_stopping)
    if stuck and config.method.steps > saved.method.steps:
        raise UserError(
            f"--steps {config.method.steps}: dev did not improve for {config.method.early_stopping} evaluations, which"
            " ended the run: give --early-stopping 0, or a larger number, too"
        )
    ended = len(records) >= config.method.steps or stuck
    # the patience that ended a run may have been given when it was resumed; without an option nobody asks it to go on
    if run.result.is_file() and (ended or (not machine and run.read_result().get("stopped_early"))):
        return _check_finished(run)
    if ranks.leads:
        dashboards.check(config.machine.report_to)
    _check_ranks(config, ranks)
    trusted = trusted_reward(config.method.reward, first_line.get("reward_hash"), reward, trust_reward, path)
    config = _with_product_of(config.replace(reward=trusted), first_line)
    with loaded(config, need="train", done=len(records)) as (runtime, splits, seconds):
        return carry_on(run, config, runtime, splits, seconds, ranks, until)


def longer(saved: Config, machine: dict) -> Config:
    """A run's configuration with what it is resumed with. If it is lengthened it is evaluated as often as before."""
    config = saved.replace(**machine)
    steps = saved.method.steps
    if config.method.steps < steps:
        raise UserError(f"--steps {config.method.steps}: the run has {steps}; a larger number lengthens it")
    if config.method.steps == steps or config.method.eval_every:
        return config
    return config.replace(eval_every=evaluation_interval(saved.method))


def carry_on(
    run: RunDirectory,
    config: Config,
    runtime: Runtime,
    splits: dict,
    seconds: float = 0.0,
    ranks: Ranks | None = None,
    until: int | None = None,
) -> dict | None:
    """`resume` an open run on what is loaded already.

    Args:
        run: its directory, opened.
        config: the run's.
        runtime: prepared.
        splits: tokenised examples by split, as `loaded` gives them.
        seconds: what loading took.
        ranks: the processes that share the work; by default those that torchrun started.
        until: number of steps after which it pauses.
    Returns:
        As `train`.
    """
    ranks = ranks or Ranks()
    return carry_through(reopen(run, config, runtime, splits, seconds, ranks), ranks, until)


def reopen(
    run: RunDirectory,
    config: Config,
    runtime: Runtime,
    splits: dict,
    seconds: float = 0.0,
    ranks: Ranks | None = None,
) -> Trainer:
    """An open run at the end of its log, as `carry_on` carries it through: theta is what the log gives."""
    ranks = ranks or Ranks()
    first_line, records = read_trajectory(run.trajectory)
    # the adapter it started from has been copied into the run: its source may be gone
    started = config.replace(adapter="") if config.model.tuning.adapter else config
    _same_run(first_line, make_header(started, runtime.spec, splits, logged=first_line), str(run.path))
    if ranks.leads:
        check_lines(run, first_line, records)
    runtime.load(initial_theta(first_line, run.path / INITIAL))
    if ranks.leads:
        steps = run.read_config().method.steps
        if config.method.steps > steps:
            _say_schedule(config, len(records), steps)
            run.lengthen(run.read_config().replace(steps=config.method.steps, eval_every=config.method.eval_every))
        run.result.unlink(missing_ok=True)  # of a run that ended early and now goes on
        run.write_metrics([row for row in run.read_metrics() if row["step"] <= len(records)])
    replay_records(runtime.update, records)
    loading = {"ranks": ranks, "seconds_loading": seconds, "feedback": FeedbackLog(run.path, first_line["data_hash"])}
    return Trainer(config.method, config.machine, runtime, splits, run, records, **loading)


def _say_schedule(config: Config, done: int, before: int) -> None:
    steps, schedule = config.method.steps, config.method.lr_schedule
    say(f"lengthened from {before} to {steps} steps, evaluated every {config.method.eval_every}")
    if schedule != "constant":
        past = f"the {done} steps done had the learning rates of a run of {before}"
        say(f"--lr-schedule {schedule}: {past}, the rest have those of one of {steps}")


def carry_through(trainer: Trainer, ranks: Ranks, until: int | None = None) -> dict | None:
    """Train to the last step, or to `until`, and let other processes in again."""
    try:
        result = trainer.train(until)
    finally:
        trainer.run.release()
    ranks.close()
    return result


def _check_ranks(config: Config, ranks: Ranks) -> None:
    shared = config.method.batch_size if config.machine.parallel == "data" else config.method.perturbations
    if shared < ranks.size:
        name = "batch-size" if config.machine.parallel == "data" else "num-perturbations"
        raise UserError(f"--{name} {shared} cannot be shared by {ranks.size} ranks: raise it or start fewer")


def evaluate(config: Config, adapter: Path | None, examples: bool = False) -> dict[str, dict]:
    """Score an adapter on the splits that `config` names.

    Args:
        config: model and data; its run settings are not used.
        adapter: adapter directory, or None for the model itself (a fresh adapter's output is zero).
        examples: show single examples beside the figures.
    Returns:
        As `evaluate_split`, by split; with num_demonstrations train gives these and is not scored.
    """
    whole = {"trunk_cache": "off"} if config.machine.runtime.name == "hf" else {}  # each text is seen once
    config = with_objective(config).replace(**whole, eval_test=True, eval_train=True)
    if adapter is None and config.model.tuning.name == "prefix":
        raise UserError("--tuning prefix: without a run or an adapter there is no prefix to score; leave it out")
    head = config.model.tuning.head
    if adapter is None and head == "linear":
        raise UserError("--head linear: without a run or an adapter the head is zero; leave it out, or give one")
    if config.machine.follows:
        raise UserError("--engine-arg node_rank: only mezo train runs on several machines; use one, or --runtime hf")
    with loaded(config, adapter=str(adapter or "")) as (runtime, splits, _):
        if adapter is not None:
            trusted = config.model.trust_remote_code
            check_base(adapter, config.model.base, head, runtime.spec.base, trusted)
            runtime.load(load_adapter(adapter, runtime.spec.shapes))
            runtime.prove_adapter()
        elif head == "classification":  # the checkpoint's own
            runtime.load(runtime.initial_theta(config.method.seed))
        judged = judges(config.method)
        groups = config.method, config.machine
        scored = {
            split: evaluate_split(*groups, runtime, split, part, judged, splits.decode)
            for split, part in splits.items()
        }
        return scored if examples else {split: figures_of(row) for split, row in scored.items()}


def evaluate_target(
    given: dict, target: Path | None = None, trust_reward: bool = False, examples: bool = False
) -> dict[str, dict]:
    """`evaluate` of what the user names.

    Args:
        given: flat options.
        target: a run or an adapter directory; None is the model alone.
        trust_reward: run the code of the reward that a run names.
        examples: as in `evaluate`.
    Raises:
        UserError: also if options say otherwise of the adapter than it does itself.
    """
    base, adapter = {"output_dir": "unused"}, target
    if target is None:
        fixed = {}
    elif (target / "trajectory.jsonl").is_file():
        base, adapter = run_to_score(target)
        tuning = {"tuning"} | {option.name for option in Config.options().values() if option.choice == "tuning"}
        fixed = {name: value for name, value in base.items() if name in tuning}
        sha256, reward = read_header(target / "trajectory.jsonl").get("reward_hash"), given.get("reward", "")
        base |= {"reward": trusted_reward(base["reward"], sha256, reward, trust_reward, str(target))}
    elif (target / "config.json").is_file():
        raise UserError(f"mezo eval {target}: that is a model: use mezo eval --model {target}")
    else:
        known = base_of(target)
        base |= (found := adapter_options(target)) | ({"quantization": quantised_here(known)} if known else {})
        fixed = {name: value for name, value in found.items() if name != "model"}
    path = given.get("adapter", "")
    if path and path != base.get("adapter", ""):
        raise UserError(f"--adapter {path}: mezo eval takes an adapter in front of its options: mezo eval {path} ...")
    refuse_contradiction(given, fixed, str(target))
    return evaluate(Config.of(**over(Config.options(), base, given)), adapter, examples)


def run_to_score(path: Path) -> tuple[dict, Path | None]:
    """Options and adapter with which `evaluate` scores what a run kept; a trained model stands in for its base.

    Raises:
        UserError: no run, or its model is not there.
    """
    run = RunDirectory(path)
    config = run.read_config()
    if config.model.tuning.is_lora and config.model.tuning.from_model:
        return {**config.to_dict(), "tuning": "lora"}, run.adapter  # what it left is a whole one
    if config.model.tuning.name != "full":
        return config.to_dict(), run.adapter
    if not run.model.is_dir():
        raise UserError(f"{path} has no model/ yet: let the run finish, or rebuild one with mezo replay")
    return {**config.to_dict(), "model": str(run.model)}, None


def replay(run: str, output_dir: str, until: str = "best", backend: str | None = None, model: str = "") -> int:
    """Rebuild theta from a run's log and write it as the run keeps it; return the number of steps applied.

    Args:
        run: its directory.
        output_dir: directory to create.
        until: "best" (what the run kept), "last", or a number of steps.
        backend: of the fused ops; None by device.
        model: where the base of a run that trained all of it is now; empty is where the log says.
    Raises:
        UserError: no such run, or something is at `output_dir` already.
    """
    refuse_output(output_dir)
    theta, header, steps = rebuild(run, until, backend, model)
    outcome.write(Path(run), Path(output_dir), header, theta)
    return steps


@contextmanager
def loaded(
    config: Config,
    need: str | None = None,
    done: int = 0,
    adapter: str = "",
    make: Callable[..., Runtime] | None = None,
) -> Iterator[tuple[Runtime, dict, float]]:
    """Runtime, examples and the seconds it took. Data first: it is quick to load, and most mistakes are there.

    Args:
        config: the run's.
        need: a split that must be there.
        done: steps of the run that are in its log.
        adapter: see `Runtime.prepare`.
        make: another runtime than --runtime names; its arguments are those of `SGLangRuntime`.
    """
    started = time.perf_counter()
    with waiting(f"loading the data and {config.model.base}"):
        config.data.refuse_missing_files()
        tokenizer = load_tokenizer(config.model.base, config.model.trust_remote_code)
        checkpoint = _checkpoint_of(config)
        splits = load_splits(config, tokenizer, masked=checkpoint.masked)
        vocabulary = getattr(checkpoint.config.get_text_config(), "vocab_size", None)
        if vocabulary is not None:  # else it is no model of text, which is said where it is loaded
            refuse_unknown_ids(splits, vocabulary, tokenizer)
        for sentence in oddities({split: looked_at(examples) for split, examples in splits.items()}, tokenizer):
            say(sentence)
        if not config.method.eval_test:
            splits.pop("test", None)
        if need is not None and need not in splits:
            raise UserError("--train-file is missing: give one, or a --task")
        if need is not None and config.method.early_stopping and "dev" not in splits:
            raise UserError(
                f"--early-stopping {config.method.early_stopping} needs a dev set: give --dev-file, or leave it out"
            )
        for judge in judges(config.method).values():  # a reward that takes nothing is found before the model is loaded
            judge(next(iter(splits.values()))[0], "")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        runtime = _runtime(config, pad, checkpoint, done, len(next(iter(splits.values()))[0].options), make)
    try:
        runtime.prepare(splits, adapter)
        yield runtime, splits, time.perf_counter() - started - runtime.seconds_filling - runtime.seconds_proving
    finally:
        runtime.close()


def _runtime(
    config: Config,
    pad: int,
    checkpoint: Checkpoint,
    done: int,
    options: int,
    make: Callable[..., Runtime] | None,
) -> Runtime:
    """The runtime that --runtime names; the other one's libraries are not imported.

    Args:
        config: the run's.
        pad: token id to pad with.
        checkpoint: of the model.
        done: steps of the run that are in its log.
        options: of an example, which are the classes of a head that has such.
        make: makes another one.
    """
    model, machine, work = config.for_runtime
    work = dataclasses.replace(work, done=done, classes=options)
    if make is not None:
        return make(model, machine, work, pad, checkpoint)
    if config.machine.runtime.name == "sglang":
        try:
            from mezo.runtimes.sglang.runtime import SGLangRuntime
        except ImportError as error:
            raise UserError(f"--runtime sglang: {error}; install it: pip install 'mezo-kernels[sglang]'") from error

        return SGLangRuntime(model, machine, work, pad, checkpoint)
    from mezo.runtimes.hf.runtime import HFRuntime

    return HFRuntime(model, machine, work, pad, checkpoint)


def _same_run(logged: dict, now: dict, path: str) -> None:
    same = ("run_seed", "data_hash", "reward_hash", "rule", "dtype", "quantization", "peft", "shapes", "frozen")
    code = ("code_hash",) if "code_hash" in logged else ()  # older programs wrote none
    for key in (*same, "model_hash", *code):
        a, b = logged.get(key), now.get(key)
        if key in ("shapes", "frozen"):
            a, b = ({name: tuple(shape) for name, shape in shapes.items()} for shapes in (a or {}, b or {}))
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

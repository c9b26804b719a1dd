"""What each command does, as functions; cli.py parses arguments and prints errors."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mezo import checkpoint
from mezo.checkpoint import RunDirectory
from mezo.config import Config, UserError
from mezo.evaluation import score_split
from mezo.objectives import evaluate as evaluate_scores
from mezo.parallel import Ranks
from mezo.runtimes.base import Runtime
from mezo.runtimes.merge import merge
from mezo.runtimes.peft_model import is_masked, load_tokenizer
from mezo.runtimes.stacks import complete_fields, complete_stacks
from mezo.tasks import load_splits, with_objective
from mezo.trainer import Trainer
from mezo.trajectory import read_trajectory


def train(config: Config) -> dict | None:
    """Start a run and carry it through. Under torchrun all ranks call this; after an elastic restart it resumes.

    Returns:
        What result.json holds ({} on ranks above 0), or None if Ctrl-C stopped it.
    Raises:
        UserError: before anything is written.
    """
    if config.num_demonstrations:
        raise UserError("--num-demonstrations is for mezo eval, training prompts have none: leave it out")
    ranks, config = Ranks(), with_objective(with_adapter_options(config).absolute())
    if ranks.restarted and _started_here(config):
        return resume(config.output_dir, ranks)
    if ranks.leads:
        checkpoint.refuse_existing(config.output_dir)
    _check_ranks(config, ranks)
    with _loaded(config, need="train") as (runtime, splits, seconds):
        header = checkpoint.make_header(config, runtime.spec, splits)
        initial = Path(config.adapter) / checkpoint.WEIGHTS
        runtime.load(checkpoint.initial_theta(header, initial))
        if ranks.leads:
            run = RunDirectory.create(config.output_dir, config, header, initial if config.adapter else None)
        else:
            run = RunDirectory(Path(config.output_dir))
        return _carry_through(Trainer(config, runtime, splits, run, ranks=ranks, seconds_loading=seconds), ranks)


def with_adapter_options(config: Config) -> Config:
    """The configuration with what its --adapter fixes: rank, scale, modules and layers are the adapter's own."""
    if not config.adapter:
        return config
    fixed = {k: v for k, v in checkpoint.adapter_options(config.adapter).items() if k != "model"}
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name, value in fixed.items():
        given = getattr(config, name)
        if given != defaults[name] and _unordered(given) != _unordered(value):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given} contradicts --adapter {config.adapter}, which has {value}: leave it out")
    return dataclasses.replace(config, **fixed)


def _unordered(value):
    return sorted(value) if isinstance(value, tuple) else value


def _started_here(config: Config) -> bool:
    """True if this launch of torchrun made the run directory, before one of its ranks died."""
    run = RunDirectory(Path(config.output_dir))
    same_launch = run.launch.is_file() and run.launch.read_text() == checkpoint.launch_id()
    return same_launch and run.read_config() == config


def resume(path: str, ranks: Ranks | None = None, machine: dict | None = None) -> dict | None:
    """Carry an interrupted run through, to the bit; check a finished one.

    Args:
        path: run directory.
        ranks: the processes that share the work.
        machine: options of `mezo.config.MACHINE` that differ from the run's: where and how it goes on.
    Returns:
        As `train`; for a finished run, its result.
    """
    ranks = ranks or Ranks()
    run = RunDirectory.open(path) if ranks.leads else RunDirectory(Path(path))
    config = dataclasses.replace(run.read_config(), **(machine or {}))
    first_line, records = read_trajectory(run.trajectory)
    if run.result.is_file() and len(records) >= config.steps:
        return _check_finished(run)
    _check_ranks(config, ranks)
    if ranks.leads:
        run.write_metrics([row for row in run.read_metrics() if row["step"] <= len(records)])
    with _loaded(config, need="train") as (runtime, splits, seconds):
        # the adapter it started from has been copied into the run: its source may be gone
        own = dataclasses.replace(config, adapter="")
        _same_run(first_line, checkpoint.make_header(own, runtime.spec, splits), path)
        theta = checkpoint.initial_theta(first_line, run.path / checkpoint.INITIAL)
        checkpoint.replay_records(theta, records)
        runtime.load(theta)
        return _carry_through(Trainer(config, runtime, splits, run, records, ranks, seconds_loading=seconds), ranks)


def _carry_through(trainer: Trainer, ranks: Ranks) -> dict | None:
    result = trainer.train()
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
        adapter: adapter directory, or None for the base model with a fresh adapter (whose output is zero).
    Returns:
        accuracy, loss, f1 and auc by split; with num_demonstrations train gives these and is not scored.
    """
    config = dataclasses.replace(with_objective(config), trunk_cache="off", eval_train=True)
    with _loaded(config) as (runtime, splits, _):
        if adapter is not None:
            runtime.load(checkpoint.load_adapter(adapter, runtime.spec.shapes))
        size = config.eval_batch_size or config.batch_size
        results = {}
        for split, examples in splits.items():
            labels = torch.tensor([example.label for example in examples])
            scores = score_split(runtime, split, len(examples), size)
            results[split] = evaluate_scores(scores, labels, config.objective)
        return results


def replay(run: str, output_dir: str, until: str = "best", backend: str | None = None) -> int:
    """Rebuild an adapter from a run's log and write it; return the number of steps applied."""
    _refuse_output(output_dir)
    theta, header, steps = checkpoint.replay(run, until, backend)
    checkpoint.save_adapter(Path(output_dir), header["peft"], theta)
    return steps


def export(run: str, output_dir: str, form: str = "peft", dtype: str = "auto") -> None:
    """Write a run's best adapter for others to use.

    Args:
        run: run directory, or any adapter directory.
        output_dir: directory to create.
        form: "peft", an adapter; "sglang", the same with zeros for the projections that SGLang's loader wants beside
            trained ones; "merged", the base model with the adapter added in float32 and cast once.
        dtype: of the merged model; auto is that of the base checkpoint.
    """
    _refuse_output(output_dir)
    adapter = Path(run) / "adapter" if (Path(run) / "adapter").is_dir() else Path(run)
    peft = checkpoint.read_peft_config(adapter)
    if peft.get("modules_to_save") and form != "peft":
        raise UserError(f"--format {form}: the adapter has a linear head, which this form cannot hold; use peft")
    if form == "merged":
        merge(peft["base_model_name_or_path"], adapter, Path(output_dir), dtype)
        return
    tensors = checkpoint.read_adapter(adapter)
    if form == "sglang":
        tensors = complete_stacks(peft["base_model_name_or_path"], tensors)
        peft = complete_fields(peft, tensors)
    checkpoint.save_adapter(Path(output_dir), peft, tensors)


def import_adapter(adapter: str, output_dir: str) -> None:
    """Turn a LoRA adapter made elsewhere into one that `--adapter` starts from: float32, canonical names, checked."""
    _refuse_output(output_dir)
    peft = checkpoint.read_peft_config(adapter)
    checkpoint.check_plain_lora(peft, adapter)
    theta = checkpoint.read_adapter(Path(adapter))
    kept = {key: peft[key] for key in ("base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    layers, task = peft.get("layers_to_transform"), peft.get("task_type")
    if peft.get("modules_to_save"):
        kept["modules_to_save"] = peft["modules_to_save"]
    plain = {"peft_type": "LORA", "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    kept |= {"layers_to_transform": layers, "task_type": task, **plain}
    checkpoint.save_adapter(Path(output_dir), kept, theta)


def _refuse_output(path: str) -> None:
    if Path(path).exists():
        raise UserError(f"--output-dir {path} exists and is never overwritten: choose another")


@contextmanager
def _loaded(config: Config, need: str | None = None) -> Iterator[tuple[Runtime, dict, float]]:
    """Runtime, examples and the seconds it took. Data first: it is quick to load, and most mistakes are there."""
    started = time.perf_counter()
    config.refuse_missing_files()
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config, tokenizer, masked=is_masked(config.model))
    if need is not None and need not in splits:
        raise UserError("--train-file is missing: give one, or a --task")
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
            from mezo.runtimes.sglang import SGLangRuntime
        except ImportError as error:
            raise UserError(f"--runtime sglang: {error}; install it: pip install 'mezo-kernels[sglang]'") from error

        return SGLangRuntime(config, pad)
    from mezo.runtimes.hf import HFRuntime

    return HFRuntime(config, pad)


def _same_run(logged: dict, now: dict, path: str) -> None:
    for key in ("run_seed", "data_hash", "dtype", "peft", "shapes", "model_hash"):
        a, b = logged[key], now[key]
        if key == "shapes":
            a, b = ({name: tuple(shape) for name, shape in shapes.items()} for shapes in (a, b))
        if a != b:
            raise UserError(
                f"--resume {path}: {key} of the log and of the model at hand differ: {_short(a)} and {_short(b)}"
            )


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_finished(run: RunDirectory) -> dict:
    """Rebuild the adapter of a finished run from its log and compare it with adapter/."""
    theta, _, steps = checkpoint.replay(run.path)
    different = checkpoint.same_bits(theta, checkpoint.read_adapter(run.adapter))
    if different:
        raise UserError(
            f"{run.path}: adapter/ is not what the log gives ({different} differs);"
            f" rebuild it with: mezo replay {run.path} --output-dir NEW"
        )
    return {**run.read_result(), "checked_steps": steps}

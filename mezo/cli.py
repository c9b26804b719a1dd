"""The `mezo` command, as USAGE lists it. Heavy imports wait until a command needs them."""

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import tyro
import yaml
from rich.console import Console
from rich.table import Table

from mezo.config import MACHINE, Config
from mezo.errors import RunError, UserError
from mezo.options import ENGINE

USAGE = """usage: mezo COMMAND [options]

  train    fine-tune a model with forward passes only; --resume RUN continues a run
  eval     score a run's adapter, any adapter, or a model without one
  replay   rebuild a run's adapter or model from its log
  export   write a run's adapter, the base model with the adapter merged, or the trained model
  import   make an adapter of someone else's ready for --adapter
  trajectory show, verify or truncate a run's log
  report   what finished runs did, and where time and tokens went; also as a web page with curves
  tune     choose lr and eps by short runs; --resume DIR continues a sweep
  tasks    list what --task takes: prompts, answers, objectives
  verify   compare every backend with the reference on this machine, bit for bit
  reproduce run a published experiment and print its figure beside ours
  demo     fine-tune a small model on movie reviews, from download to plots

mezo COMMAND --help lists a command's options."""

EVAL_USAGE = """usage: mezo eval RUN_OR_ADAPTER [data options of mezo train]
       mezo eval --model MODEL [data options of mezo train]

Scores an adapter, or a model without one, on the given splits. --num-demonstrations N puts N training examples with
their answers in front of each prompt (in-context learning)."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; exit code 0, 1 (the run or check failed), 2 (a mistake in the call) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": _train,
        "eval": _eval,
        "replay": _replay,
        "export": _export,
        "import": _import,
        "trajectory": _trajectory,
        "report": _report,
        "tune": _tune,
        "tasks": _tasks,
        "verify": _verify,
        "reproduce": _reproduce,
        "demo": _demo,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        return _fail(f"unknown command {argv[0]!r}: expected one of {', '.join(commands)}", 2)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="torchvision")  # SGLang brings it; nothing here looks at pictures
    try:
        return commands[argv[0]](argv[1:])
    except UserError as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error}; nothing that was logged is lost, `mezo train --resume RUN` continues a run", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"mezo: error: {message}", file=sys.stderr)
    return code


def _train(argv: list[str]) -> int:
    path, rest = take_option(argv, "--resume")
    if path is None:
        config = _parse(argv, "mezo train")
        from mezo import commands

        if config.adapter:  # what is given and happens to be a default is given all the same
            fixed = commands.fixed_by_adapter(config)
            commands.refuse_other_adapter(_parse(argv, "mezo train", fixed), fixed, f"--adapter {config.adapter}")
        result = commands.train(config)
    else:
        machine = _machine_options(path, rest)
        from mezo import commands

        result = commands.resume(path, machine=machine)
    if result is None:
        return 130
    if result:
        _show_result(result)
    return 0


@dataclasses.dataclass(frozen=True)
class UncheckedConfig(Config):
    """Fine-tune a language model with forward passes only (MeZO, arXiv 2305.17333).

    --config FILE reads any of these options from YAML (flags win); --resume RUN, alone, continues a run.
    """

    def __post_init__(self):
        """Leave the checks to the Config made of these values, so that a mistake is one line."""


def _parse(argv: list[str], prog: str, base: dict | None = None) -> Config:
    return Config(**option_values(argv, prog, base))


def option_values(argv: list[str], prog: str, base: dict | None = None, kind: type = UncheckedConfig) -> dict:
    """Flags, over --config FILE, over `base`, over the defaults of `kind`."""
    file, rest = take_option(argv, "--config")
    default = kind.from_dict({**(base or {}), **(_read_yaml(file) if file else {})})
    return dataclasses.asdict(tyro.cli(kind, default=default, args=rest, prog=prog))


def _read_yaml(path: str) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected a mapping of option names to values")
    return values


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """(value of --name VALUE or --name=VALUE, the other arguments)."""
    for i, argument in enumerate(argv):
        if argument == name:
            if i + 1 == len(argv):
                raise UserError(f"{name} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if argument.startswith(name + "="):
            return argument[len(name) + 1 :], argv[:i] + argv[i + 1 :]
    return None, argv


def _machine_options(path: str, rest: list[str]) -> dict:
    """Options given with --resume that say where the run goes on; all others are the run's own, and must agree."""
    if not rest:
        return {}
    saved = dataclasses.asdict(_saved_config(Path(path)))
    if take_option(rest, "--runtime")[0] == "hf":
        # the engine's options have no meaning there
        saved |= {name: getattr(Config, name) for name in ENGINE}
    asked = dataclasses.asdict(_parse(rest, "mezo train", saved))
    for name, value in asked.items():
        if value != saved[name] and name not in MACHINE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} contradicts the run, which has {saved[name]}: give --resume {path} alone")
    return {name: asked[name] for name in MACHINE}


def _saved_config(run: Path) -> Config:
    from mezo.checkpoint import RunDirectory

    return RunDirectory(run).read_config()


def _eval(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(EVAL_USAGE)
        return 0 if argv else 2
    from mezo import commands
    from mezo.checkpoint import adapter_options

    if argv[0].startswith("-"):
        config = _parse(argv, "mezo eval", {"output_dir": "unused"})
        commands.refuse_other_adapter(config, {}, "the model alone")
        _show_splits(commands.evaluate(config, None))
        return 0
    target, rest = Path(argv[0]), argv[1:]

    if (target / "trajectory.jsonl").is_file():
        base, target = commands.run_to_score(target)
    elif (target / "config.json").is_file():
        raise UserError(f"mezo eval {target}: that is a model: use mezo eval --model {target}")
    else:
        base = {"output_dir": "unused", **adapter_options(target)}
    config = _parse(rest, "mezo eval", base)
    commands.refuse_other_adapter(config, base, argv[0])
    _show_splits(commands.evaluate(config, target))
    return 0


@dataclasses.dataclass(frozen=True)
class _ReplayOptions:
    """Rebuild a run's adapter from its log alone, or its model from log and base model, bit for bit."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    output_dir: str
    """Directory to create, of an adapter or a model."""
    until: str = "best"
    """best (what the run kept), last, or a number of steps."""
    model: str = ""
    """Where the base of a --tuning full run is now, if it was moved; it must be the same to the bit."""
    backend: Literal["auto", "reference", "numba", "triton"] = "auto"
    """Backend of the fused ops; auto goes by device."""


def _replay(argv: list[str]) -> int:
    options = tyro.cli(_ReplayOptions, args=argv, prog="mezo replay")
    from mezo import commands

    backend = None if options.backend == "auto" else options.backend
    steps = commands.replay(options.run, options.output_dir, options.until, backend, options.model)
    print(f"replayed {steps} steps of {options.run} into {options.output_dir}")
    return 0


@dataclasses.dataclass(frozen=True)
class _ExportOptions:
    """Write a run's best adapter or model for others to use."""

    run: tyro.conf.Positional[str]
    """Run directory, or any adapter directory."""
    output_dir: str
    """Directory to create."""
    format: Literal["peft", "sglang", "merged"] = "peft"
    """peft: the adapter; sglang: the same in a form its --lora-paths takes; merged: base model and adapter in one, or
    the model that --tuning full trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the merged model; auto is that of the base checkpoint."""


def _export(argv: list[str]) -> int:
    options = tyro.cli(_ExportOptions, args=argv, prog="mezo export")
    from mezo import commands

    commands.export(options.run, options.output_dir, options.format, options.dtype)
    print(f"exported {options.run} to {options.output_dir}")
    return 0


@dataclasses.dataclass(frozen=True)
class _ImportOptions:
    """Make an adapter from elsewhere (LoRA or prefix, any dtype) ready for `mezo train --adapter`."""

    adapter: tyro.conf.Positional[str]
    """PEFT adapter directory."""
    output_dir: str
    """Adapter directory to create."""


def _import(argv: list[str]) -> int:
    options = tyro.cli(_ImportOptions, args=argv, prog="mezo import")
    from mezo import commands

    commands.import_adapter(options.adapter, options.output_dir)
    print(f"imported {options.adapter}; start from it with: mezo train --adapter {options.output_dir}")
    return 0


@dataclasses.dataclass(frozen=True)
class _TrajectoryOptions:
    """Show, check or cut back a run's log."""

    action: tyro.conf.Positional[Literal["show", "verify", "truncate"]]
    """show: a summary; verify: that every line follows from the header and config; truncate: cut back to --step."""
    run: tyro.conf.Positional[str]
    """Run directory."""
    step: int = -1
    """Steps to keep, for truncate; what is cut off is kept in the run directory."""


def _trajectory(argv: list[str]) -> int:
    options = tyro.cli(_TrajectoryOptions, args=argv, prog="mezo trajectory")
    from mezo import logbook

    if options.action == "show":
        for label, text in logbook.summary(options.run).items():
            print(f"{label:<17} {text}")
    elif options.action == "verify":
        print(f"{options.run}: {logbook.verify(options.run)} steps, each follows from the header and config.json")
    else:
        kept = logbook.truncate(options.run, options.step)
        print(f"cut {options.run} back to {options.step} steps; what was there is in {kept}")
    return 0


def _report(argv: list[str]) -> int:
    from mezo import cli_report

    return cli_report.main(argv)


def _tune(argv: list[str]) -> int:
    from mezo import cli_tune

    return cli_tune.main(argv)


def _tasks(argv: list[str]) -> int:
    if argv:
        raise UserError(f"mezo tasks takes no options, got {argv[0]}")
    from mezo.tasks import TASKS

    for task in TASKS.values():
        print(f"{task.name}  (trains {task.objective}, reports {task.metric})")
        for kind, prompt in (("continues", task.prompt), ("fills a mask", task.masked)):
            if prompt:
                words = " ".join(map(repr, prompt.label_words)) or "each row's own options"
                print(f"    {kind:<12} {json.dumps(prompt.template, ensure_ascii=False)}  {words}")
    return 0


def _verify(argv: list[str]) -> int:
    options = tyro.cli(_VerifyOptions, args=argv, prog="mezo verify")
    import mezo_kernels

    try:
        rows = mezo_kernels.verify(options.device or None)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    table = Table("backend", "check", "result", "detail", title="against the reference and the frozen vectors")
    for row in rows:
        table.add_row(row.backend, row.check, "ok" if row.ok else "MISMATCH", row.detail)
    Console().print(table)
    return 0 if all(row.ok for row in rows) else 1


@dataclasses.dataclass(frozen=True)
class _VerifyOptions:
    """Compare every available backend with the reference and the frozen vectors on this machine, bit for bit."""

    device: str = ""
    """Device to check; by default the CPU, and the GPU where there is one."""


def _reproduce(argv: list[str]) -> int:
    from mezo import cli_reproduce

    return cli_reproduce.main(argv)


def _demo(argv: list[str]) -> int:
    options = tyro.cli(_DemoOptions, args=argv, prog="mezo demo")
    from mezo import demo

    return demo.run(options.prompt, options.steps, Path(options.output_dir), options.runtime)


@dataclasses.dataclass(frozen=True)
class _DemoOptions:
    """Fetch a small model and labelled film reviews, fine-tune the last layer, and check the result.

    The first time about 100 MB are downloaded; after that it works offline.
    """

    prompt: Literal["it-was", "sentiment"] = "it-was"
    """'{text} It was' with terrible / great, or 'Review: {text} Sentiment:' with negative / positive."""
    runtime: Literal["hf", "sglang"] = "hf"
    """What computes the losses."""
    steps: int = 0
    """Optimisation steps; 0 is 4000, or 1000 with sglang, whose engine is made for GPUs."""
    output_dir: str = "runs/demo"
    """Run directory; an unfinished one is resumed, a finished one is kept and a numbered one made beside it."""


def _show_result(result: dict) -> None:
    for split in ("train", "test"):
        if split in result:
            _show_splits({f"{split} before": result[split]["before"], f"{split} after": result[split]["after"]})
    console = Console()
    best, steps, seconds = result["best_step"], result["steps"], result["seconds_training"]
    console.print(f"best step {best} of {steps}; {seconds:.1f} s of training, {result['steps_per_second']:.1f} steps/s")
    scored, reused = result["tokens_scored"], result["tokens_reused"]
    console.print(f"{scored:,} tokens scored, {reused:,} of them reused; {result['skipped_steps']} steps skipped")
    if "checked_steps" in result:
        console.print(
            f"the run is finished; its log gives what it kept, bit for bit ({result['checked_steps']} steps replayed)"
        )


def _show_splits(splits: dict[str, dict]) -> None:
    names = {"accuracy": "accuracy", "auc": "AUC", "f1": "F1", "exact_match": "exact match", "reward": "reward"}
    keys = [key for key in (*names, "loss") if any(key in row for row in splits.values())]
    table = Table("split", *(names.get(key, key) for key in keys))
    for split, row in splits.items():
        cells = ("-" if row.get(key) is None else f"{row[key]:.4f}" for key in keys)
        table.add_row(split, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())

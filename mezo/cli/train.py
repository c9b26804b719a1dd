"""`mezo train`: a new run, or one that goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mezo.cli.parsing import given
from mezo.cli.showing import show_result
from mezo.config import Config, refuse_contradiction
from mezo.config.options import RESUMABLE
from mezo.config.presets import with_preset
from mezo.errors import UserError, require
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Fine-tune a language model with forward passes only (MeZO, arXiv 2305.17333).

    --model, --output-dir and --task or --train-file make a run; `mezo demo` shows one.
    """

    config: str = ""
    """YAML file that may give any of the options below by name, such as batch_size: 8; flags win over it."""
    preset: Literal["none", "few-steps"] = "none"
    """Begin with options that were measured together, which flags and --config win over. few-steps: lora-xs r 16
    on a calibrated lora_A, and a direction for each example of a batch of 128, as in LEADERBOARD.md."""
    resume: str = ""
    """Directory of a run that was stopped: it goes on, to the same bits as if it had not been. Only options that say
    where, how or how far it is computed may be given beside it, and --reward; more --steps than it has lengthen a run,
    a finished one too."""
    trust_reward: bool = False
    """With --resume: run the code of the reward that the run names, if its file is the one the run began with."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    values = given(argv, "mezo train", Options, Config.options())
    preset = values.pop("preset", "none")
    if path := values.pop("resume", ""):
        trust, reward = values.pop("trust_reward", False), values.pop("reward", "")
        require(preset == "none", f"--preset {preset} is of a new run, a resumed one has its own options: leave it out")
        output = path
        machine = resumable(path, values)
        starting()
        from mezo.api import resume

        result = resume(path, machine=machine, reward=reward, trust_reward=trust)
    else:
        if values.pop("trust_reward", False):
            raise UserError("--trust-reward belongs to --resume, a new run has --reward: leave it out")
        values = values if preset == "none" else with_preset(preset, values)
        if values.get("adapter"):
            starting()
            from mezo.run.adapter import with_base

            values = with_base(values)
        config = Config.of(**values)
        output = config.machine.output_dir
        starting()
        from mezo.api import train

        result = train(config)
    if result is None:
        return 130
    if result:
        show_result(result, output)
    return 0


def resumable(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Of the options given with --resume those that say where, how or how far; all others are the run's own."""
    if not values:
        return {}
    starting()
    from mezo.run.directory import RunDirectory

    saved, options = RunDirectory(Path(path)).read_config().to_dict(), Config.options()
    may = lambda name: RESUMABLE in options[name].marks or name == "steps"  # noqa: E731
    machine = {name: value for name, value in values.items() if may(name)}
    others = {name: value for name, value in values.items() if name not in machine}
    refuse_contradiction(others, {name: saved.get(name) for name in others}, "the run")
    return machine

"""The demo: a 135M-parameter model learns to tell good film reviews from bad, with forward passes only."""

import itertools
from pathlib import Path

from rich.table import Table

from mezo.api import resume, train
from mezo.config import Config
from mezo.config.presets import PRESETS
from mezo.progress import console as new_console
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.run.replay import rebuild
from mezo.studies import assets
from mezo.tasks import with_objective

PROMPTS = {
    "it-was": ("{text} It was", (" terrible", " great")),
    "sentiment": ("Review: {text}\nSentiment:", (" negative", " positive")),
}


STEPS = {"hf": 4000, "sglang": 1000}
"""Of the demo without a preset."""


def run(
    prompt: str = "it-was",
    steps: int = 0,
    output_dir: Path = Path("runs/demo"),
    runtime: str = "hf",
    preset: str = "few-steps",
) -> int:
    """Run or resume the demo and print its table.

    Args:
        prompt: a key of PROMPTS.
        steps: optimisation steps; 0 is those of the preset, or STEPS of the runtime.
        output_dir: run directory; an unfinished one is resumed, beside a finished one a numbered one is made.
        runtime: what computes the losses.
        preset: a key of PRESETS, or "none" for MeZO as it was published.
    Returns:
        Exit code: 0, 1 if the log does not replay to the adapter, 130 after Ctrl-C.
    """
    wanted = demo_config(prompt, STEPS[runtime], output_dir).replace(runtime=runtime, **PRESETS.get(preset, {}))
    config = _free_or_unfinished(wanted.replace(steps=steps) if steps else wanted)
    directory = Path(config.machine.output_dir)
    result = resume(str(directory)) if directory.exists() else train(config)
    if result is None:
        return 130
    theta, first_line, replayed = rebuild(directory)
    same = outcome.difference(RunDirectory(directory), first_line, theta) is None
    verdict = "equal to adapter/ bit for bit" if same else "DIFFERENT from adapter/"
    _show(result, directory, f"{replayed} steps replayed from the log: {verdict}")
    return 0 if same else 1


def demo_config(prompt: str, steps: int, output_dir: Path) -> Config:
    """The demo's task, by MeZO as it was published: LoRA on the last layer's query, output and MLP projections.

    Args:
        prompt: a key of PROMPTS.
        steps: optimisation steps.
        output_dir: run directory.
    """
    data = assets.write_demo_data(assets.cache_root() / "demo-data")
    template, words = PROMPTS[prompt]
    return Config.of(
        model=str(assets.fetch_model()),
        output_dir=str(output_dir),
        train_file=str(data["train"]),
        dev_file=str(data["dev"]),
        test_file=str(data["test"]),
        prompt=template,
        label_words=words,
        objective="cross_entropy",
        target_modules=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        layers_to_transform=(29,),
        steps=steps,
        batch_size=32,
        lr=1e-3,
        eps=1e-2,
    )


def _free_or_unfinished(wanted: Config) -> Config:
    """`wanted` in the first of its directory, directory-2, ... that is free, or holds this very run unfinished."""
    names = (wanted.machine.output_dir if n == 1 else f"{wanted.machine.output_dir}-{n}" for n in itertools.count(1))
    configs = (wanted.replace(output_dir=name) for name in names)
    return next(config for config in configs if _is_free_or_unfinished(config))


def _is_free_or_unfinished(config: Config) -> bool:
    run = RunDirectory(Path(config.machine.output_dir))
    unfinished = run.config.is_file() and not run.result.is_file()
    return not run.path.exists() or (unfinished and run.read_config() == with_objective(config.absolute()))


def _show(result: dict, run: Path, replayed: str) -> None:
    test = result["test"]
    table = Table("test set", "accuracy", "AUC", "loss", title="MeZO, forward passes only")
    for name in ("before", "after"):
        table.add_row(name, *(f"{test[name][key]:.3f}" for key in ("accuracy", "auc", "loss")))
    console = new_console(highlight=False)
    console.print(table)
    console.print(
        f"{result['steps']} steps in {result['seconds_training']:.1f} s ({result['steps_per_second']:.1f} steps/s); "
        f"best dev checkpoint after step {result['best_step']}\n{replayed}"
    )
    for name in ("adapter", "report.html", "tensorboard", "result.json"):
        console.print(f"{name:<12} {run / name}", soft_wrap=True)

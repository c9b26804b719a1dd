"""The demo: a 135M-parameter model learns to tell good film reviews from bad, with forward passes only."""

import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mezo import assets, checkpoint, commands
from mezo.config import Config

PROMPTS = {
    "it-was": ("{text} It was", (" terrible", " great")),
    "sentiment": ("Review: {text}\nSentiment:", (" negative", " positive")),
}


def run(prompt: str = "it-was", steps: int = 4000, output_dir: Path = Path("runs/demo")) -> int:
    """Run or resume the demo and print its table.

    Args:
        prompt: a key of PROMPTS.
        steps: optimisation steps.
        output_dir: run directory; an unfinished one is resumed, beside a finished one a numbered one is made.
    Returns:
        Exit code: 0, 1 if the log does not replay to the adapter, 130 after Ctrl-C.
    """
    directory = _run_directory(output_dir)
    if directory.exists():
        result = commands.resume(str(directory))
    else:
        result = commands.train(demo_config(prompt, steps, directory))
    if result is None:
        return 130
    theta, _, replayed = checkpoint.replay(directory)
    saved = checkpoint.load_adapter(directory / "adapter", {name: tuple(t.shape) for name, t in theta.items()})
    same = all(torch.equal(theta[name].view(torch.int32), saved[name].view(torch.int32)) for name in theta)
    verdict = "equal to adapter/ bit for bit" if same else "DIFFERENT from adapter/"
    _show(result, directory, f"{replayed} steps replayed from the log: {verdict}")
    return 0 if same else 1


def demo_config(prompt: str, steps: int, output_dir: Path) -> Config:
    """The demo's run: LoRA on the last layer's query, output and MLP projections, 69,120 parameters."""
    data = assets.write_demo_data(assets.cache_root() / "demo-data")
    template, words = PROMPTS[prompt]
    return Config(
        model=str(assets.fetch_model()),
        output_dir=str(output_dir),
        train_file=str(data["train"]),
        dev_file=str(data["dev"]),
        test_file=str(data["test"]),
        prompt=template,
        label_words=words,
        target_modules=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        layers_to_transform=(29,),
        steps=steps,
        batch_size=32,
        lr=1e-3,
        eps=1e-2,
    )


def _run_directory(wanted: Path) -> Path:
    """The first of wanted, wanted-2, wanted-3, ... that is free or unfinished."""
    names = itertools.chain([wanted], (wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(2)))
    return next(path for path in names if not (path / "result.json").is_file())


def _show(result: dict, run: Path, replayed: str) -> None:
    test = result["test"]
    table = Table("test set", "accuracy", "AUC", "loss", title="MeZO, forward passes only")
    for name in ("before", "after"):
        table.add_row(name, *(f"{test[name][key]:.3f}" for key in ("accuracy", "auc", "loss")))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{result['steps']} steps in {result['seconds_training']:.1f} s ({result['steps_per_second']:.1f} steps/s); "
        f"best dev checkpoint after step {result['best_step']}\n{replayed}"
    )
    for name in ("adapter", "plots", "tensorboard", "result.json"):
        console.print(f"{name:<12} {run / name}", soft_wrap=True)

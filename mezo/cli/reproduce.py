"""Options and tables of `mezo reproduce`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table

from mezo.cli.parsing import POSITIONAL, parse
from mezo.errors import UserError
from mezo.progress import console as new_console
from mezo.progress import starting


@dataclass(frozen=True)
class Options:
    """Run a published experiment and print its figure beside ours; run again, it goes on where it was stopped.

    Without a name the experiments are listed. What is shortened or replaced is named below the table.
    """

    name: Annotated[str, POSITIONAL] = ""
    """The experiment, such as roberta-sst2-k16."""
    output_dir: str = ""
    """Directory of the runs, one for each data seed and learning rate; by default runs/reproduce/NAME."""
    steps: int = 0
    """Steps of each run; 0 is as published."""
    seeds: tuple[int, ...] = ()
    """Data seeds; by default as published."""
    model: str = ""
    """Another model, path or hub id."""
    train_file: str = ""
    """JSON lines with the fields of the task's data set, in place of the hub's; likewise the next two."""
    dev_file: str = ""
    """By default dev is cut from train."""
    test_file: str = ""
    """Needed beside --train-file."""
    runtime: Literal["hf", "sglang"] = "hf"
    """What computes the losses."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Of the base model; by default as published."""


def main(argv: list[str]) -> int:
    """`mezo reproduce`; returns the exit code."""
    options = parse(argv, "mezo reproduce", Options)
    starting()
    from mezo.studies import protocols, reproduce

    console = new_console(highlight=False)
    if not options.name:
        for protocol in protocols.PROTOCOLS.values():
            console.print(f"{protocol.name:<25} {_interval(protocol.mean, protocol.std):<12} {protocol.table}")
        return 0
    protocol = reproduce.find(options.name)
    if options.steps < 0:
        raise UserError(f"--steps must be at least 0, got {options.steps}")
    if bool(options.train_file) != bool(options.test_file):
        raise UserError("--train-file and --test-file go together: give both, or neither for the hub's splits")
    named = ("steps", "model", "train_file", "dev_file", "test_file", "runtime", "dtype")
    changes = {name: value for name in named if (value := getattr(options, name)) not in ("", 0, "hf")}
    output_dir = options.output_dir or str(Path("runs/reproduce") / options.name)
    found = reproduce.run(protocol, output_dir, changes, options.seeds)
    if found is None:
        return 130
    _show(console, found, reproduce.departures(found))
    console.print(f"runs and result.json  {output_dir}", soft_wrap=True)
    return 0


def _show(console: Console, found: dict, departures: list[str]) -> None:
    protocol = found["protocol"]
    table = Table("data seed", "lr", "best step", "dev", "test before", "test", title=protocol["name"])
    for row in found["seeds"]:
        scores = (f"{row[key]:.3f}" for key in ("dev", "test_before", "test"))
        table.add_row(str(row["data_seed"]), f"{row['lr']:g}", str(row["best_step"]), *scores)
    console.print(table)
    console.print(f"here       {_interval(found['mean'], found['std'])}")
    console.print(f"published  {_interval(protocol['mean'], protocol['std'])}  {protocol['table']}")
    for line in departures:
        console.print(f"not as published: {line}", soft_wrap=True)


def _interval(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" + ("" if std is None else f" ({std:.1f})")

"""`mezo train`: a new run, or one that goes on."""

import dataclasses
from pathlib import Path

from mezo.cli.parsing import parse, take_option
from mezo.cli.showing import show_result
from mezo.config import MACHINE, Config
from mezo.config.checks import ENGINE
from mezo.errors import UserError


def main(argv: list[str]) -> int:
    path, rest = take_option(argv, "--resume")
    if path is None:
        config = parse(argv, "mezo train")
        from mezo.api import fixed_by_adapter, refuse_other_adapter, resume, train

        if config.adapter:  # what is given and happens to be a default is given all the same
            fixed = fixed_by_adapter(config)
            refuse_other_adapter(parse(argv, "mezo train", fixed), fixed, f"--adapter {config.adapter}")
        result = train(config)
    else:
        machine = _machine_options(path, rest)
        from mezo.api import fixed_by_adapter, refuse_other_adapter, resume, train

        result = resume(path, machine=machine)
    if result is None:
        return 130
    if result:
        show_result(result)
    return 0


def _machine_options(path: str, rest: list[str]) -> dict:
    """Options given with --resume that say where the run goes on; all others are the run's own, and must agree."""
    if not rest:
        return {}
    saved = dataclasses.asdict(_saved_config(Path(path)))
    if take_option(rest, "--runtime")[0] == "hf":
        # the engine's options have no meaning there
        saved |= {name: getattr(Config, name) for name in ENGINE}
    asked = dataclasses.asdict(parse(rest, "mezo train", saved))
    for name, value in asked.items():
        if value != saved[name] and name not in MACHINE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} contradicts the run, which has {saved[name]}: give --resume {path} alone")
    return {name: asked[name] for name in MACHINE}


def _saved_config(run: Path) -> Config:
    from mezo.run.directory import RunDirectory

    return RunDirectory(run).read_config()

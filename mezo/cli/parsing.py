"""Options of `mezo train` from flags and --config files; what other commands share of them."""

import dataclasses
from pathlib import Path

import tyro
import yaml

from mezo.config import Config
from mezo.errors import UserError


@dataclasses.dataclass(frozen=True)
class UncheckedConfig(Config):
    """Fine-tune a language model with forward passes only (MeZO, arXiv 2305.17333).

    --config FILE reads any of these options from YAML (flags win); --resume RUN, alone, continues a run.
    """

    def __post_init__(self):
        """Leave the checks to the Config made of these values, so that a mistake is one line."""


def parse(argv: list[str], prog: str, base: dict | None = None) -> Config:
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

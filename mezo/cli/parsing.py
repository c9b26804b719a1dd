"""Options of a command from its arguments: what is given, flags over a --config file, and nothing else.

argparse leaves out what is not given, so that a value is never taken for a default because it equals it.
"""

import argparse
import difflib
import functools
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from mezo.config.options import REQUIRED, Mark, Option, options_in, shown, typed_values
from mezo.errors import UserError

POSITIONAL = Mark("positional")
"""Mark of a field that the command line gives without a flag."""
Options = TypeVar("Options")
ELSEWHERE = {
    **dict.fromkeys(("--learning-rate", "--learningrate"), "--lr"),
    **dict.fromkeys(("--epochs", "--num-epochs", "--num-train-epochs", "--max-steps", "--num-steps"), "--steps"),
    **dict.fromkeys(("--per-device-train-batch-size", "--train-batch-size", "--bs"), "--batch-size"),
    **dict.fromkeys(("--model-name-or-path", "--model-name", "--model-path"), "--model"),
    **dict.fromkeys(("--max-seq-length", "--max-seq-len", "--context-length"), "--max-length"),
    **dict.fromkeys(("--lora-r", "--lora-rank", "--rank"), "--r"),
    **dict.fromkeys(("--dataset", "--data", "--train-data", "--data-path"), "--train-file"),
    **dict.fromkeys(("--tensor-parallel-size", "--tp-size"), "--tp"),
    **dict.fromkeys(("--zo-eps", "--epsilon"), "--eps"),
    **dict.fromkeys(("--optimizer", "--optim"), "--update-rule"),
    "--labels": "--label-words",
    "--resume-from-checkpoint": "--resume",
}
"""Flags of other programs, and what they are called here."""


def parse(argv: list[str], prog: str, own: type[Options]) -> Options:
    """The options of a command as its dataclass.

    Args:
        argv: arguments of the command.
        prog: its name, such as "mezo export".
        own: dataclass of its options; its docstring heads --help.
    Raises:
        UserError: an unknown flag, a value of another type, or a missing option.
    """
    values = given(argv, prog, own)
    for option in options_in(own).values():
        if option.default is MISSING and option.name not in values:
            name = option.name.upper() if POSITIONAL in option.marks else option.flag
            raise UserError(f"{prog}: {name} is missing; {prog} --help lists the options")
    return own(**values)


def given(argv: list[str], prog: str, own: type, shared: Mapping[str, Option] | None = None) -> dict[str, Any]:
    """The options that are given, by flat name.

    Args:
        argv: arguments of the command.
        prog: its name.
        own: dataclass of its own options; if it has `config`, that names a YAML file that may give any option.
        shared: further options, such as those of a run.
    """
    options = options_in(own) | dict(shared or {})
    parser = _Parser(prog, own, options)
    parsed = vars(parser.parse_intermixed_args([_dashes(word) for word in argv]))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    if shared is None or not (file := values.pop("config", "")):
        return values
    return typed_values(options, _read_yaml(file)) | values


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, and --help in sections."""

    def __init__(self, prog: str, own: type, options: Mapping[str, Option]):
        super().__init__(
            prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=_Whole
        )
        self.description = " ".join(own.__doc__.split())
        self.usage = _usage(prog, options)
        sections = {"Command": self.add_argument_group("Command")}
        for option in options.values():
            title, text = _heading(option, options, own)
            section = sections.get(title) or sections.setdefault(title, self.add_argument_group(title, text))
            section.add_argument(*_names(option), help=_help(option).replace("%", "%%"), **_reading(option))
        sections["Command"].add_argument("-h", "--help", action="help", help="print this and end")

    def error(self, message: str) -> NoReturn:
        """Raise a UserError; an unknown flag brings the nearest known one."""
        word = message.rpartition("unrecognized arguments: ")[2].split()[0] if "unrecognized" in message else ""
        known = [name for name in self._option_string_actions if len(name) > 2]
        near = [ELSEWHERE.get(word.partition("=")[0], "")] + difflib.get_close_matches(word, known, n=1)
        hint = next((f"did you mean {name}? " for name in near if name in known), "")
        raise UserError(f"{self.prog}: {message}; {hint}{self.prog} --help lists the options")


class _Whole(argparse.HelpFormatter):
    """Does not break a flag at its dashes."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _usage(prog: str, options: Mapping[str, Option]) -> str:
    """Positional arguments and required options; the rest is [options]."""
    places = [o for o in options.values() if POSITIONAL in o.marks]
    words = [o.name.upper() if _is_required(o) else f"[{o.name.upper()}]" for o in places]
    words += [f"{o.flag} {o.name.upper()}" for o in options.values() if _is_required(o) and POSITIONAL not in o.marks]
    return " ".join([prog, *words, "[options]"])


def _is_required(option: Option) -> bool:
    return option.default is MISSING or REQUIRED in option.marks


def _heading(option: Option, options: Mapping[str, Option], own: type) -> tuple[str, str]:
    """Title and text of an option's section: "Title: text." begins the docstring of its dataclass.

    The options of a tuning, runtime or rule stand with the choice itself, unless their dataclass has such a title.
    """
    if option.section is own:
        return "Command", ""
    title, colon, text = option.section.__doc__.strip().split("\n\n")[0].partition(":")
    if colon and title.isalpha():
        return title, " ".join(text.split())
    return _heading(options[option.choice], options, own) if option.choice else ("Options", "")


def _names(option: Option) -> list[str]:
    return [option.name] if POSITIONAL in option.marks else [option.flag]


def _reading(option: Option) -> dict[str, Any]:
    """How argparse reads an option."""
    item = get_args(option.type)[0] if get_origin(option.type) is tuple else option.type
    read: dict[str, Any] = {} if POSITIONAL in option.marks else {"dest": option.name}
    if item is bool:
        return read | {"action": argparse.BooleanOptionalAction}
    if get_origin(item) is Literal:
        read["choices"] = get_args(item)
    elif get_origin(item) in (Union, UnionType):
        read |= {"type": functools.partial(_number_or_word, *get_args(item)), "metavar": "INT"}
    else:
        read |= {"type": item, "metavar": {int: "INT", float: "NUMBER"}.get(item, "TEXT")}
    if get_origin(option.type) is tuple:
        read["nargs"] = "*"
    elif POSITIONAL in option.marks:
        read["nargs"] = "?"  # `parse` says what is missing
    if POSITIONAL in option.marks:
        read.pop("metavar", None)
    return read


def _number_or_word(number: type, words: Any, text: str) -> Any:
    """A number of a type, or one of the words of a Literal."""
    try:
        return text if text in get_args(words) else number(text)
    except ValueError as error:
        known = ", ".join(get_args(words))
        raise argparse.ArgumentTypeError(f"expected a number or {known}, got {text!r}") from error


def _help(option: Option) -> str:
    """What an option is, whose, and its default."""
    parts = [option.text]
    if option.summaries:
        parts.append(", ".join(f"{name} ({summary})" for name, summary in option.summaries) + ".")
    if option.choice:
        parts.append(f"Belongs to {option.owner}.")
    if _is_required(option):
        parts.append("(required)")
    elif option.default not in ("", ()):
        default = {True: "on", False: "off"}[option.default] if option.type is bool else shown(option.default)
        parts.append(f"(default: {default})")
    return " ".join(parts)


def _dashes(word: str) -> str:
    """A flag with dashes: --batch_size is --batch-size."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _read_yaml(path: str) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected a mapping of option names to values")
    return values

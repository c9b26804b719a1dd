"""JSON lines, read with a message for each line that is none."""

import json
from pathlib import Path
from typing import Any

from mezo.errors import UserError


def read_jsonl(path: str | Path) -> list[dict | UserError]:
    """The objects of a JSON lines file, one a line; in place of a line that is none, what is wrong with it.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        # utf-8-sig: some editors put a byte order mark first.
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        refuse_binary(path, error.object)
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if lines == [""]:
        raise UserError(f"{path} is empty: give at least one example, one JSON object a line")
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def refuse_odd_line(path: str | Path) -> None:
    """Raise UserError for the first line that is no JSON object, or has a field of another kind than lines before it.

    Args:
        path: of JSON lines, which are read one by one. Of other JSON nothing is said.
    """
    kinds: dict[str, str] = {}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith("["):
                return
            if not line.strip():
                continue
            where = f"{path} line {number}"
            row = _parse(line.rstrip("\n"), where)
            if isinstance(row, UserError):
                raise row
            for name, kind in ((name, KINDS[type(value)]) for name, value in row.items() if value is not None):
                if (before := kinds.setdefault(name, kind)) != kind:
                    odd = f"field {name!r} is {kind}, in lines before it is {before}"
                    raise UserError(f"{where}: {odd}, got {line.strip()!r:.60}: correct it")


KINDS = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
MAGIC = {b"\x1f\x8b": ("gzip", "unpack it")}
"""First bytes of files that are no text, what they are, and the remedy."""


def refuse_binary(path: str | Path, content: bytes) -> None:
    """Raise UserError that names the format, where the first bytes are those of a known one."""
    for magic, (name, remedy) in MAGIC.items():
        if content.startswith(magic):
            raise UserError(f"{path} is a {name} file, expected JSON lines: {remedy}")


def parse_text(text: str) -> Any:
    """JSON in which NaN stands for a missing value, as null does: where a field is read, it is refused as that."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _parse(line: str, where: str) -> dict | UserError:
    if not line.strip():
        return UserError(f"{where} is blank: remove it, one JSON object a line")
    try:
        row = parse_text(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        return UserError(f"{where} is not JSON ({reason}): {line!r:.60}: one JSON object a line")
    if not isinstance(row, dict):
        return UserError(f'{where} must be a JSON object such as {{"text": ..., "label": 0}}, got {line!r:.60}')
    return row

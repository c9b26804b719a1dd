"""Files of a run: written whole or not at all, read line by line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from mezo.atomic import replacing
from mezo.errors import RunError, UserError


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_line(file: int, line: str) -> None:
    """Write one whole line with one call; a short write (disk full) is an error, and is cut off again."""
    data = line.encode()
    start = os.lseek(file, 0, os.SEEK_END)
    try:
        written = os.write(file, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written")
    except OSError as error:
        os.ftruncate(file, start)
        raise RunError(f"the log could not be written ({error}); free some space and resume the run") from error


def read_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, parsed line). A torn last line is dropped; a corrupted one before it is an error."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(f"{path}: line {number} is damaged ({error}); restore the file from a copy") from error
        yield number, values


def drop_torn_line(path: Path) -> None:
    """Cut a log back to its last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        os.truncate(path, end)

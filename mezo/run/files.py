"""Files of a run: written whole or not at all, read line by line."""

import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mezo.atomic import replacing
from mezo.errors import RunError, UserError

MOST_BYTES, MOST_OF_A_LINE = 16 << 30, 16 << 20
"""Of a log, and of a line of one or a file that is one object: far above what a run writes."""
RESTORE = "restore the file from a copy"


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


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of a file that grows a line at a time; a torn last line is dropped.

    Raises:
        UserError: it is no plain file, or it or a line of it is too large to be read.
    """
    refuse_unreadable(path, MOST_BYTES)
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MOST_OF_A_LINE)
            if len(line) == MOST_OF_A_LINE:
                raise UserError(f"{path}: line {number} is damaged (above {MOST_OF_A_LINE} bytes); {RESTORE}")
            if not line.endswith(b"\n"):
                return
            yield number, line


def parsed(text: bytes, where: str) -> dict:
    """An object of JSON. Raises UserError where it is damaged, naming `where` it stands."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}); {RESTORE}") from error
    return values


def read_object(path: Path) -> dict:
    """A file that is one object of JSON. Raises UserError where it cannot be read or is damaged."""
    refuse_unreadable(path, MOST_OF_A_LINE)
    return parsed(path.read_bytes(), str(path))


def refuse_unreadable(path: Path, most: int) -> None:
    """Raise UserError unless a path is a plain file, one that ends, of at most so many bytes."""
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {RESTORE}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"{path} is no plain file; {RESTORE}")
    if facts.st_size > most:
        raise UserError(f"{path} has {facts.st_size:,} bytes, more than the {most:,} that are read of one; {RESTORE}")


def drop_torn_line(path: Path) -> None:
    """Cut a log back to its last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        os.truncate(path, end)

"""Atomic writes: a file or a directory is in its place whole, or not at all."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from safetensors import SafetensorError

SCRATCH = ".mezo-partial-"
"""Begins the names of the directories that something is written in before it takes its place."""


@contextmanager
def replacing(path: Path, old: bool = False) -> Iterator[Path]:
    """A path to write a file or a directory at, which takes the place of `path` where the block ends without an error.

    Everything is on the disk (fsync) before it takes its place; after an error nothing of it is left.

    Args:
        path: in a directory that exists. A file that is there is replaced.
        old: a directory that is there is replaced too; otherwise one with anything in it is an error.
    Raises:
        OSError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{path.name}-", dir=path.parent) as scratch:
        part = Path(scratch) / "part"
        try:
            yield part
        except SafetensorError as error:  # its own kind of error, for a full disk too
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error
        for written in (part, *part.rglob("*")):
            sync(written)
        if old and path.is_dir():
            path.rename(Path(scratch) / "old")
        part.replace(path)
        sync(path.parent)


def remove_partial(directory: Path, name: str = "") -> None:
    """Remove what killed processes left of `replacing` in a directory, or of one name there: for a lock's holder."""
    for left in directory.glob(f"{SCRATCH}{name and f'{name}-'}*"):
        rmtree(left, ignore_errors=True)


def sync(path: Path) -> None:
    """Force what was written to a file, or the names in a directory, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

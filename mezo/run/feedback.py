"""feedback.jsonl of a run: what its users taught it while it was served, each line chained to the one before."""

import bisect
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mezo.data.example import Example
from mezo.errors import RunError, UserError
from mezo.run.files import RESTORE, drop_torn_line, parsed, read_lines, write_line
from mezo.run.schema import FedExample, FedLine, validated

FILE = "feedback.jsonl"
MOST = 100_000
"""Lines of a run: fed examples are held in memory, as those of small data are."""


class FeedbackLog:
    """The examples that a run was fed. A line is on the disk before it counts.

    A line has the number of steps that were done when it came (`at`), so that which step may draw from it follows from
    the two logs alone: the first epoch that begins after the step that was being done then. The hash of a line is over
    its content and the hash of the line before; the first one's over `data_hash`, so the log belongs to its run.

    Args:
        run: its directory.
        data_hash: of the header of its trajectory.
    Raises:
        UserError: the log is damaged, or another run's.

    >>> import tempfile
    >>> log = FeedbackLog(Path(tempfile.mkdtemp()), "the data's")
    >>> log.append(lambda: 3, "example", [({"text": "Fun."}, [Example((5, 6), ((7,), (8,)), 1)])])
    >>> log.before(3), log.before(4), log.examples(0, 1)[0].options
    (0, 1, ((7,), (8,)))
    """

    def __init__(self, run: Path, data_hash: str):
        self.path = run / FILE
        self._hashes = [hashlib.sha256(data_hash.encode()).hexdigest()]
        self._at: list[int] = []
        self._examples: list[list[Example]] = []
        self.kinds = dict.fromkeys(("feedback", "example"), 0)
        self._appending, self._torn = threading.Lock(), self.path.exists()
        if self.path.exists():
            for number, line in read_lines(self.path):
                self._take(line, f"{self.path}: line {number}")

    def __len__(self) -> int:
        return len(self._at)

    def append(self, done: Callable[[], int], kind: str, lines: Sequence[tuple[dict, Sequence[Example]]]) -> None:
        """Add lines, all or none. Any thread may.

        Args:
            done: says how many steps are done.
            kind: "feedback" or "example".
            lines: of each what came, for people, and what is learnt from it, tokenised; [] if nothing is.
        Raises:
            UserError: the log is full, or a value cannot be kept.
            RunError: the disk is full; the log is as it was.
        """
        with self._appending:
            if len(self) + len(lines) > MOST:
                raise UserError(f"{FILE} has {len(self):,} lines and may have {MOST:,}: start a new run with this data")
            at, before, rows = max([done(), *self._at[-1:]]), self._hashes[-1], []
            for given, examples in lines:
                row = {"at": at, "kind": kind, "time": time.time(), "given": given}
                row = json.loads(_dumped(row | {"examples": [_stored(example) for example in examples]}))
                before = row["sha256"] = _hash(before, row)
                rows.append(row)
            self._write("".join(json.dumps(row) + "\n" for row in rows))
            for row, (_, examples) in zip(rows, lines, strict=True):
                self._add(row, examples)

    def before(self, step: int) -> int:
        """How many lines came before the step before this one was done: what its epochs may hold."""
        with self._appending:
            return bisect.bisect_left(self._at, step)

    def holds(self, lines: int, sha256: str) -> bool:
        """Whether so many lines are here, and the last of them has this hash."""
        return lines <= len(self) and self._hashes[lines] == sha256

    def hash_of(self, lines: int) -> str:
        """Of the chain up to so many lines."""
        return self._hashes[lines]

    def examples(self, first: int, end: int) -> list[Example]:
        """Of the lines from number `first` on, before `end`."""
        return [example for line in self._examples[first:end] for example in line]

    def _write(self, lines: str) -> None:
        """Have lines on the disk, or none of them. A machine that dies meanwhile may keep the first of several."""
        try:
            if self._torn:  # only who writes may
                drop_torn_line(self.path)
                self._torn = False
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror})") from error
        try:
            start = os.lseek(file, 0, os.SEEK_END)
            write_line(file, lines)
            try:
                os.fsync(file)
            except OSError as error:
                os.ftruncate(file, start)
                raise RunError(f"{self.path} could not be written ({error}); free some space") from error
        finally:
            os.close(file)

    def _take(self, line: bytes, where: str) -> None:
        """Add a line that was read."""
        row = validated(FedLine, parsed(line, where), where)
        if row["sha256"] != _hash(self._hashes[-1], row):
            raise UserError(f"{where} does not follow from the line before it, or from this run's data; {RESTORE}")
        if row["at"] < max(self._at, default=0):
            raise UserError(f"{where} was added at step {row['at']}, before the line above it; {RESTORE}")
        self._add(row, [_example(each, where) for each in row["examples"]])

    def _add(self, row: dict, examples: Sequence[Example]) -> None:
        self._hashes.append(row["sha256"])
        self._examples.append(list(examples))
        self.kinds[row["kind"]] += 1
        self._at.append(row["at"])


def _hash(before: str, row: dict) -> str:
    """SHA-256 of the hash before and a line without its own."""
    content = {name: value for name, value in row.items() if name != "sha256"}
    return hashlib.sha256((before + json.dumps(content, sort_keys=True)).encode()).hexdigest()


def _dumped(row: dict) -> str:
    try:
        return json.dumps(row, allow_nan=False)
    except ValueError as error:  # a number such as 1e999
        raise UserError(f"a value cannot be kept as JSON ({error}): use finite numbers") from error


def _stored(example: Example) -> dict:
    """What of an example the log has."""
    row = {"prompt": example.prompt, "options": example.options, "label": example.label}
    judged = {"references": example.references, "names": example.names, "fields": dict(example.fields)}
    return row | {name: value for name, value in judged.items() if value}


def _example(row: dict, where: str) -> Example:
    """Inverse of `_stored`."""
    return Example(**FedExample.model_validate(row).model_dump(), where=where)

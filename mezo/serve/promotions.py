"""promoted.jsonl of a run: which version users were given, when and why; a line is on the disk before it counts."""

import json
import os
import time
from pathlib import Path

from mezo.errors import UserError
from mezo.run.files import drop_torn_line, parsed, read_lines, write_line

FILE = "promoted.jsonl"


class Promotions:
    """The log of promotions of a run.

    Args:
        run: its directory.
    Raises:
        UserError: the log is damaged.
    """

    def __init__(self, run: Path):
        self.path = run / FILE
        self.steps: list[int] = []
        if self.path.exists():
            drop_torn_line(self.path)
            for number, line in read_lines(self.path):
                row = parsed(line, where := f"{self.path}: line {number}")
                if not isinstance(row.get("step"), int) or row["step"] < 0:
                    raise UserError(f"{where}: expected a number of steps, got {row.get('step')!r:.60}")
                self.steps.append(row["step"])

    @property
    def last(self) -> int | None:
        """Step of the version that users are given; None before there is one."""
        return self.steps[-1] if self.steps else None

    def append(self, step: int, why: str) -> None:
        """Log that a version is promoted.

        Args:
            step: steps of the run that made it.
            why: "start", "dev" or "hand".
        """
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            write_line(file, json.dumps({"step": step, "why": why, "time": time.time()}) + "\n")
            os.fsync(file)
        finally:
            os.close(file)
        self.steps.append(step)

"""A run as a kill leaves it."""

import os
from pathlib import Path


def killed_in_step(step: int, run: str | Path, evaluations: int | None = None) -> None:
    """Leave of a finished run what it had when it was killed while it wrote a step: a part of that line, no result.

    Args:
        step: number of the step.
        run: directory of the run.
        evaluations: rows of metrics.jsonl that were there; None: all of them stay.
    """
    log, metrics = Path(run, "trajectory.jsonl"), Path(run, "metrics.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    os.truncate(log, len(b"".join(lines[: 1 + step])) + 20)  # the first line is the header
    Path(run, "result.json").unlink()
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:evaluations]))

"""The run log: a header that fixes theta_0, then one JSON line a step. Seeds and scalars rebuild theta exactly."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.rules import RULES
from mezo.method.step import Update
from mezo.run.files import RESTORE, parsed, read_lines, write_line
from mezo.run.schema import RECORD, Header, validated, why
from mezo_kernels import Z_STREAM_VERSION

FORMAT, VERSIONS = "mezo-trajectory", (1, 2)  # version 2 adds the rule of runs that are not plain SGD, and init "base"
FSYNC_SECONDS = 1.0


@dataclass(frozen=True)
class StepRecord:
    """A line of the log: what a step measured, and the update it made.

    Args:
        step: number of the step, from 0.
        update: what was done to theta: theta <- theta * decay - sum_k coefficients[k] z(seeds[k]).
        losses: of the step's batch, at the two copies of each perturbation.
        projected_grads: (loss_plus - loss_minus) / (2 eps) of each; over eps where the rule is one-sided.
        tried: losses at theta, theta - c z and theta + c z, of which a rule that compares kept the least; else ().
        shortened: what the coefficients were multiplied by under --max-step-ratio.
        fed: of the first step that draws from more lines of feedback.jsonl than those before it, how many lines, and
            the hash of the last of them; else ().
        text_seed: that the texts of the step were sampled from (`method/sampling.py`); None where they were not.
    """

    step: int
    update: Update
    losses: Losses
    projected_grads: tuple[float, ...]
    tried: tuple[float, ...] = ()
    shortened: float = 1.0
    fed: tuple[int, str] | tuple[()] = ()
    text_seed: int | None = None

    def to_line(self) -> str:
        """One line of JSON; floats round-trip, and those that are not finite are strings."""
        update, losses = self.update, self.losses
        values = {
            "step": self.step,
            "seeds": update.seeds,
            "projected_grads": self.projected_grads,
            "coefficients": update.coefficients,
            "decay": update.decay,
            "loss_plus": losses.plus,
            "loss_minus": losses.minus,
            "skipped": update.skipped,
        }
        values |= {} if update.lr is None else {"lr": update.lr}
        values |= {"tried": self.tried} if self.tried else {}
        values |= {} if self.shortened == 1 else {"shortened": self.shortened}
        values |= {"fed": self.fed} if self.fed else {}
        values |= {} if self.text_seed is None else {"text_seed": self.text_seed}
        return json.dumps({key: _encode(value) for key, value in values.items()}, allow_nan=False) + "\n"

    @classmethod
    def of_line(cls, line: str | bytes) -> "StepRecord":
        """Inverse of `to_line`. Raises ValueError if the line is not a record."""
        values = RECORD.validator.validate_json(line)
        seeds, losses = values["seeds"], Losses(values["loss_plus"], values["loss_minus"])
        lists = (values["projected_grads"], values["coefficients"], losses.plus, losses.minus)
        if any(len(each) != len(seeds) for each in lists):
            raise ValueError("expected lists of equal length, one item a perturbation")
        update = Update(seeds, values["coefficients"], values["decay"], values.get("lr"), values["skipped"])
        tried, shortened = values.get("tried", ()), values.get("shortened", 1.0)
        fed, text_seed = values.get("fed", ()), values.get("text_seed")
        return cls(values["step"], update, losses, values["projected_grads"], tried, shortened, fed, text_seed)


def _encode(value):
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return [_encode(v) for v in value] if isinstance(value, (list, tuple)) else value


class TrajectoryWriter:
    """Appends records, one write call each, handed to the OS before it returns; fsync at most once a second."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.synced = time.monotonic()

    def append(self, record: StepRecord) -> None:
        """Write one record."""
        write_line(self.file, record.to_line())
        if time.monotonic() - self.synced >= FSYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self.file)
        self.synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self.file)


def read_trajectory(path: Path) -> tuple[dict, list[StepRecord]]:
    """Read (header, records).

    Raises:
        UserError: no header, another format or version, a damaged line, a step out of order, one without its lr.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a run directory that `mezo train` has started")
    lines = read_lines(path)
    first = read_header(path, next(lines, (1, b"{}"))[1])
    rule = RULES.get((first.get("rule") or {}).get("name", "sgd"))
    records, needs_lr = [], rule is not None and rule().kernel() is not None
    for number, line in lines:
        try:
            record = StepRecord.of_line(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} {_fault(error)}; {RESTORE}") from error
        if needs_lr and record.update.lr is None and not record.update.skipped:
            raise UserError(f"{path}: line {number} lacks lr, which its rule needs; {RESTORE}")
        if record.step != len(records):
            raise UserError(f"{path}: line {number} holds step {record.step}, expected {len(records)}")
        records.append(record)
    return first, records


def read_header(path: Path, line: bytes | None = None) -> dict:
    """The header of a log alone.

    Args:
        path: of the log.
        line: its first line, if that has been read.
    Raises:
        UserError: no header, another format or version, a field of another type or outside its bounds.
    """
    first = parsed(next(read_lines(path), (1, b"{}"))[1] if line is None else line, f"{path}: line 1")
    if first.get("format") != FORMAT or first.get("version") not in VERSIONS:
        got = f"{first.get('format')!r:.60} version {first.get('version')!r:.60}"
        raise UserError(f"{path}: expected a header of {FORMAT} version {' or '.join(map(str, VERSIONS))}, got {got}")
    if first.get("z_stream") != Z_STREAM_VERSION:
        got = f"{first.get('z_stream')!r:.60}"
        raise UserError(f"{path}: written with z stream {got}, this program has {Z_STREAM_VERSION}")
    return validated(Header, first, f"{path}: the header")


def _fault(error: ValueError) -> str:
    """What is wrong with a line that is no record."""
    if not isinstance(error, ValidationError):
        return f"is not a step record ({error})"
    return f"is {'damaged' if error.errors()[0]['type'] == 'json_invalid' else 'not a step record'}: it {why(error)}"

"""The run log: a header that fixes theta_0, then one JSON line a step. Seeds and scalars rebuild theta exactly."""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.rules import RULES
from mezo.method.step import Update
from mezo.run.files import read_lines, write_line
from mezo_kernels import Z_STREAM_VERSION

FORMAT, VERSIONS = "mezo-trajectory", (1, 2)  # version 2 adds the rule of runs that are not plain SGD, and init "base"


HEADER = ("z_stream", "run_seed", "data_hash", "init", "peft", "shapes", "model", "model_hash", "dtype")


LISTS = ("seeds", "projected_grads", "coefficients", "loss_plus", "loss_minus")  # of a line: one item a perturbation
LINE = ("step", *LISTS, "decay", "skipped")
OPTIONAL = ("lr", "tried")  # fields that version 1 has not


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
    """

    step: int
    update: Update
    losses: Losses
    projected_grads: tuple[float, ...]
    tried: tuple[float, ...] = ()

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
        return json.dumps({key: _encode(value) for key, value in values.items()}, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict) -> "StepRecord":
        """Inverse of `to_line`. Raises TypeError or ValueError if the values are not a record's."""
        given = {key: _decode(value) for key, value in values.items()}
        odd = [*(key for key in LINE if key not in given), *(key for key in given if key not in (*LINE, *OPTIONAL))]
        if odd:
            raise ValueError(f"{odd[0]} is missing, or is no field of a step")
        lists = [given[key] for key in LISTS]
        if not all(isinstance(v, tuple) for v in lists) or len({len(v) for v in lists}) != 1 or not given["seeds"]:
            raise ValueError("expected lists of equal length, one item a perturbation")
        if not all(type(seed) is int and 0 <= seed < 2**64 for seed in given["seeds"]):
            raise ValueError(f"expected seeds in [0, 2**64), got {given['seeds']}")
        lr, tried = given.get("lr"), given.get("tried", ())
        numbers = [given["decay"], *tried, *([] if lr is None else [lr]), *(v for own in lists[1:] for v in own)]
        if type(given["step"]) is not int or not all(type(v) in (int, float) for v in numbers):
            raise ValueError("expected numbers")
        if not all(map(math.isfinite, (given["decay"], lr or 0.0, *given["coefficients"]))):
            raise ValueError("expected finite coefficients, decay and lr")
        update = Update(given["seeds"], given["coefficients"], given["decay"], lr, given["skipped"])
        losses = Losses(given["loss_plus"], given["loss_minus"])
        return cls(given["step"], update, losses, given["projected_grads"], tried)


def _encode(value):
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return [_encode(v) for v in value] if isinstance(value, (list, tuple)) else value


def _decode(value):
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    return float(value) if isinstance(value, str) else value


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
    _, first = next(lines, (0, {}))
    if first.get("format") != FORMAT or first.get("version") not in VERSIONS:
        got = f"{first.get('format')} version {first.get('version')}"
        raise UserError(f"{path}: expected a header of {FORMAT} version {' or '.join(map(str, VERSIONS))}, got {got}")
    missing = [key for key in HEADER if key not in first]
    if missing:
        raise UserError(f"{path}: the header lacks {missing[0]}; restore the file from a copy")
    if first["z_stream"] != Z_STREAM_VERSION:
        raise UserError(f"{path}: written with z stream {first['z_stream']}, this program has {Z_STREAM_VERSION}")
    rule = RULES.get(first.get("rule", {}).get("name", "sgd"))
    records, needs_lr = [], rule is not None and rule().kernel() is not None
    for number, values in lines:
        try:
            records.append(StepRecord.from_dict(values))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: line {number} is not a step record ({error})") from error
        if needs_lr and records[-1].update.lr is None and not records[-1].update.skipped:
            raise UserError(f"{path}: line {number} lacks lr, which its rule needs; restore the file from a copy")
        if records[-1].step != len(records) - 1:
            raise UserError(f"{path}: line {number} holds step {records[-1].step}, expected {len(records) - 1}")
    return first, records

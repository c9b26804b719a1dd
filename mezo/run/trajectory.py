"""The run log: a header that fixes theta_0, then one JSON line a step. Seeds and scalars rebuild theta exactly."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mezo.config.checks import STATEFUL
from mezo.errors import UserError
from mezo.run.files import read_lines, write_line
from mezo_kernels import Z_STREAM_VERSION

FORMAT, VERSIONS = "mezo-trajectory", (1, 2)  # version 2 adds the rule of runs that are not plain SGD, and init "base"


HEADER = ("z_stream", "run_seed", "data_hash", "init", "peft", "shapes", "model", "model_hash", "dtype")


OPTIONAL = ("lr", "tried")  # fields that version 1 has not


FSYNC_SECONDS = 1.0


@dataclass(frozen=True)
class StepRecord:
    """What a step did: theta <- theta * decay - sum_k coefficients[k] z(seeds[k]).

    Args:
        step: number of the step, from 0.
        seeds: one per perturbation.
        projected_grads: (loss_plus - loss_minus) / (2 eps) of each; over eps where the rule is one-sided.
        coefficients: lr * projected_grad / n of each, over what the rule or --normalise-z divides it by; zero in a
            skipped step.
        decay: 1 - lr * weight_decay; 1 in a skipped step.
        loss_plus, loss_minus: losses of each; one-sided, loss_minus is that of theta itself, for each.
        skipped: a loss was not finite, so nothing was changed.
        lr: learning rate, where a rule of the header applies it to the estimate sum_k coefficients[k] z(seeds[k]),
            whose coefficients are projected_grad / n then; else None, and left out of the line.
        tried: losses at theta, theta - c z and theta + c z, of which a conservative step kept the least; else left out.
    """

    step: int
    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]
    coefficients: tuple[float, ...]
    decay: float
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    skipped: bool = False
    lr: float | None = None
    tried: tuple[float, ...] = ()

    def to_line(self) -> str:
        """One line of JSON; floats round-trip, and those that are not finite are strings."""
        return (
            json.dumps(
                {k: _encode(v) for k, v in asdict(self).items() if k not in OPTIONAL or v not in (None, ())},
                allow_nan=False,
            )
            + "\n"
        )

    @classmethod
    def from_dict(cls, values: dict) -> "StepRecord":
        """Inverse of `to_line`. Raises TypeError or ValueError if the values are not a record's."""
        record = cls(**{k: _decode(v) for k, v in values.items()})
        lists = (record.seeds, record.projected_grads, record.coefficients, record.loss_plus, record.loss_minus)
        if not all(isinstance(v, tuple) for v in lists) or len({len(v) for v in lists}) != 1 or not record.seeds:
            raise ValueError("expected lists of equal length, one item a perturbation")
        if not all(type(seed) is int and 0 <= seed < 2**64 for seed in record.seeds):
            raise ValueError(f"expected seeds in [0, 2**64), got {record.seeds}")
        numbers = [
            record.decay,
            *record.tried,
            *([] if record.lr is None else [record.lr]),
            *(v for values in lists[1:] for v in values),
        ]
        if type(record.step) is not int or not all(type(v) in (int, float) for v in numbers):
            raise ValueError("expected numbers")
        if not all(map(math.isfinite, (record.decay, record.lr or 0.0, *record.coefficients))):
            raise ValueError("expected finite coefficients, decay and lr")
        return record


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
    records, stateful = [], first.get("rule", {}).get("name") in STATEFUL
    for number, values in lines:
        try:
            records.append(StepRecord.from_dict(values))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: line {number} is not a step record ({error})") from error
        if stateful and records[-1].lr is None and not records[-1].skipped:
            raise UserError(f"{path}: line {number} lacks lr, which its rule needs; restore the file from a copy")
        if records[-1].step != len(records) - 1:
            raise UserError(f"{path}: line {number} holds step {records[-1].step}, expected {len(records) - 1}")
    return first, records

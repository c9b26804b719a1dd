"""Looking at a run's log and cutting it: what `mezo trajectory` does."""

import gzip
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from mezo.errors import UserError
from mezo.run import outcome
from mezo.run.agreement import check_run
from mezo.run.directory import RunDirectory, best_step
from mezo.run.files import drop_torn_line, replace_file
from mezo.run.header import shortened
from mezo.run.replay import rebuild
from mezo.run.trajectory import StepRecord, read_trajectory


def summary(run: str) -> dict:
    """What a log holds, as label -> text."""
    path = Path(run) / "trajectory.jsonl"
    first, records = read_trajectory(path)
    data, elements = path.read_bytes(), sum(map(math.prod, first["shapes"].values()))
    start = {"stream": "from the z stream", "base": "from the base model", "file": f"from {first['init'].get('file')}"}
    what = "model in float32" if first["peft"] is None else "adapter"
    torn = len(data) - data.rfind(b"\n") - 1
    grads = [abs(g) for record in records if not record.update.skipped for g in record.projected_grads]
    return {
        "format": f"{first['format']} version {first['version']}, z stream {first['z_stream']}",
        "model": f"{first['model']} (weights {first['model_hash'][:12]})",
        "parameters": f"{elements:,} in {len(first['shapes'])} tensors",
        "start": start[first["init"]["kind"]],
        "run seed": str(first["run_seed"]),
        "steps": f"{len(records)} ({sum(record.update.skipped for record in records)} skipped)",
        **_lengthened(first),
        **_fed(records),
        "|projected_grad|": f"mean {sum(grads) / max(len(grads), 1):.4g}, {grads.count(0)} of {len(grads)} zero",
        "size": f"{len(data):,} bytes, {len(gzip.compress(data)):,} compressed; the {what} is {4 * elements:,}",
        "torn last line": f"{torn} bytes, to be dropped" if torn else "no",
    }


def _lengthened(first_line: dict) -> dict[str, str]:
    chain = first_line.get("lengthened", [])
    each = (f"from {one['from']} to {one['to']} steps after {one['at']}" for one in chain)
    return {"lengthened": ", ".join(each)} if chain else {}


def _fed(records: Sequence[StepRecord]) -> dict[str, str]:
    grown = (f"{record.fed[0]} lines from step {record.step} on" for record in records if record.fed)
    text = ", ".join(grown)
    return {"fed": text} if text else {}


def verify(run: str) -> int:
    """Check that a log is whole and agrees with itself and with config.json; return its number of steps.

    Raises:
        UserError: the first line that is damaged, or whose seeds, estimates or coefficients do not follow.
    """
    directory = RunDirectory(Path(run))
    first, records = read_trajectory(directory.trajectory)
    directory.read_config()  # without it nothing is to follow from
    check_run(directory, first, records, lengths=True)
    return len(records)


def truncate(run: str, step: int) -> Path:
    """Cut a run back to `step` steps, so that it resumes from there; what is cut off is kept in a folder beside.

    Returns:
        The folder in the run directory that holds the files as they were.
    """
    directory = RunDirectory.open(run)
    drop_torn_line(directory.trajectory)
    first_line, records = read_trajectory(directory.trajectory)
    if not 0 <= step <= len(records):
        raise UserError(f"--step must be from 0 to {len(records)}, got {step}")
    lines = directory.trajectory.read_bytes().splitlines(keepends=True)
    check_run(directory, first_line, records)
    rows = directory.read_metrics()
    # a test score after the run, and that it stopped, belong to the run's end
    ends = lambda row: row["step"] > 0 and row["split"] in ("test", "train", "stop")  # noqa: E731
    rows = [row for row in rows if row["step"] <= step and not ends(row)]
    best = best_step(rows)
    rebuilt = None if best is None else rebuild(directory.path, str(best))  # before anything is moved
    aside = next(p for n in itertools.count(1) if not (p := directory.path / f"before-truncate-{n}").exists())
    aside.mkdir()
    # plots/: pictures that runs of older versions wrote
    outcomes = directory.adapter, directory.model, directory.result, directory.page, directory.path / "plots"
    for path in (directory.trajectory, directory.metrics, *outcomes):
        if path.exists():
            path.rename(aside / path.name)
    if "lengthened" in first_line:
        lines[0] = json.dumps(shortened(first_line, step)).encode() + b"\n"
    replace_file(directory.trajectory, b"".join(lines[: step + 1]))
    directory.write_metrics(rows)
    if rebuilt:
        theta, first, _ = rebuilt
        outcome.write(directory.path, outcome.path(directory, first["peft"]), first, theta)
    directory.release()
    return aside

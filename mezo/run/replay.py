"""Theta rebuilt from a run's log alone."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import track

from mezo.errors import UserError
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Update
from mezo.models.cached import in_cache
from mezo.run.agreement import check_run
from mezo.run.directory import RunDirectory, best_step
from mezo.run.header import INITIAL, initial_theta
from mezo.run.trajectory import StepRecord, read_trajectory
from mezo.runtimes.theta import PerturbedTheta
from mezo_kernels import ParamLayout

RECORDS_PER_PASS = 256


def replay_records(update: Callable[[list[Update]], None], records: Sequence[StepRecord]) -> None:
    """Apply records to the initial theta, many to a pass; the same bits as step after step, and the rule's state.

    Args:
        update: `Runtime.update` or `PerturbedTheta.update`, of a new run's theta.
        records: of all steps, in order.
    """
    starts = range(0, len(records), RECORDS_PER_PASS)
    for start in track(starts, "replay", transient=True, disable=len(starts) < 4 or not sys.stderr.isatty()):
        update([record.update for record in records[start : start + RECORDS_PER_PASS]])


def rebuild(
    path: str | Path, until: str = "best", backend: str | None = None, model: str = ""
) -> tuple[dict, dict, int]:
    """Rebuild theta of a run from its log.

    Args:
        path: run directory; only its logs are read, and the adapter or model that it started from, if there was one.
        until: "best" (what the run kept), "last", or a number of steps.
        backend: of the fused ops.
        model: where the base of a run that trained all of it is now; empty is where the log says.
    Returns:
        (theta, header, steps applied); the header with `model`, if given.
    """
    directory = Path(path)
    first_line, records = read_trajectory(directory / "trajectory.jsonl")
    if model and first_line["peft"] is not None:
        raise UserError(f"--model {model}: {path} trained an adapter, which the log rebuilds alone: leave it out")
    first_line |= {"model": model} if model else {}
    run = RunDirectory(directory)
    if until == "best" and not run.metrics.is_file():
        raise UserError(f"{run.metrics} is missing, which says which step was best; give --until last or a number")
    LoggedRule.of_header(first_line)  # a rule that is not known is said before a step that does not follow from it
    check_run(run, first_line, records)
    best = best_step(run.read_metrics()) if until == "best" else None
    if until not in ("best", "last") and not (until.isdecimal() and int(until) <= len(records)):
        raise UserError(f"--until must be best, last or a number of steps from 0 to {len(records)}, got {until}")
    steps = len(records) if until == "last" else best if until == "best" else int(until)
    steps = len(records) if steps is None else steps
    _refuse_download(first_line, path, model)
    return theta_after(first_line, directory, records[:steps], backend), first_line, steps


def theta_after(
    first_line: dict, directory: Path, records: Sequence[StepRecord], backend: str | None = None
) -> dict[str, torch.Tensor]:
    """Theta after some steps of a run, float32 by canonical name; neither log nor steps are checked.

    Args:
        first_line: header of the log.
        directory: of the run, for the adapter that it started from, if there was one.
        records: of the steps, from the first on.
        backend: of the fused ops.
    """
    theta = {name: tensor.float() for name, tensor in initial_theta(first_line, directory / INITIAL).items()}
    theta = {name: theta[name] for name in first_line["shapes"]}
    rebuilt = PerturbedTheta(ParamLayout(theta), [], backend, LoggedRule.of_header(first_line))
    replay_records(rebuilt.update, records)
    return theta


def _refuse_download(first_line: dict, path: str | Path, given: str) -> None:
    """Raise UserError where theta_0 is a model that would be fetched and that the user did not name."""
    model = first_line["model"]
    if (
        first_line["init"]["kind"] != "base"
        or given
        or Path(model).is_absolute()
        or Path(model).is_dir()
        or in_cache(model)
    ):
        return
    raise UserError(f"{path} started from {model}, which would be downloaded: give --model {model} if that is wanted")

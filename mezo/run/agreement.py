"""Whether the files of a run belong together: its log, its configuration, its evaluations and what it kept."""

import math
import sys
from collections.abc import Sequence

from rich.progress import track

from mezo.config import Config
from mezo.errors import UserError
from mezo.method.guard import StepGuard
from mezo.method.rules.logged import LoggedRule
from mezo.method.sampling import text_seed
from mezo.method.schedule import learning_rate
from mezo.method.step import Step, Update
from mezo.models.spec import adapter_shapes
from mezo.run.adapter import PEFT_CONFIG, WEIGHTS, quantised_here, read_peft_config, shapes_in
from mezo.run.directory import RunDirectory, best_step
from mezo.run.feedback import FeedbackLog
from mezo.run.files import RESTORE
from mezo.run.header import planned_steps, shapes_of
from mezo.run.trajectory import StepRecord
from mezo_kernels import inner_products, root_mean_square


def check_run(run: RunDirectory, first: dict, records: Sequence[StepRecord], lengths: bool = False) -> None:
    """Raise UserError at the first thing in which two files of a run, or a line of its log and the rest, disagree.

    Files that are not there are not missed: a log is enough for a theta.

    Args:
        run: its directory.
        first, records: of its log.
        lengths: under --normalise-z and the rule aligned draw every z again, so that the coefficients can be checked.
    """
    check_steps(run, len(records))
    if run.adapter.is_dir() and first["peft"] is not None:
        _check_adapter(run, first)
    check_lines(run, first, records, lengths)


def check_lines(run: RunDirectory, first: dict, records: Sequence[StepRecord], lengths: bool = False) -> None:
    """Raise UserError where the header or a line does not follow from the configuration; see `check_run`."""
    config = run.read_config() if run.config.exists() else None
    if config is not None:
        _check_header(run, first, config)
    _check_fed(run, first, records)
    guard, moments = StepGuard(config.method.max_step_ratio if config else 0.0), []
    period = LoggedRule.of_header(first).rule.period
    for record in track(records, "check", transient=True, disable=len(records) < 1e5 or not sys.stderr.isatty()):
        line = f"{run.trajectory}: line {record.step + 2}"
        seeds = Step.of_run(first["run_seed"], record.step, len(record.update.seeds), 1.0, period=period).seeds
        if record.update.seeds != seeds:
            raise UserError(f"{line}: seeds {record.update.seeds} are not those of step {record.step}, {seeds}")
        if record.text_seed is not None and record.text_seed != text_seed(first["run_seed"], record.step):
            raise UserError(f"{line}: text_seed {record.text_seed} is not that of step {record.step}")
        if config is not None:
            sampled = bool(config.method.temperature)
            if (record.text_seed is not None) != sampled:
                raise UserError(f"{line}: text_seed is {'missing' if sampled else 'there'}, unlike --temperature")
            moments = _check_line(line, record, config, first, lengths, guard, moments)
        guard.see(record.update)


def _check_fed(run: RunDirectory, first: dict, records: Sequence[StepRecord]) -> None:
    """Raise UserError where what steps say they draw from is not what the run was fed, as far as that is there."""
    fed = [record for record in records if record.fed]
    numbers = [record.fed[0] for record in fed]
    if numbers != sorted(set(numbers)):
        raise UserError(f"{run.trajectory}: the lines of feedback that steps draw from do not grow; {RESTORE}")
    if not run.feedback.exists():
        return
    log = FeedbackLog(run.path, first["data_hash"])
    for record in fed:
        lines, sha256 = record.fed
        if lines != log.before(record.step) or not log.holds(lines, sha256):
            raise UserError(
                f"{run.trajectory}: line {record.step + 2} draws from {lines} lines of feedback, which are not those"
                f" before step {record.step} of {run.feedback.name}; {RESTORE}"
            )


def check_steps(run: RunDirectory, steps: int) -> None:
    """Raise UserError if the evaluations or the result of a run are of another number of steps than its log holds."""
    metrics = run.read_metrics()
    last = max((row["step"] for row in metrics), default=0)
    if last > steps:
        raise UserError(
            f"{run.metrics} goes to step {last}, {run.trajectory.name} to step {steps}: they are not of one moment, as"
            " where a run is copied while it trains; copy it again"
        )
    dev = [row["step"] for row in metrics if row["split"] == "dev"]
    if dev != sorted(set(dev)):
        raise UserError(f"{run.metrics}: the evaluations of dev are not in the order of their steps; {RESTORE}")
    if not run.result.exists():
        return
    best = best_step(metrics)
    found, kept = run.read_result(), (steps, steps if best is None else best)
    if (found["steps"], found["best_step"]) != kept:
        raise UserError(
            f"{run.result}: best step {found['best_step']} of {found['steps']}, but the log and metrics.jsonl say"
            f" {kept[1]} of {kept[0]}; {RESTORE}"
        )


def _check_header(run: RunDirectory, first: dict, config: Config) -> None:
    """Compare what header and config.json both say."""
    said = {
        "run_seed": (first["run_seed"], config.method.seed),
        "rule": (first.get("rule"), config.method.logged_rule.header()),
        "reward_hash": (bool(first.get("reward_hash")), "reward" in config.method.objectives),
        "peft": (first["peft"] is None, config.model.tuning.name == "full"),
        "dtype": (first["dtype"], first["dtype"] if config.model.dtype == "auto" else config.model.dtype),
        "quantization": (quantised_here(first), config.model.quantization),
    }
    for name, (logged, configured) in said.items():
        if logged != configured:
            raise UserError(f"{run.trajectory}: {name} of the header is not what config.json says; {RESTORE}")


def _check_adapter(run: RunDirectory, first: dict) -> None:
    """Compare what the header says of the adapter with the one that is there."""
    if (run.adapter / PEFT_CONFIG).exists() and read_peft_config(run.adapter) != first["peft"]:
        raise UserError(f"{run.adapter / PEFT_CONFIG} is not what the header of the log says; {RESTORE}")
    weights = run.adapter / WEIGHTS
    whole = adapter_shapes(shapes_of(first, "shapes"), shapes_of(first, "frozen"))
    if weights.exists() and shapes_in(weights) != whole:
        raise UserError(f"{weights} has other parameters than the header of the log; {RESTORE}")


def _check_line(
    line: str,
    record: StepRecord,
    config: Config,
    first: dict,
    lengths: bool,
    guard: StepGuard,
    moments: list[float],
) -> list[float]:
    """Raise UserError unless the estimates and the update of a step follow from its losses and the configuration.

    Args:
        line: where the step is, for the error.
        record: of the step.
        config: of the run.
        first: header of the log.
        lengths: see `check_run`.
        guard: that has seen the steps before.
        moments: of a rule that remembers, after the step before.
    Returns:
        The moments after this step.
    """
    update, method = record.update, config.method
    if update.skipped:
        if any(update.coefficients) or update.decay != 1:
            raise UserError(f"{line}: a skipped step must change nothing")
        return moments
    fault = UserError(f"{line}: the estimates or coefficients do not follow from the losses and the configuration")
    losses = record.losses.against_mean() if method.rule.guides else record.losses
    grads = losses.projected_grads(method.half_distance)
    if (record.losses, record.projected_grads) != (losses, grads):
        raise fault
    if method.rule.guides and len(record.tried) != 2:
        raise fault
    slopes = method.rule.slopes(grads, record.tried, method.eps)
    moments, slopes = method.rule.remember(moments, record.step, slopes, method.clip)
    if (method.normalise_z or method.rule.projects) and not lengths:
        return moments
    norms = [root_mean_square(first["shapes"], seed) for seed in update.seeds] if method.normalise_z else []
    products = inner_products(first["shapes"], update.seeds).tolist() if method.rule.projects else []
    planned = planned_steps(first, record.step, method.steps)
    lr = learning_rate(record.step, planned, method.lr, method.lr_schedule, method.warmup_steps)
    given = update.seeds, slopes, losses, lr, method.weight_decay, method.clip, norms, products
    expected = method.rule.plan(*given)
    slack = 1e-15 * method.lr / lr if lr else 0.0
    expected, factor = guard.shorten(expected)
    expected = method.rule.choose(expected, record.tried) if method.rule.compares else expected
    if not math.isclose(record.shortened, factor, rel_tol=1e-12 + slack) or not _near(update, expected, slack):
        raise fault
    return moments


def _near(update: Update, expected: Update, slack: float) -> bool:
    """Whether an update is the expected one: another machine's cosine may differ in its last bit.

    Args:
        update: of the log.
        expected: what the losses give here.
        slack: relative error of lr, which counts for more the nearer lr comes to 0.
    """
    numbers = [(*one.coefficients, one.decay, one.lr or 0.0) for one in (update, expected)]
    return all(math.isclose(a, b, rel_tol=1e-12 + slack) for a, b in zip(*numbers, strict=True))

"""What result.json says of a run."""

from collections.abc import Mapping, Sequence

from mezo.config import Machine, Method
from mezo.run.trajectory import StepRecord
from mezo.training.clock import Clock
from mezo.training.instruments import rms
from mezo.training.ranks import Ranks

METRICS = "accuracy", "loss", "f1", "auc"
OF_TEXT = "exact_match", "reward"
"""Further figures, where text is judged."""
INSTRUMENTS = {
    "projected_grad_noise": ("noise", "noise"),
    "projected_grad_rms": ("noise", "projected_grad_rms"),
    "projected_grad_spread": ("spread", "over_perturbations"),
    "projected_grad_batch_error": ("spread", "over_batch"),
    "perturbation_error": ("spread", "perturbation_error"),
    "perturbation_cosine": ("spread", "perturbation_cosine"),
    "gradient_cosine": ("gradient", "cosine"),
    "gradient_expected_cosine": ("gradient", "expected_cosine"),
    "gradient_norm": ("gradient", "gradient_norm"),
    "projected_grad_error": ("gradient", "projected_grad_error"),
}
"""Where in metrics.jsonl the result's numbers on the estimate come from: kind of row and key."""


def result(
    method: Method,
    machine: Machine,
    best: int,
    after: dict[str, dict],
    records: Sequence[StepRecord],
    metrics: Sequence[dict],
    clock: Clock,
    ranks: Ranks,
    examples: Mapping[str, int],
) -> dict:
    """The result of a run that reached its last step, or was stopped early.

    Args:
        method, machine: groups of the run's configuration.
        best: step whose adapter was kept.
        after: rows of that adapter, by split.
        records: of all steps.
        metrics: rows of metrics.jsonl.
        clock: of the run.
        ranks: what they exchanged.
        examples: how many each split has.
    """
    before = {split: next(r for r in metrics if r["split"] == split) for split in after}
    grads = [g for record in records if not record.update.skipped for g in record.projected_grads]
    tokens, eval_tokens, seconds = clock.runtime.tokens, clock.runtime.eval_tokens, clock.seconds
    return {
        **{s: {"before": _take(before[s], METRICS), "after": _take(after[s], METRICS)} for s in after},
        "dev": [_take(row, ("step", *METRICS)) for row in metrics if row["split"] == "dev"],
        "best_step": best,
        "examples": dict(examples),
        "steps": len(records),
        "stopped_early": len(records) < method.steps,
        "steps_counted": clock.steps,
        "seconds_training": seconds["training"],
        "seconds_of_training": {**clock.parts, "bookkeeping": seconds["training"] - sum(clock.parts.values())},
        "seconds_loading": seconds["loading"],
        "seconds_proof": seconds["proving"],
        "seconds_cache_filling": seconds["filling"],
        "seconds_compilation": seconds["compilation"],
        "seconds_evaluation": seconds["evaluation"],
        "steps_per_second": clock.rate,
        "runtime": machine.runtime.name,
        "ranks": ranks.size,
        "bytes_exchanged_per_step": ranks.bytes_exchanged / max(clock.steps_here, 1),
        "tokens_scored": tokens.scored,
        "tokens_computed": round(tokens.computed),
        "tokens_reused": round(tokens.reused),
        "eval_tokens_scored": eval_tokens.scored,
        "eval_tokens_computed": round(eval_tokens.computed),
        "eval_tokens_reused": round(eval_tokens.reused),
        "tokens_cache_filled": clock.filled,
        **({} if (noise := getattr(clock.runtime, "batch_noise", None)) is None else {"batch_noise": noise}),
        **_instruments(metrics),
        "zero_gradient_share": sum(g == 0 for g in grads) / max(len(grads), 1),
        "clipped_share": sum(abs(g) > method.clip for g in grads) / max(len(grads), 1) if method.clip else 0.0,
        "shortened_steps": sum(record.shortened < 1 for record in records),
        "zero_steps": sum(not record.update.skipped and not any(record.update.coefficients) for record in records),
        "skipped_steps": sum(record.update.skipped for record in records),
    }


def _instruments(metrics: Sequence[dict]) -> dict:
    """What the instruments found over the run: root mean squares, and means of cosines."""
    totals = {}
    for name, (split, key) in INSTRUMENTS.items():
        values = [row[key] for row in metrics if row["split"] == split and key in row]
        if values:
            totals[name] = sum(values) / len(values) if key.endswith("cosine") else rms(values)
    return totals


def _take(row: dict, keys: Sequence[str]) -> dict:
    return {key: row.get(key) for key in keys} | {key: row[key] for key in OF_TEXT if key in row}

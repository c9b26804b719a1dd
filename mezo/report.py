"""What a run did and where its time went, from its files alone: what `mezo report` prints."""

from pathlib import Path

from mezo.checkpoint import RunDirectory
from mezo.config import UserError
from mezo.trajectory import read_trajectory

PARTS = {
    "kernels": "fused update and perturbation of theta",
    "forward": "transformers",
    "rpc": "calls to the engine's workers, less the kernels",
    "engine": "SGLang: scheduling and forward passes",
    "bookkeeping": "log, objective, progress",
}


def tables(run: str) -> dict[str, list[tuple[str, ...]]]:
    """Rows by the title of their table.

    Args:
        run: directory of a finished run.
    Raises:
        UserError: it is none.
    """
    directory = RunDirectory(Path(run))
    if not directory.result.is_file():
        raise UserError(f"{run}: no result.json there; give a finished run, or use `mezo trajectory show {run}`")
    result, config = directory.read_result(), directory.read_config()
    first, records = read_trajectory(directory.trajectory)
    facts = [
        ("model", first["model"]),
        ("runtime", result["runtime"]),
        ("steps", f"{len(records)}, best {result['best_step']}, {result['skipped_steps']} skipped"),
        ("speed", f"{result['steps_per_second']:.2f} steps/s at batch {config.batch_size}"),
        ("zero projected_grads", f"{100 * result['zero_gradient_share']:.1f} %"),
    ]
    if "projected_grad_noise" in result:
        noise, signal = result["projected_grad_noise"], result["projected_grad_rms"]
        facts.append(("noise of projected_grad", f"{noise:.3g}, beside a root mean square of {signal:.3g}"))
    return {
        "result": facts,
        "before, after": _changes(result),
        "tokens": [_tokens(result, prefix, what) for prefix, what in (("", "training"), ("eval_", "evaluation"))],
        "seconds of training": _seconds(result),
    }


def _changes(result: dict) -> list[tuple[str, ...]]:
    scored = [name for name in ("test", "train") if name in result]
    keys = ("accuracy", "auc", "f1", "exact_match", "reward", "loss")
    pairs = [(f"{n} {key}", result[n], key) for n in scored for key in keys if key in result[n]["before"]]
    return [(label, _number(row["before"][key]), _number(row["after"][key])) for label, row, key in pairs]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _tokens(result: dict, prefix: str, what: str) -> tuple[str, ...]:
    scored, computed, reused = (result[f"{prefix}tokens_{kind}"] for kind in ("scored", "computed", "reused"))
    share = 100 * reused / max(scored, 1)
    return what, f"{scored:,} scored", f"{computed:,} computed", f"{reused:,} reused ({share:.1f} %)"


def _seconds(result: dict) -> list[tuple[str, ...]]:
    parts, total = result.get("seconds_of_training", {}), max(result["seconds_training"], 1e-9)
    return [(n, f"{s:.2f} s", f"{100 * s / total:.1f} %", PARTS.get(n, "")) for n, s in parts.items()]

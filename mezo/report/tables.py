"""What a run did, where its time went and what to look out for, from its files alone: what `mezo report` prints."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from mezo.config import Config
from mezo.config.options import shown
from mezo.errors import UserError
from mezo.report import samples
from mezo.report.monitor import warning
from mezo.report.verdict import verdicts
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.run.stopping import WARNED, WINDOW, loss_ratio
from mezo.run.trajectory import read_trajectory

PARTS = {
    "kernels": "fused update and perturbation of theta",
    "forward": "transformers",
    "rpc": "calls to the engine's workers, less the kernels",
    "engine": "SGLang: scheduling and forward passes",
    "bookkeeping": "log, objective, progress",
}
MANY_ZEROS, MANY_CLIPPED = 0.1, 0.5  # shares of projected_grads from where they are warned of


def finished(run: str) -> RunDirectory:
    """A finished run. Raises UserError if there is no result."""
    directory = RunDirectory(Path(run))
    if not directory.result.is_file():
        raise UserError(f"{run}: no result.json there; give a finished run, or use `mezo trajectory show {run}`")
    return directory


def tables(run: str) -> dict[str, list[tuple[str, ...]]]:
    """Rows by the title of their table.

    Args:
        run: directory of a finished run.
    Raises:
        UserError: it is none.
    """
    directory = finished(run)
    result, config = directory.read_result(), directory.read_config()
    first, records = read_trajectory(directory.trajectory)
    early = ", ended early" if result.get("stopped_early") else ""
    facts = [
        ("model", _model_name(first["model"])),
        ("runtime", result["runtime"]),
        (
            "steps",
            f"{len(records)}{early}, best {result['best_step']}, {result['skipped_steps']} skipped{_shortened(result)}",
        ),
        ("speed", f"{result['steps_per_second']:.2f} steps/s at batch {config.method.batch_size}"),
        ("zero projected_grads", f"{100 * result['zero_gradient_share']:.1f} %"),
        *_instruments(result),
    ]
    return {
        "verdict": [(text,) for text in verdicts(result, run)],
        "before, after": _changes(result),
        **_examples(directory, config),
        "result": facts,
        "seconds of the run": time_spent(result),
        "tokens": [_tokens(result, prefix, what) for prefix, what in (("", "training"), ("eval_", "evaluation"))],
        "seconds of training": _seconds(result),
    }


def _examples(directory: RunDirectory, config: Config) -> dict[str, list[tuple[str, ...]]]:
    """Tables of single examples, head first: those of the split that stands for the run."""
    before, after = _looked_at(directory)
    names = samples.class_names(after, config.data.label_words)
    split = after.get("split", "")
    found = {
        f"texts of {split}": samples.texts(before=before, after=after),
        f"answers on {split}": samples.answered(after, names),
        f"mistakes on {split} it is surest of": samples.mistakes(after, names),
    }
    dev = [row for row in directory.read_metrics() if row["split"] == "dev"]
    found["texts of dev at each evaluation"] = samples.texts_by_step(dev)
    return {title: rows for title, rows in found.items() if rows}


def _looked_at(directory: RunDirectory) -> tuple[dict, dict]:
    """The first evaluation of a run and that of what it kept: of test, else of dev; ({}, {}) where there is none."""
    metrics = directory.read_metrics()
    for split in ("test", "dev"):
        if rows := [row for row in metrics if row["split"] == split]:
            return rows[0], [row for row in rows if split == "test" or row["is_best"]][-1]
    return {}, {}


def headed(title: str, rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head of a table, () if it has none, and the rows below it.

    Args:
        title, rows: an item of `tables`.
    """
    if title.startswith(("texts of", "answers on", "mistakes on")):
        return rows[0], rows[1:]
    return HEADS.get(title, ()), rows


HEADS = {
    "before, after": ("figure", "before", "after"),
    "seconds of the run": ("part", "time", "share", "speed", "what it is"),
    "tokens": ("of", "scored", "computed", "from a cache"),
    "seconds of training": ("part", "time", "share", "what it is"),
}
"""What the columns of a table hold, where that is not plain to see."""
WORK = ("result", "seconds of the run", "tokens", "seconds of training")
"""Tables on what a run took, which the page folds."""
HEADLINES = ("reward", "accuracy", "f1", "loss")
"""Figures of a run, the first of which that it has stands for it in a comparison."""


def headline(run: str) -> list[str]:
    """What the run came to, in one line, and what to compare that with; none where nothing was tested or evaluated.

    Args:
        run: directory of a finished run.
    """
    head, row = comparison([run], [run])
    cells = dict(zip(head, row, strict=True))
    beside = [text] if (text := samples.yardstick(_looked_at(finished(run))[1])) else []
    percent = lambda name: _percent(cells["figure"], cells[name])  # noqa: E731
    if cells["test after"] != "-":
        return [f"test {cells['figure']} {percent('test before')} to {percent('test after')}", *beside]
    if cells["best dev"] != "-":
        return [f"dev {cells['figure']} {percent('best dev')} at step {cells['at step']}", *beside]
    return []


def _percent(figure: str, number: str) -> str:
    """A number of a table, shares as percent.

    >>> _percent("accuracy", "0.7500"), _percent("loss", "0.7500")
    ('75.0 %', '0.7500')
    """
    return f"{100 * float(number):.1f} %" if figure in ("accuracy", "f1") and number != "-" else number


def _model_name(model: str) -> str:
    """A hub id or a name, of which the path in a cache is an absolute one; any other path as it is.

    >>> _model_name("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc"), _model_name("/data/m")
    ('org/name', '/data/m')
    >>> _model_name("/home/me/.cache/mezo-kernels/smollm2-135m")
    'smollm2-135m'
    """
    parts = Path(model).parts
    if cached := [part for part in parts if part.startswith("models--")]:
        return cached[-1].removeprefix("models--").replace("--", "/")
    return parts[-1] if ".cache" in parts else model


def comparison(runs: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Runs beside each other: a head, then a row a run.

    Args:
        runs: directories of finished runs.
        names: what to call them.
    """
    head = ("run", "figure", "test before", "test after", "best dev", "at step", "of", "steps/s", "seconds in all")
    return [head, *(_compared(name, finished(run).read_result()) for name, run in zip(names, runs, strict=True))]


def _compared(name: str, result: dict) -> tuple[str, ...]:
    test, dev = result.get("test"), result["dev"]
    some = test["after"] if test else dev[0] if dev else {}
    key = next((key for key in HEADLINES if some.get(key) is not None), "loss")
    at_best = next((row for row in dev if row["step"] == result["best_step"]), {})
    seconds = sum(result.get(key, 0.0) for key, _, _ in SPENT.values())
    figures = [
        _number(row.get(key)) for row in ((test or {}).get("before", {}), (test or {}).get("after", {}), at_best)
    ]
    steps = str(result["best_step"]), str(result["steps"])
    return (name, key, *figures, *steps, f"{result['steps_per_second']:.2f}", f"{seconds:.0f}")


def differences(runs: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Options that are not the same in all runs: a head, then a row an option; where a run is written is left out.

    Args:
        runs: directories of runs.
        names: what to call them.
    """
    flat = [RunDirectory(Path(run)).read_config().to_dict() for run in runs]
    values = {name: [shown(own.get(name, "-")) for own in flat] for name in itertools.chain(*flat)}
    rows = [(name, *each) for name, each in values.items() if len(set(each)) > 1 and name != "output_dir"]
    return [("option", *names), *rows]


def warnings(run: str) -> list[str]:
    """What a person should know before trusting a finished run, a sentence each."""
    directory = finished(run)
    result, (first, records) = directory.read_result(), read_trajectory(directory.trajectory)
    texts = []
    if "projected_grad_noise" in result:
        noise, signal = result["projected_grad_noise"], result["projected_grad_rms"]
        text = warning({"split": "noise", "noise": noise, "projected_grad_rms": signal})
        texts.append(text and f"noise of {text}")
    if "perturbation_error" in result:
        texts.append(warning({"split": "spread", **result}))
    if result["zero_gradient_share"] > MANY_ZEROS:
        texts.append(f"{100 * result['zero_gradient_share']:.0f} % of projected_grads are zero: raise --eps")
    if result["clipped_share"] > MANY_CLIPPED:
        texts.append(
            f"{100 * result['clipped_share']:.0f} % of projected_grads are clipped: raise --clip or lower --lr"
        )
    if result["skipped_steps"]:
        texts.append(f"{result['skipped_steps']} steps were skipped, their loss was not finite: lower --lr or --eps")
    ratio = loss_ratio(records)
    if ratio is not None and ratio > WARNED:
        texts.append(f"the mean loss of the last {WINDOW} steps is {ratio:.3g} times that of the first: lower --lr")
    if result["dev"] and result["best_step"] == 0:
        name = outcome.path(directory, first["peft"]).name
        texts.append(f"no evaluation of dev was better than the first: {name}/ is what the run started from")
    return [text for text in texts if text]


def _shortened(result: dict) -> str:
    n = result.get("shortened_steps", 0)
    return f", {n} shortened by --max-step-ratio" if n else ""


def _instruments(result: dict) -> list[tuple[str, str]]:
    """Rows on what projected_grad is worth, as far as it was measured."""
    number = lambda name: f"{result[name]:.3g}"  # noqa: E731
    shown = {
        "projected_grad_noise": (
            "noise of projected_grad",
            lambda n: f"{number(n)}, beside a root mean square of {number('projected_grad_rms')}",
        ),
        "projected_grad_batch_error": ("its standard error over the batch", number),
        "projected_grad_spread": ("its spread over perturbations", number),
        "batch_noise": ("log-probabilities of adapters in one batch off each alone by", lambda n: f"{result[n]:.2g}"),
        "perturbation_error": (
            "rounding of a perturbation",
            lambda n: f"{100 * result[n]:.2g} % (cosine {result['perturbation_cosine']:.5f})",
        ),
        "gradient_cosine": (
            "cosine to the true gradient",
            lambda n: f"{result[n]:.4f} on average, of size {result['gradient_expected_cosine']:.4f} expected",
        ),
        "projected_grad_error": ("projected_grad off z . grad by", lambda n: f"{100 * result[n]:.2g} %"),
    }
    return [(label, text(name)) for name, (label, text) in shown.items() if name in result]


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


SPENT = {
    "loading": ("seconds_loading", "", "data, model, and an engine's start"),
    "proof": ("seconds_proof", "", "scores compared with those of the model itself"),
    "compilation": ("seconds_compilation", "", "the first call of the kernels"),
    "cache": ("seconds_cache_filling", "tokens_cache_filled", "what training does not change, computed once"),
    "evaluation": ("seconds_evaluation", "eval_tokens_scored", "dev, test, and how good the estimates are"),
    "steps": ("seconds_training", "tokens_scored", ""),
}


def time_spent(result: dict) -> list[tuple[str, ...]]:
    """Where all of a run's time went: part, seconds, share, tokens a second, what it is; what took none is left out.

    Args:
        result: what result.json holds.
    """
    seconds = {part: result.get(key, 0.0) for part, (key, _, _) in SPENT.items()}
    total, rows = max(sum(seconds.values()), 1e-9), []
    for part, (_, tokens, what) in SPENT.items():
        if seconds[part] and seconds[part] > 0:
            rate = f"{result[tokens] / seconds[part]:,.0f} tokens/s" if result.get(tokens) else ""
            rows.append((part, f"{seconds[part]:.1f} s", f"{100 * seconds[part] / total:.1f} %", rate, what))
    return [*rows, ("in all", f"{total:.1f} s", "", "", "")]


def _seconds(result: dict) -> list[tuple[str, ...]]:
    parts, total = result.get("seconds_of_training", {}), max(result["seconds_training"], 1e-9)
    return [(n, f"{s:.2f} s", f"{100 * s / total:.1f} %", PARTS.get(n, "")) for n, s in parts.items()]

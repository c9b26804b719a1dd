"""Figures of one or several runs, drawn from their logs alone: for the report's page, or as picture files."""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mezo.run.trajectory import StepRecord

POINTS, STEPS = 400, 8  # of a curve at most, and steps each is the mean of at least: the range lies behind it
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mezo",  # the same run gives the same ids, and with METADATA the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
METADATA = {"svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "png": {"Software": None}}


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run.

    Args:
        name: for the legend.
        records: steps.
        metrics: rows of metrics.jsonl.
        result: result.json.
    """

    name: str
    records: Sequence[StepRecord]
    metrics: Sequence[dict]
    result: dict

    def points(self, split: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of the rows of a split that have one."""
        return [(r["step"], r[key]) for r in self.metrics if r["split"] == split and r.get(key) is not None]


@dataclass(frozen=True)
class Drawing:
    """A figure of a report.

    Args:
        name: of a file that it is written to, without an ending.
        caption: what it shows.
        figure: of matplotlib.
    """

    name: str
    caption: str
    figure: Figure

    def render(self, form: str) -> bytes:
        """The figure as a file: `form` is "svg" or "png"."""
        buffer = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(buffer, format=form, dpi=120, metadata=METADATA[form], transparent=form == "svg")
        return buffer.getvalue()


def drawings(runs: Sequence[Curves]) -> list[Drawing]:
    """The figures of runs, beside each other; those of which no run has anything are left out."""
    kinds = {
        ("loss", "loss: training, mean of both signs, and dev (dots)"): _loss,
        ("dev_accuracy", "dev accuracy"): functools.partial(_dev, key="accuracy", among="accuracy"),
        ("dev_f1", "dev F1 of generated text"): functools.partial(_dev, key="f1", among="exact_match"),
        ("dev_reward", "dev reward"): functools.partial(_dev, key="reward", among="reward"),
        ("projected_grad", "|projected_grad|, and what is uncertain of it"): _projected_grad,
        ("cosine", "cosine of the estimate to the true gradient"): _cosine,
        ("step_parts", "milliseconds of a training step by part"): _parts,
    }
    drawn = []
    with rc_context(STYLE):
        for (name, caption), draw in kinds.items():
            if draw is _parts and len(runs) == 1:
                continue  # a table says it in three lines
            height = 1.2 + 0.35 * len(runs) if draw is _parts else 3.2
            figure = Figure(figsize=(5.6, height), layout="constrained")
            if draw(figure.subplots(), runs):
                drawn.append(Drawing(name, caption, figure))
    return drawn


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """A series as (step, mean, least, greatest) of pieces of STEPS steps, or of more if that gives POINTS pieces.

    >>> [values.tolist() for values in binned(np.arange(16), np.arange(16.0))]
    [[3.5, 11.5], [3.5, 11.5], [0.0, 8.0], [7.0, 15.0]]
    """
    pieces = np.array_split(np.arange(len(steps)), min(POINTS, -(-len(steps) // STEPS)))
    means, least, greatest = (np.array([f(values[piece]) for piece in pieces]) for f in (np.mean, np.min, np.max))
    return np.array([steps[piece].mean() for piece in pieces]), means, least, greatest


def _series(axes: Axes, run: Curves, values: Callable[[StepRecord], float], label: str, **style) -> None:
    done = [record for record in run.records if not record.update.skipped]
    steps = np.array([record.step for record in done])
    at, mean, least, greatest = binned(steps, np.array([values(record) for record in done]))
    (line,) = axes.plot(at, mean, linewidth=1, label=label, **style)
    axes.fill_between(at, least, greatest, alpha=0.15, color=line.get_color(), linewidth=0)


def _loss(axes: Axes, runs: Sequence[Curves]) -> bool:
    for i, run in enumerate(runs):
        if not all(record.update.skipped for record in run.records):
            _series(axes, run, lambda r: r.losses.mean, run.name, color=f"C{i}")
        dev = run.points("dev", "loss")
        if dev and not any(record.losses.mean < 0 for record in run.records):  # what is maximised is another figure
            axes.plot(*zip(*dev, strict=True), "o", markersize=4, color=f"C{i}", label=f"{run.name}, dev")
    return _finish(axes, "loss")


def _dev(axes: Axes, runs: Sequence[Curves], key: str, among: str) -> bool:
    """A figure of dev, of the runs that have `among` there."""
    for i, run in enumerate(runs):
        if run.points("dev", key) and run.points("dev", among):
            axes.plot(
                *zip(*run.points("dev", key), strict=True),
                "o-",
                markersize=4,
                linewidth=1,
                color=f"C{i}",
                label=run.name,
            )
    return _finish(axes, key)


def _projected_grad(axes: Axes, runs: Sequence[Curves]) -> bool:
    """Root mean square of each bin on a logarithmic axis, for noise is often decades below."""
    kinds = {
        ("noise", "noise"): ("s", "noise"),
        ("spread", "over_batch"): ("^", "standard error over the batch"),
        ("spread", "over_perturbations"): ("v", "spread over perturbations"),
    }
    for i, run in enumerate(runs):
        done = [record for record in run.records if not record.update.skipped and any(record.projected_grads)]
        if done:
            steps, squares = (
                np.array([f(record) for record in done])
                for f in (lambda r: r.step, lambda r: np.mean(np.square(r.projected_grads)))
            )
            at, mean, *_ = binned(steps, squares)
            axes.plot(at, np.sqrt(mean), linewidth=1, color=f"C{i}", label=run.name)
        for (split, key), (marker, label) in kinds.items():
            points = [(step, value) for step, value in run.points(split, key) if value > 0]
            if points:
                label = f"{run.name}, {label}"
                axes.plot(
                    *zip(*points, strict=True), marker, markersize=4, color=f"C{i}", fillstyle="none", label=label
                )
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    return _finish(axes, "|projected_grad|")


def _cosine(axes: Axes, runs: Sequence[Curves]) -> bool:
    for i, run in enumerate(runs):
        points, expected = run.points("gradient", "cosine"), run.points("gradient", "expected_cosine")
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1, color=f"C{i}", label=run.name)
            axes.plot(
                *zip(*expected, strict=True), "--", linewidth=1, color=f"C{i}", label=f"{run.name}, expected size"
            )
    return _finish(axes, "cosine")


def _parts(axes: Axes, runs: Sequence[Curves]) -> bool:
    colours: dict[str, str] = {}
    for i, run in enumerate(runs):
        left, steps = 0.0, max(run.result["steps_counted"], 1)
        for part, seconds in run.result["seconds_of_training"].items():
            label = None if part in colours else part
            colour, wide = colours.setdefault(part, f"C{len(colours)}"), 1e3 * seconds / steps
            axes.barh(i, wide, left=left, color=colour, label=label)
            left += wide
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set(xlabel="ms")
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, ncols=len(colours), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return True


def _finish(axes: Axes, label: str) -> bool:
    axes.set(xlabel="step", ylabel=label)
    if axes.lines:
        axes.legend(fontsize=8)
    return bool(axes.lines)

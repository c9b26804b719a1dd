"""Figures of one or several runs as inline SVG: no file, no script and no address outside the page."""

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mezo.run.trajectory import StepRecord

POINTS, STEPS = 400, 8  # of a curve at most, and steps each is the mean of at least: the range lies behind it
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mezo",  # the same run gives the same bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


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


def figures(runs: Sequence[Curves]) -> dict[str, str]:
    """SVG by caption; figures of which no run has anything are left out."""
    drawn = {
        "loss: training, mean of both signs, and dev (dots)": _loss,
        "dev accuracy": functools.partial(_dev, key="accuracy", among="accuracy"),
        "dev F1 of generated text": functools.partial(_dev, key="f1", among="exact_match"),
        "dev reward": functools.partial(_dev, key="reward", among="reward"),
        "|projected_grad|, and what is uncertain of it": _projected_grad,
        "cosine of the estimate to the true gradient": _cosine,
        "milliseconds of a training step by part": _parts,
    }
    found = {}
    with matplotlib.rc_context(STYLE):
        for caption, draw in drawn.items():
            figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
            if draw(axes, runs):
                found[caption] = svg(figure, f"f{len(found)}")
            plt.close(figure)
    return found


def svg(figure, prefix: str) -> str:
    """A figure as an <svg> element for HTML; its ids get a prefix, for several live in one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", text)


def binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """A series as (step, mean, least, greatest) of pieces of STEPS steps, or of more if that gives POINTS pieces.

    >>> binned(np.arange(16), np.arange(16.0))
    (array([ 3.5, 11.5]), array([ 3.5, 11.5]), array([0., 8.]), array([ 7., 15.]))
    """
    pieces = np.array_split(np.arange(len(steps)), min(POINTS, -(-len(steps) // STEPS)))
    means, least, greatest = (np.array([f(values[piece]) for piece in pieces]) for f in (np.mean, np.min, np.max))
    return np.array([steps[piece].mean() for piece in pieces]), means, least, greatest


def _series(axes, run: Curves, values, label: str, **style) -> None:
    done = [record for record in run.records if not record.update.skipped]
    steps = np.array([record.step for record in done])
    at, mean, least, greatest = binned(steps, np.array([values(record) for record in done]))
    (line,) = axes.plot(at, mean, linewidth=1, label=label, **style)
    axes.fill_between(at, least, greatest, alpha=0.15, color=line.get_color(), linewidth=0)


def _loss(axes, runs) -> bool:
    for i, run in enumerate(runs):
        if not all(record.update.skipped for record in run.records):
            _series(axes, run, lambda r: r.losses.mean, run.name, color=f"C{i}")
        dev = run.points("dev", "loss")
        if dev:
            axes.plot(*zip(*dev, strict=True), "o", markersize=4, color=f"C{i}", label=f"{run.name}, dev")
    return _finish(axes, "loss")


def _dev(axes, runs, key: str, among: str) -> bool:
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


def _projected_grad(axes, runs) -> bool:
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
    return _finish(axes, "|projected_grad|")


def _cosine(axes, runs) -> bool:
    for i, run in enumerate(runs):
        points, expected = run.points("gradient", "cosine"), run.points("gradient", "expected_cosine")
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1, color=f"C{i}", label=run.name)
            axes.plot(
                *zip(*expected, strict=True), "--", linewidth=1, color=f"C{i}", label=f"{run.name}, expected size"
            )
    return _finish(axes, "cosine")


def _parts(axes, runs) -> bool:
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
    axes.legend(fontsize=8)
    return True


def _finish(axes, label: str) -> bool:
    axes.set(xlabel="step", ylabel=label)
    if axes.lines:
        axes.legend(fontsize=8)
    return bool(axes.lines)

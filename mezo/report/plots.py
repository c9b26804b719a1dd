"""Curves of a run, drawn from its logs alone."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mezo.run.trajectory import StepRecord


def draw(directory: Path, records: list[StepRecord], metrics: list[dict]) -> None:
    """Write training_loss.png, dev_accuracy.png (or what dev has instead), projected_grad.png, zero_gradients.png."""
    directory.mkdir(exist_ok=True)
    done = [record for record in records if not record.update.skipped]
    steps = np.array([record.step for record in done])
    losses = np.array([record.losses.mean for record in done])
    grads = np.array([np.mean(np.abs(record.projected_grads)) for record in done])
    zero = np.array([np.mean(np.array(record.projected_grads) == 0) for record in done])
    _curve(directory / "training_loss.png", steps, losses, "training loss (mean of both signs)")
    _curve(directory / "projected_grad.png", steps, grads, "|projected_grad|")
    _curve(directory / "zero_gradients.png", steps, zero, "share of zero projected_grads")
    rows = [row for row in metrics if row["split"] == "dev"]
    for key in ("accuracy", "reward", "f1", "loss"):
        dev = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if dev:
            figure, axes = _axes(f"dev {key}")
            axes.plot(*zip(*dev, strict=True), marker="o")
            _save(figure, directory / f"dev_{key}.png")
            break


def _curve(path: Path, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """A series, faint, under its running mean over a fiftieth of the run."""
    if not len(steps):
        return
    figure, axes = _axes(label)
    window = max(1, len(steps) // 50)
    axes.plot(steps, values, alpha=0.25, linewidth=0.5)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, label=f"mean of {window} steps")
    axes.legend()
    _save(figure, path)


def _axes(label: str):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)

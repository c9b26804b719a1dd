"""Where curves go while a run goes on: TensorBoard, Weights & Biases, Trackio."""

import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any, Protocol

from mezo.config.machine import DASHBOARDS, dashboards_of
from mezo.errors import UserError

PROJECT = "mezo"
"""Name of the project, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise."""


class Dashboard(Protocol):
    """What curves are shown by."""

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        """Add a point to some curves. Steps need not ascend: the best theta is scored again at the end."""

    def text(self, name: str, markdown: str, step: int) -> None:
        """Add a text."""

    def close(self) -> None:
        """Bring everything to the disk, or to the server."""


class TensorBoard:
    """Event files in tensorboard/ of the run."""

    def __init__(self, run: Path, start: int, options: Mapping[str, Any]):
        import logging

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter  # slow to import; not needed by eval and replay

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        """See `Dashboard`."""
        for name, value in points.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, markdown: str, step: int) -> None:
        """See `Dashboard`."""
        self.writer.add_text(name, markdown, step)

    def close(self) -> None:
        """See `Dashboard`."""
        self.writer.close()


class WandB:
    """Weights & Biases: files in wandb/ of the run, sent unless WANDB_MODE is offline. A resumed run goes on there."""

    def __init__(self, run: Path, start: int, options: Mapping[str, Any]):
        import wandb

        self.wandb, path = wandb, run.absolute()
        known = {"id": hashlib.sha256(str(path).encode()).hexdigest()[:12], "name": path.name, "resume": "allow"}
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        with contextlib.redirect_stdout(sys.stderr):
            self.run = wandb.init(project=project, dir=str(path), config=dict(options), **known)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        """See `Dashboard`."""
        self.run.log({**points, "step": step})

    def text(self, name: str, markdown: str, step: int) -> None:
        """See `Dashboard`."""
        self.run.log({name: self.wandb.Html(f"<pre>{escape(markdown)}</pre>"), "step": step})

    def close(self) -> None:
        """See `Dashboard`."""
        self.run.finish()


class Trackio:
    """Trackio: a database on this machine, or a Space where TRACKIO_SPACE_ID names one."""

    def __init__(self, run: Path, start: int, options: Mapping[str, Any]):
        import trackio

        self.trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with contextlib.redirect_stdout(sys.stderr):
            self.run = trackio.init(project=project, name=run.absolute().name, config=dict(options), resume="allow")

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        """See `Dashboard`."""
        self.run.log(dict(points), step=step)

    def text(self, name: str, markdown: str, step: int) -> None:
        """See `Dashboard`."""
        self.run.log({name: self.trackio.Markdown(markdown)}, step=step)

    def close(self) -> None:
        """See `Dashboard`."""
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


KINDS: dict[str, Callable[[Path, int, Mapping[str, Any]], Dashboard]] = dict(
    zip(DASHBOARDS, (TensorBoard, WandB, Trackio), strict=True)
)


def opened(report_to: str, run: Path, start: int, options: Mapping[str, Any]) -> list[Dashboard]:
    """The dashboards of a run.

    Args:
        report_to: what `--report-to` has.
        run: its directory.
        start: step that it (re)starts at.
        options: of the run, to be shown beside its curves.
    """
    return [KINDS[name](run, start, options) for name in dashboards_of(report_to)]


def check(report_to: str) -> None:
    """Raise UserError for a dashboard that is not installed, or that wants an account which is not there."""
    for name in dashboards_of(report_to):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {report_to}: {name} is not installed: pip install {name}, or leave it out")
        if name == "wandb":
            import wandb

            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
                raise UserError(
                    f"--report-to {report_to}: no account of W&B is known here: run wandb login, or set"
                    " WANDB_MODE=offline to write files alone"
                )

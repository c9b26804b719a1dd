"""What a person watches while a run goes on: a progress bar, lines, and curves on dashboards."""

import time
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mezo.progress import EVERY, lasting
from mezo.progress import console as new_console
from mezo.report.dashboards import Dashboard
from mezo.report.samples import judgement
from mezo.run.trajectory import StepRecord

NOISY = 0.1  # of projected_grad, from where its noise is warned of
ROUNDED = 0.5  # of a perturbation, from where what rounding does to it is warned of
CURVES = {
    "noise": "projected_grad_noise",
    "over_perturbations": "projected_grad_spread",
    "over_batch": "projected_grad_batch_error",
    "perturbation_error": "perturbation_error",
    "perturbation_cosine": "perturbation_cosine",
    "cosine": "gradient_cosine",
    "gradient_norm": "gradient_norm",
    "projected_grad_error": "projected_grad_error",
}
"""Name of the curve of a number of the instruments."""
LOG_EVERY = 10  # steps between points of a curve; one costs about a tenth of a millisecond


class Monitor:
    """Shows steps and evaluations. Use as a context manager.

    Args:
        dashboards: where curves go; see `mezo.report.dashboards.opened`.
        steps: length of the run.
        start: step the run (re)starts at.
        quiet: show and write nothing.
    """

    def __init__(self, dashboards: Sequence[Dashboard], steps: int, start: int, quiet: bool = False):
        self.dashboards = dashboards
        self.console = new_console(stderr=True, quiet=quiet)
        self.steps, self.start, self.began = steps, start, time.monotonic()
        self.due = EVERY
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  |g| {task.fields[grad]:.3g}  {task.fields[rate]:.1f} steps/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, loss=float("nan"), grad=0.0, rate=0.0)

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exc):
        self.progress.stop()
        for dashboard in self.dashboards:
            dashboard.close()

    def step(self, record: StepRecord, rate: float) -> None:
        """Show one step; `rate` in steps a second."""
        n = len(record.projected_grads)
        loss = record.losses.mean
        grad = sum(map(abs, record.projected_grads)) / n
        self.progress.update(self.task, completed=record.step + 1, loss=loss, grad=grad, rate=rate)
        self._tell(record.step + 1, loss, grad, rate)
        if record.step % LOG_EVERY == 0:
            points = {"train/loss": loss, "train/abs_projected_grad": grad, "train/steps_per_second": rate}
            self._draw(points, record.step)

    def _draw(self, points: dict[str, float], step: int) -> None:
        """Add a point to some curves."""
        for dashboard in self.dashboards if points else ():
            dashboard.scalars(points, step)

    def _tell(self, done: int, loss: float, grad: float, rate: float) -> None:
        """A line a minute where there is no terminal to show a bar in."""
        seconds = time.monotonic() - self.began
        if self.console.is_terminal or seconds < self.due:
            return
        self.due = seconds + EVERY
        left = lasting(seconds / (done - self.start) * (self.steps - done))
        now = f"loss {loss:.4f}  |g| {grad:.3g}  {rate:.1f} steps/s"
        self.say(f"step {done:>6}  of {self.steps}  {now}, about {left} left")

    def evaluation(self, row: dict) -> None:
        """Show one line of metrics.jsonl."""
        metrics = {
            k: row[k] for k in ("accuracy", "loss", "f1", "exact_match", "reward", "auc") if row.get(k) is not None
        }
        self._draw({f"{row['split']}/{name}": value for name, value in metrics.items()}, row["step"])
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {row['step']:>6}  {row['split']:<5} {shown}{'  *' if row.get('is_best') else ''}")
        for sample in row.get("samples", [])[:1]:
            right = f"right: {sample['references'][0]!r:.60}; " if sample["references"] else ""
            asked = f"{sample['prompt'][-40:]!r} -> " if sample["prompt"] else ""
            self.say(f"             for example {asked}{sample['text']!r:.80} ({right}{judgement(sample)})")
        if markdown := as_markdown(row):
            for dashboard in self.dashboards:
                dashboard.text(f"{row['split']}/examples", markdown, row["step"])

    def instrument(self, row: dict) -> None:
        """Show a row of the instruments; warn of noise above a tenth of projected_grad, and of lost perturbations."""
        self._draw({f"train/{CURVES[name]}": value for name, value in row.items() if name in CURVES}, row["step"])
        text = warning(row)
        if row["split"] == "gradient" and "cosine" in row:
            cosine, expected, norm = (row[name] for name in ("cosine", "expected_cosine", "gradient_norm"))
            text = f"cosine {cosine:.4f} (of size {expected:.4f} expected), norm {norm:.3g}"
        if text:
            self.say(f"step {row['step']:>6}  {row['split']}  {text}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)


def as_markdown(row: dict) -> str:
    """The single examples of an evaluation, for dashboards; "" where there are none.

    >>> as_markdown({"mistakes": [{"prompt": "Fun.", "where": "", "right": 1, "chosen": 0, "probability": 0.75}]})
    '- Fun.: class 0 with probability 0.750, right is 1'
    """
    texts = [
        f"- {one['prompt']} **{one['text']}** (right: {', '.join(one['references'])}; {judgement(one)})"
        for one in row.get("samples", [])
    ]
    wrong = [
        f"- {one['prompt'] or one['where']}: class {one['chosen']} with probability {one['probability']:.3f}, right is"
        f" {one['right']}"
        for one in row.get("mistakes", [])
    ]
    return "\n".join(texts + wrong)


def warning(row: dict) -> str | None:
    """What a person should know of a row of the instruments, or None.

    >>> warning({"split": "noise", "noise": 0.2, "projected_grad_rms": 4.0})
    """
    if row["split"] == "noise" and row["noise"] > NOISY * row["projected_grad_rms"]:
        return (
            f"{row['noise']:.3g} on projected_grad of {row['projected_grad_rms']:.3g}: more than a tenth."
            " Raise --eps or --batch-size, or use --dtype float32 or --deterministic"
        )
    if row.get("perturbation_error", 0.0) > ROUNDED:
        share, cosine = 100 * row["perturbation_error"], row["perturbation_cosine"]
        return (
            f"rounding to the base's dtype changes a perturbation by {share:.0f} % (cosine {cosine:.3f})."
            " Raise --eps, or use --dtype float32"
        )
    return None

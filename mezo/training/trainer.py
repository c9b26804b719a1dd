"""The training loop: measure two losses, log the step, apply it (MeZO, arXiv 2305.17333, algorithm 1)."""

import json
import signal
import threading
from collections.abc import Sequence

from mezo.config import Machine, Method
from mezo.data.example import Example
from mezo.data.rewards import judges
from mezo.errors import Diverged
from mezo.method.step import Update
from mezo.report.dashboards import Dashboard, opened
from mezo.report.monitor import Monitor
from mezo.run import outcome
from mezo.run.directory import RunDirectory, best_step
from mezo.run.feedback import FeedbackLog
from mezo.run.files import replace_file
from mezo.run.stopping import WARNED, WINDOW, loss_ratio, stalled
from mezo.run.trajectory import StepRecord, TrajectoryWriter
from mezo.runtimes.base import Runtime, Serves
from mezo.training.clock import Clock
from mezo.training.evaluation import TENTHS, Evaluations
from mezo.training.measurement import Measurement, check_kernels
from mezo.training.ranks import Ranks
from mezo.training.result import result

MAX_SKIPPED = 10  # losses that are not finite, in a row, before a run is given up
SLOW = 10  # times as long as the fastest steps of a run that others must take to be worth a word


class Trainer:
    """One run, from wherever its log ends to its last step.

    Args:
        method, machine: groups of the run's configuration.
        runtime: prepared, with theta as the records leave it.
        splits: tokenised examples by split; "train" is needed.
        run: its locked directory.
        records: steps done already.
        ranks: the processes that share the work; rank 0 alone writes and evaluates.
        seconds_loading: what loading took, for the result.
        feedback: what the run was fed while it was served, if it may be.
    """

    def __init__(
        self,
        method: Method,
        machine: Machine,
        runtime: Runtime,
        splits: dict[str, Sequence[Example]],
        run: RunDirectory,
        records: Sequence[StepRecord] = (),
        ranks: Ranks | None = None,
        seconds_loading: float = 0.0,
        feedback: FeedbackLog | None = None,
    ):
        self.method, self.machine, self.runtime, self.run = method, machine, runtime, run
        self.ranks = ranks or Ranks()
        self.records = list(records)
        self.clock, judged = Clock(runtime, seconds_loading), judges(method)
        self.measurement = Measurement(method, machine, runtime, splits["train"], judged, self.ranks, feedback)
        for record in self.records:
            self.measurement.see(record)
        measured = (self.clock, self.measurement)
        self.evaluations = Evaluations(method, machine, runtime, splits, judged, run, len(records), *measured)
        self.verify_every = machine.verify_every or max(1, method.steps // TENTHS)
        self.due, self.warned, self.slow = False, False, False

    def train(self, until: int | None = None) -> dict | None:
        """Run to the last step, or until dev has not improved for long.

        Args:
            until: number of steps after which to pause, as Ctrl-C would.
        Returns:
            What result.json holds, {} on ranks above 0, None if stopped by Ctrl-C or paused.
        """
        start, end = len(self.records), min(until or self.method.steps, self.method.steps)
        handler = signal.signal(signal.SIGINT, self._interrupt) if _main_thread() else None
        self.log = TrajectoryWriter(self.run.trajectory) if self.ranks.leads else None
        try:
            shown = self._dashboards(start) if self.ranks.leads else []
            with Monitor(shown, self.method.steps, start, quiet=not self.ranks.leads) as self.monitor:
                self.monitor.say(self.runtime.describe())
                if self.records and self.evaluations.metrics:
                    self.clock.restore(self.evaluations.metrics[-1]["clock"])
                self._compile(start)
                self._evaluate_if_due()
                self._give_up_if_stuck()
                self._give_up_if_diverged()
                ends = self._ends_early()
                for _ in range(start, end):
                    if ends:
                        break
                    self._step()
                    if self.ranks.stopping:
                        return self._stop()
                    ends = self._ends_early()
                if len(self.records) < self.method.steps and not ends:
                    return self._stop()
                return self._finish() if self.ranks.leads else {}
        finally:
            if self.log:
                self.log.close()
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def _dashboards(self, start: int) -> list[Dashboard]:
        options = self.run.read_config().to_dict() if self.run.config.is_file() else {}
        return opened(self.machine.report_to, self.run.path, start, options)

    def _compile(self, start: int) -> None:
        """Write the first step's perturbations; the first call of a fused op is compiled or read from a cache."""
        with self.clock.measuring("compilation"):
            self.due = self.verify_every > 0
            self._follow_coherence(start)
            self._write_next(start)

    def _step(self) -> None:
        with self.clock.measuring_step():
            record = self.measurement.record(self.next, self.due)
            if self.log:
                self.log.append(record)
            self._apply(record)
        self.monitor.step(record, self.clock.rate)
        if record.shortened < 1:
            self._say_shortened(record)
        self._give_up_if_stuck()
        self._evaluate_if_due()
        if len(self.records) % WINDOW == 0:
            self._give_up_if_diverged()
        self._say_slow()

    def _say_slow(self) -> None:
        """Say, once, that steps take many times as long as they did: a busy machine looks like a slow program.

        Where others use the engine too, steps wait for them, and nothing is said.
        """
        slowdown, step = self.clock.slowdown(), len(self.records)
        if slowdown is not None and slowdown >= SLOW and not self.slow and not isinstance(self.runtime, Serves):
            self.slow = True
            self.monitor.say(
                f"step {step:>6}  steps take {slowdown:.0f} times as long as the fastest of this run: other work may"
                " have the cores, and threads wait for each other then; OMP_NUM_THREADS=1 waits for none"
            )

    def _say_shortened(self, record: StepRecord) -> None:
        """Say that --max-step-ratio shortened a step, the first time; the result counts them."""
        if not any(before.shortened < 1 for before in self.records[:-1]):
            longer = self.method.max_step_ratio / record.shortened
            self.monitor.say(
                f"step {record.step:>6}  was {longer:.3g} times as long as those before, shortened by --max-step-ratio;"
                " more such steps are counted alone"
            )

    def _apply(self, record: StepRecord) -> None:
        """Update theta and write both signs of the next step, in one pass."""
        self.records.append(record)
        self.due = self.verify_every > 0 and len(self.records) % self.verify_every == 0
        if self.evaluations.due(record.step):
            self._follow_coherence(record.step + 1)
        self._write_next(record.step + 1, record.update)
        if self.due and len(self.records) == self.method.steps:
            check_kernels(self.runtime, len(self.records))
        if self.due and self.ranks.size > 1:
            self.ranks.check_equal(self.runtime.theta(), len(self.records))

    def _follow_coherence(self, number: int) -> None:
        """Let a step have as many directions as the last evaluation before it found to be enough: rank 0 knows."""
        if not self.method.follow_coherence:
            return
        found = [row["directions"] for row in self.evaluations.metrics if "directions" in row and row["step"] < number]
        told = self.ranks.gather([float(found[-1] if found else self.method.directions)])
        self.measurement.directions = int(told[0][0])

    def _write_next(self, number: int, *updates: Update) -> None:
        self.next = self.measurement.step(number)
        self.runtime.update(updates, self.measurement.first(self.next), watch=self.due)

    def _give_up_if_stuck(self) -> None:
        last = self.records[-MAX_SKIPPED:]
        if len(last) == MAX_SKIPPED and all(record.update.skipped for record in last):
            raise Diverged(
                f"the loss was not finite in {MAX_SKIPPED} steps in a row; lower --lr or --eps, or use --dtype float32"
            )

    def _give_up_if_diverged(self) -> None:
        """End a run whose loss is far above where it began, as --max-loss-ratio says; else warn of it, once."""
        ratio, limit = loss_ratio(self.records), self.method.max_loss_ratio
        if ratio is None or ratio <= (limit or WARNED):
            return
        rise = f"the mean loss of {WINDOW} steps is {ratio:.3g} times that of the first {WINDOW}"
        if limit:
            self._keep()
            kept = outcome.path(self.run, self.runtime.spec.peft).name
            raise Diverged(
                f"step {len(self.records)}: {rise}, above --max-loss-ratio {limit:g}: lower --lr. The log is whole and"
                f" {kept}/ is kept; go on all the same with: mezo train --resume {self.run.path} --max-loss-ratio 0"
            )
        if not self.warned:
            self.warned = True
            self.monitor.say(f"step {len(self.records):>6}  {rise}: lower --lr; --max-loss-ratio ends such a run")

    def _ends_early(self) -> bool:
        """Whether dev has not improved for --early-stopping evaluations: rank 0 knows, and all ranks end together."""
        patience = self.method.early_stopping
        if not patience or not self.evaluations.due(len(self.records)):
            return False
        stuck = self.ranks.leads and stalled(self.evaluations.metrics, patience)
        return any(values[0] for values in self.ranks.gather([float(stuck)]))

    def _evaluate_if_due(self) -> None:
        if self.ranks.leads and self.evaluations.due(len(self.records)):
            self.log.sync()  # before the adapter and the metrics that belong to it
            self.evaluations.make(self.records, self.monitor)

    def _finish(self) -> dict:
        """Evaluate the best theta on what was evaluated before the first step, and write the result."""
        metrics = self.evaluations.metrics
        best = best_step(metrics)
        if best is None:
            outcome.save(self.run, self.runtime)
        self.runtime.load(outcome.read(self.run, self.runtime.spec))
        step = len(self.records) if best is None else best
        scored = {row["split"] for row in metrics if row["split"] in ("test", "train")}
        after = {split: self.evaluations.evaluate(split, step, self.monitor) for split in sorted(scored)}
        sizes = {split: len(examples) for split, examples in self.evaluations.splits.items()}
        summary = result(self.method, self.machine, step, after, self.records, metrics, self.clock, self.ranks, sizes)
        replace_file(self.run.result, json.dumps(summary, indent=2).encode())
        if self.method.report:
            self._write_page()
        return summary

    def _write_page(self) -> None:
        """Write report.html. The result is on the disk by now: whatever goes wrong here does not fail the run."""
        try:
            from mezo.report import page  # brings matplotlib, which nothing before needs

            page.write([str(self.run.path)], self.run.page)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            self.monitor.say(f"report.html is not written ({why}); try again: mezo report {self.run.path} --html FILE")

    def _interrupt(self, number, frame) -> None:
        if self.ranks.interrupted:
            raise KeyboardInterrupt
        self.ranks.interrupted = True

    def _stop(self) -> None:
        self._keep()
        self.monitor.say(f"stopped after step {len(self.records)}; continue with: mezo train --resume {self.run.path}")

    def _keep(self) -> None:
        """Leave theta behind, and the clock."""
        if self.ranks.leads:
            if best_step(self.evaluations.metrics) is None:
                outcome.save(self.run, self.runtime)
            self.evaluations.log({"step": len(self.records), "split": "stop"})


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

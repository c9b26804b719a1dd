"""A run that is trained and served: its promoted version, its state, and what its end means."""

import contextlib
import time
from collections.abc import Sequence

from mezo.atomic import sync
from mezo.data.further import Further
from mezo.errors import Diverged, require
from mezo.method.estimator import Losses
from mezo.method.step import Update
from mezo.progress import say
from mezo.run.directory import RunDirectory
from mezo.run.feedback import FeedbackLog
from mezo.run.header import INITIAL, frozen_part
from mezo.run.replay import theta_after
from mezo.run.trajectory import StepRecord, read_header
from mezo.runtimes.sglang.engine import POLL
from mezo.serve.http import Gate
from mezo.serve.learning import Learning
from mezo.serve.promotions import Promotions
from mezo.serve.runtime import ServingRuntime
from mezo.training.trainer import Trainer


class Session:
    """A run that is served.

    Args:
        run: its directory, locked.
        runtime: prepared; theta is as the records leave it.
        records: of its steps, in a list that grows as it is trained.
        steps: that the run is to have.
        trainer: of the rest of the run; None if there is no rest.
        further: makes examples of what users say; None where they cannot teach the run anything.
    """

    def __init__(
        self,
        run: RunDirectory,
        runtime: ServingRuntime,
        records: Sequence[StepRecord],
        steps: int,
        trainer: Trainer | None = None,
        further: Further | None = None,
    ):
        self.steps = steps
        self.directory, self.runtime, self.records, self.trainer = run, runtime, records, trainer
        self.first_line = read_header(run.trajectory)
        self.promotions, self.ended = Promotions(run.path), "" if trainer else "finished"
        self.began = time.monotonic()
        log = trainer.measurement.feedback if trainer else FeedbackLog(run.path, self.first_line["data_hash"])
        self._fed = max((record.fed[0] for record in records if record.fed), default=0)
        self.learning = Learning(log, further, runtime.refuse_further, lambda: len(records))
        runtime.frozen = frozen_part(self.first_line, run.path / INITIAL)
        runtime.replay, runtime.promoted = self._replay, self.promotions.append
        if trainer:
            runtime.admission.interrupted = lambda: trainer.ranks.interrupted

    def begin(self) -> None:
        """Warm up, promote what was promoted last, or theta_0, and put the gate in its place."""
        say("warming up")
        self.runtime.warm_up()
        nothing = StepRecord(0, Update((1,), (1e-9,), 1.0, 1e-9), Losses((), ()), ())
        theta_after(self.first_line, self.directory.path, [nothing])  # compiles what replay needs
        self._promote_first()
        self.gate = Gate(self.runtime, self.learning.recent)
        self.model = self.gate.manager.served_model_name

    def carry_through(self) -> int:
        """Train to the end, then serve what was learnt until interrupted; return the exit code."""
        return self._train() or self._wait()

    def promote(self, step: int) -> None:
        """By hand: have users be answered by theta after so many steps.

        Raises:
            UserError: they are not in the log.
        """
        self._check(step)
        if self.trainer and step:  # a step that is promoted must be there after a crash too
            sync(self.directory.trajectory)
        self.runtime.promote_step(step, "hand")

    @property
    def state(self) -> str:
        """What the trainer does."""
        return self.ended or ("paused" if self.runtime.admission.paused else "training")

    @property
    def fed(self) -> dict[str, int]:
        """Lines of feedback.jsonl by kind, requests that were refused, and the lines that batches draw from."""
        used = self.trainer.measurement.fed if self.trainer else self._fed
        return {**self.learning.log.kinds, "refused": self.learning.refused, "in_use": used}

    def _promote_first(self) -> None:
        logged = [step for step in self.promotions.steps if step <= len(self.records)]
        if logged:
            self.runtime.promoted = lambda step, why: None  # it is in the log
            self.runtime.promote_step(logged[-1], "start")
            self.runtime.promoted = self.promotions.append
        else:
            self.runtime.promote_step(0, "start")

    def _replay(self, step: int) -> dict:
        self._check(step)
        return theta_after(self.first_line, self.directory.path, self.records[:step])

    def _check(self, step: int) -> None:
        done = len(self.records)
        require(0 <= step <= done, f"step {step}: the log of {self.directory.path} has {done} steps: give one of these")

    def _train(self) -> int:
        if self.trainer is None:
            return 0
        try:
            if self.trainer.train() is None:
                self.ended = "stopped"
                return 130
            self.ended = "finished"
        except Diverged as error:
            self.ended = "diverged"
            say(f"training ended: {error}")
        return 0

    def _wait(self) -> int:
        """Serve what was learnt until somebody ends it."""
        say("training has ended; what is promoted is served until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self.runtime.engine.check_alive()
                time.sleep(POLL)
        return 0

"""Where a run's time went, over every process that worked on it."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator

from mezo.runtimes.base import Runtime

SPAN = 20
"""Steps whose median is compared with that of others."""


class Clock:
    """Seconds by kind and by part of a step, and the steps they are of; `steps_here` are those of this process.

    Args:
        runtime: its own seconds by part, its filling of caches and its tokens are read.
        loading: seconds that loading took.
    """

    def __init__(self, runtime: Runtime, loading: float = 0.0):
        self.runtime = runtime
        self.seconds = dict.fromkeys(("training", "evaluation", "compilation"), 0.0)
        self.seconds |= {"loading": loading, "filling": runtime.seconds_filling, "proving": runtime.seconds_proving}
        self.tokens_filled = 0  # by the processes before this one
        self.parts = dict.fromkeys(runtime.seconds, 0.0)
        self.steps, self.steps_here = 0, 0
        self.last, self.fastest = deque(maxlen=SPAN), float("inf")

    @contextlib.contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        """Add the time of a block to a kind, but for the filling of caches in it."""
        started, filled = time.perf_counter(), self.runtime.seconds_filling
        yield
        filling = self.runtime.seconds_filling - filled
        self.seconds["filling"] += filling
        self.seconds[kind] += time.perf_counter() - started - filling

    @contextlib.contextmanager
    def measuring_step(self) -> Iterator[None]:
        """Count a block as a step of training, and the runtime's parts of it."""
        parts, before = dict(self.runtime.seconds), self.seconds["training"]
        with self.measuring("training"):
            yield
        self.last.append(self.seconds["training"] - before)
        for part, seconds in self.runtime.seconds.items():
            self.parts[part] += seconds - parts[part]
        self.steps, self.steps_here = self.steps + 1, self.steps_here + 1

    def slowdown(self) -> float | None:
        """How many times as long as the fastest SPAN steps in a row the last ones took; None between such spans."""
        if self.steps_here % SPAN or not self.last:
            return None
        now = statistics.median(self.last)
        self.fastest = min(self.fastest, now)
        return now / max(self.fastest, 1e-9)

    @property
    def rate(self) -> float:
        """Steps a second of training."""
        return self.steps / max(self.seconds["training"], 1e-9)

    @property
    def filled(self) -> int:
        """Tokens that caches were filled with."""
        return self.tokens_filled + self.runtime.tokens_filled

    def row(self) -> dict:
        """The totals as kept in metrics.jsonl."""
        counts = {"tokens": self.runtime.tokens, "eval_tokens": self.runtime.eval_tokens}
        return {
            "steps": self.steps,
            **self.seconds,
            "parts": dict(self.parts),
            **{k: [c.scored, c.computed] for k, c in counts.items()},
            "tokens_filled": self.filled,
        }

    def restore(self, row: dict) -> None:
        """Carry on the totals of the processes before this one, as of their last evaluation."""
        row = dict(row)
        self.steps = row.pop("steps")
        for name in ("tokens", "eval_tokens"):
            count, (scored, computed) = getattr(self.runtime, name), row.pop(name)
            count.scored, count.computed = count.scored + scored, count.computed + computed
        # another runtime may have done those steps: its parts are kept beside ours
        for part, seconds in row.pop("parts", {}).items():
            self.parts[part] = self.parts.get(part, 0.0) + seconds
        # rows of programs before this one lack some of it
        self.tokens_filled += row.get("tokens_filled", 0)
        self.seconds = {name: seconds + row.get(name, 0.0) for name, seconds in self.seconds.items()}

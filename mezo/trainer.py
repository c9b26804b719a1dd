"""The training loop: measure two losses, log the step, apply it (MeZO, arXiv 2305.17333, algorithm 1)."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Sequence

import torch

from mezo import plots
from mezo.batches import Batches
from mezo.checkpoint import RunDirectory, best_step, load_adapter, replace_file, save_adapter
from mezo.config import Config, RunError
from mezo.estimator import coefficients, learning_rate, projected_grad, usable
from mezo.monitor import Monitor
from mezo.objectives import OBJECTIVES, evaluate
from mezo.parallel import Ranks
from mezo.runtimes.base import Example, Runtime, StepUpdate
from mezo.trajectory import StepRecord, TrajectoryWriter, write_line
from mezo_kernels import perturbation_seed

MAX_SKIPPED = 10  # losses that are not finite, in a row, before a run is given up
TENTHS = 10


class Trainer:
    """One run, from wherever its log ends to its last step.

    Args:
        config: the run's.
        runtime: prepared, with theta as the records leave it.
        splits: tokenised examples by split; "train" is needed.
        run: its locked directory.
        records: steps done already.
        ranks: the processes that share the work; rank 0 alone writes and evaluates.
        seconds_loading: what loading took, for the result.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        splits: dict[str, Sequence[Example]],
        run: RunDirectory,
        records: Sequence[StepRecord] = (),
        ranks: Ranks | None = None,
        seconds_loading: float = 0.0,
    ):
        self.config, self.runtime, self.run, self.ranks = config, runtime, run, ranks or Ranks()
        self.records = list(records)
        self.metrics = [row for row in run.read_metrics() if row["step"] <= len(self.records)]
        self.labels = {split: torch.tensor([e.label for e in examples]) for split, examples in splits.items()}
        self.batches = Batches(len(splits["train"]), config.batch_size, config.seed)
        self.objective = OBJECTIVES[config.objective]
        self.eval_every = config.eval_every or max(1, config.steps // TENTHS)
        self.verify_every = config.verify_every or max(1, config.steps // TENTHS)
        self.seconds = dict.fromkeys(("training", "evaluation", "compilation"), 0.0)
        self.seconds |= {"loading": seconds_loading, "filling": runtime.seconds_filling}
        self.parts = dict.fromkeys(runtime.seconds, 0.0)
        self.steps_timed, self.steps_here = 0, 0
        self.due, self.interrupted, self.stopping = False, False, False

    def train(self) -> dict | None:
        """Run to the last step; return what result.json holds, {} on ranks above 0, None if stopped by Ctrl-C."""
        start = len(self.records)
        handler = signal.signal(signal.SIGINT, self._interrupt) if _main_thread() else None
        self.log = TrajectoryWriter(self.run.trajectory) if self.ranks.leads else None
        try:
            with Monitor(self.run.tensorboard, self.config.steps, start, quiet=not self.ranks.leads) as self.monitor:
                self.monitor.say(self.runtime.describe())
                self._restore_clock()
                self._compile(start)
                self._evaluate_if_due(start)
                for step in range(start, self.config.steps):
                    self._step(step)
                    if self.stopping or (self.interrupted and self.ranks.size == 1):
                        return self._stop()
                return self._finish() if self.ranks.leads else {}
        finally:
            if self.log:
                self.log.close()
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def _compile(self, start: int) -> None:
        """Write the first step's perturbations; the first call of a fused op is compiled or read from a cache."""
        started = time.perf_counter()
        self.due = self.verify_every > 0
        self._write_next(start, [])
        self.seconds["compilation"] += time.perf_counter() - started

    def _step(self, step: int) -> None:
        started, filled, parts = time.perf_counter(), self.runtime.seconds_filling, dict(self.runtime.seconds)
        record = self._measure(step)
        if self.log:
            self.log.append(record)
        self._apply(record)
        filling = self.runtime.seconds_filling - filled
        self.seconds["filling"] += filling
        self.seconds["training"] += time.perf_counter() - started - filling
        for part, seconds in self.runtime.seconds.items():
            self.parts[part] += seconds - parts[part]
        self.steps_timed, self.steps_here = self.steps_timed + 1, self.steps_here + 1
        self.monitor.step(record, self.steps_timed / self.seconds["training"])
        self._give_up_if_stuck()
        self._evaluate_if_due(step + 1)

    def _measure(self, step: int) -> StepRecord:
        """Score the step's batch under every perturbation, both signs, and form the update."""
        seeds = tuple(perturbation_seed(self.config.seed, step, k) for k in range(self.config.num_perturbations))
        losses = self._share_losses(seeds, self.batches(step))
        loss_plus, loss_minus = zip(*losses, strict=True)
        grads = tuple(projected_grad(*pair, self.config.eps) for pair in losses)
        lr = self._lr(step)
        steps = coefficients(grads, lr, self.config.clip)
        if not usable(loss_plus + loss_minus + steps):
            return StepRecord(step, seeds, grads, (0.0,) * len(seeds), 1.0, loss_plus, loss_minus, skipped=True)
        decay = 1 - lr * self.config.weight_decay
        return StepRecord(step, seeds, grads, steps, decay, loss_plus, loss_minus)

    def _lr(self, step: int) -> float:
        config = self.config
        return learning_rate(step, config.steps, config.lr, config.lr_schedule, config.warmup_steps)

    def _share_losses(self, seeds: tuple[int, ...], batch: list[int]) -> list[tuple[float, float]]:
        """Mean losses (plus, minus) of the batch for every seed, each rank having scored its part."""
        rank, size = self.ranks.rank, self.ranks.size
        by_data = self.config.parallel == "data"
        mine = batch[rank * len(batch) // size : (rank + 1) * len(batch) // size] if by_data else batch
        sums = [0.0] * (2 * len(seeds))
        for n, held in enumerate(self._held_together()):
            if n:
                self._verify()
                self.runtime.step([], [seeds[k] for k in held], self.config.eps, watch=self.due)
            for k, pair in zip(held, self._loss_sums(mine), strict=True):
                sums[2 * k : 2 * k + 2] = pair
            self._verify()
        gathered = self.ranks.gather([float(self.interrupted), *sums])
        self.stopping = any(values[0] for values in gathered)
        # a rank's part that another scored is an exact zero
        total = [sum(values) / len(batch) for values in list(zip(*gathered, strict=True))[1:]]
        return list(zip(total[::2], total[1::2], strict=True))

    def _held_together(self) -> list[list[int]]:
        """This rank's perturbations of a step, as many at a time as the runtime holds."""
        by_data, n = self.config.parallel == "data", self.config.num_perturbations
        mine = range(n) if by_data else range(self.ranks.rank, n, self.ranks.size)
        return [list(mine[i : i + self.runtime.pairs]) for i in range(0, len(mine), self.runtime.pairs)]

    def _loss_sums(self, batch: list[int]) -> list[list[float]]:
        """Losses (plus, minus) of each perturbation held, summed over the batch: the same z for every micro-batch."""
        size, labels = self.config.micro_batch_size or len(batch), self.labels["train"]
        sums = None
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            pairs = self.runtime.score_pairs("train", part)
            sums = sums or [[0.0, 0.0] for _ in pairs]
            for own, pair in zip(sums, pairs, strict=True):
                for sign, scores in enumerate(pair):
                    own[sign] += self.objective(scores, labels[part]).item() * len(part)
        return sums

    def _apply(self, record: StepRecord) -> None:
        """Update theta and write both signs of the next step, in one pass."""
        self.records.append(record)
        self.due = self.verify_every > 0 and len(self.records) % self.verify_every == 0
        self._write_next(record.step + 1, [StepUpdate(record.seeds, record.coefficients, record.decay)])
        if len(self.records) == self.config.steps:
            self._verify()
        if self.due and self.ranks.size > 1:
            self.ranks.check_equal(self.runtime.theta(), len(self.records))

    def _write_next(self, step: int, updates: list[StepUpdate]) -> None:
        seeds = [perturbation_seed(self.config.seed, step, k) for k in self._held_together()[0]]
        self.runtime.step(updates, seeds, self.config.eps, watch=self.due)

    def _verify(self) -> None:
        """In a step that is due, compare what the model used with the reference."""
        difference = self.runtime.verify() if self.due else None
        if difference:
            step = len(self.records)
            raise RunError(f"step {step}: the kernels disagree with the reference: {difference}; run `mezo verify`")

    def _give_up_if_stuck(self) -> None:
        last = self.records[-MAX_SKIPPED:]
        if len(last) == MAX_SKIPPED and all(record.skipped for record in last):
            raise RunError(
                f"the loss was not finite in {MAX_SKIPPED} steps in a row; lower --lr or --eps, or use --dtype float32"
            )

    def _evaluate_if_due(self, step: int) -> None:
        """Evaluate dev on schedule, and test and train before the first step; keep the adapter if it is the best."""
        due = step % self.eval_every == 0 or step == self.config.steps
        if not due or not self.ranks.leads:
            return
        if step == 0:
            for split in self._before_and_after():
                self._evaluate(split, step)
        known = {row["split"] for row in self.metrics if row["step"] == step}
        if "dev" in self.labels and "dev" not in known:
            self._evaluate("dev", step)
        if self.config.noise and step and "noise" not in known:
            self._measure_noise(step)
        self.log.sync()

    def _measure_noise(self, step: int) -> None:
        """Score the last batch twice with theta in every copy: what differs is noise, here of projected_grad."""
        started = time.perf_counter()
        self.runtime.equalise()
        batch = self.batches(step - 1)
        losses = [[sum_ / len(batch) for sum_ in pair] for _ in range(2) for pair in self._loss_sums(batch)[:1]]
        (plus, minus), (plus_again, minus_again) = losses
        differences = (plus - minus, plus_again - minus_again, plus - plus_again, minus - minus_again)
        seeds = [perturbation_seed(self.config.seed, step, k) for k in self._held_together()[0]]
        self.runtime.step([], seeds, self.config.eps)
        since = max((r["step"] for r in self.metrics if r["split"] == "noise"), default=0)
        grads = [g for record in self.records[since:] if not record.skipped for g in record.projected_grads]
        noise, signal = (_rms([d / (2 * self.config.eps) for d in differences]), _rms(grads))
        self.seconds["evaluation"] += time.perf_counter() - started
        if math.isfinite(noise):  # theta at which the loss is not finite is reported as a skipped step
            self._log_metrics({"step": step, "split": "noise", "noise": noise, "projected_grad_rms": signal})
            self.monitor.noise(step, noise, signal)

    def _before_and_after(self) -> list[str]:
        splits = ["test", "train"] if self.config.eval_train else ["test"]
        known = {row["split"] for row in self.metrics}
        return [split for split in splits if split in self.labels and split not in known]

    def _evaluate(self, split: str, step: int) -> dict:
        started, filled = time.perf_counter(), self.runtime.seconds_filling
        size = self.config.eval_batch_size or self.config.batch_size
        scores = score_split(self.runtime, split, len(self.labels[split]), size)
        row = {"step": step, "split": split, **evaluate(scores, self.labels[split], self.config.objective)}
        if split == "dev":
            row["is_best"] = self._beats(row)
            if row["is_best"]:
                save_adapter(self.run.adapter, self.runtime.spec.peft, self.runtime.theta())
        filling = self.runtime.seconds_filling - filled
        self.seconds["filling"] += filling
        self.seconds["evaluation"] += time.perf_counter() - started - filling
        self._log_metrics(row)
        self.monitor.evaluation(row)
        return row

    def _log_metrics(self, row: dict) -> None:
        """Add a row, on the disk before any later step is."""
        row["clock"] = self._clock()
        self.metrics.append(row)
        with open(self.run.metrics, "ab") as file:
            write_line(file.fileno(), json.dumps(row, allow_nan=False) + "\n")
            os.fsync(file.fileno())

    def _beats(self, row: dict) -> bool:
        """Higher dev accuracy, or lower dev loss where the objective has no options to be right about; never a NaN."""
        sign, key = (-1, "loss") if self.config.objective == "lm_cross_entropy" else (1, "accuracy")
        others = [r[key] for r in self.metrics if r["split"] == "dev" and r["step"] < row["step"]]
        return row[key] is not None and all(sign * row[key] > sign * other for other in others if other is not None)

    def _clock(self) -> dict:
        counts = {"tokens": self.runtime.tokens, "eval_tokens": self.runtime.eval_tokens}
        return {
            "steps": self.steps_timed,
            **self.seconds,
            "parts": dict(self.parts),
            **{k: [c.scored, c.computed] for k, c in counts.items()},
        }

    def _restore_clock(self) -> None:
        """Carry on the totals of the processes before this one, as of their last evaluation."""
        if self.metrics and self.records:
            clock = dict(self.metrics[-1]["clock"])
            self.steps_timed = clock.pop("steps")
            for name in ("tokens", "eval_tokens"):
                count, (scored, computed) = getattr(self.runtime, name), clock.pop(name)
                count.scored, count.computed = count.scored + scored, count.computed + computed
            # another runtime may have done those steps: its parts are kept beside ours
            for part, seconds in clock.pop("parts", {}).items():
                self.parts[part] = self.parts.get(part, 0.0) + seconds
            self.seconds = {name: self.seconds[name] + clock[name] for name in self.seconds}

    def _finish(self) -> dict:
        best = best_step(self.metrics)
        if best is None:
            save_adapter(self.run.adapter, self.runtime.spec.peft, self.runtime.theta())
        self.runtime.load(load_adapter(self.run.adapter, self.runtime.spec.shapes))
        step = self.config.steps if best is None else best
        scored = {row["split"] for row in self.metrics if row["split"] in ("test", "train")}
        after = {split: self._evaluate(split, step) for split in sorted(scored)}
        result = self._result(step, after)
        replace_file(self.run.result, json.dumps(result, indent=2).encode())
        plots.draw(self.run.plots, self.records, self.metrics)
        return result

    def _result(self, best: int, after: dict[str, dict]) -> dict:
        keys = ("accuracy", "loss", "f1", "auc")
        before = {split: next(r for r in self.metrics if r["split"] == split) for split in after}
        grads = [g for record in self.records if not record.skipped for g in record.projected_grads]
        tokens, eval_tokens, seconds = self.runtime.tokens, self.runtime.eval_tokens, self.seconds
        return {
            **{s: {"before": _take(before[s], keys), "after": _take(after[s], keys)} for s in after},
            "dev": [_take(row, ("step", *keys)) for row in self.metrics if row["split"] == "dev"],
            "best_step": best,
            "steps": len(self.records),
            "steps_counted": self.steps_timed,
            "seconds_training": seconds["training"],
            "seconds_of_training": {**self.parts, "bookkeeping": seconds["training"] - sum(self.parts.values())},
            "seconds_loading": seconds["loading"],
            "seconds_cache_filling": seconds["filling"],
            "seconds_compilation": seconds["compilation"],
            "seconds_evaluation": seconds["evaluation"],
            "steps_per_second": self.steps_timed / max(seconds["training"], 1e-9),
            "runtime": self.config.runtime,
            "ranks": self.ranks.size,
            "bytes_exchanged_per_step": self.ranks.bytes_exchanged / max(self.steps_here, 1),
            "tokens_scored": tokens.scored,
            "tokens_computed": round(tokens.computed),
            "tokens_reused": round(tokens.reused),
            "eval_tokens_scored": eval_tokens.scored,
            "eval_tokens_computed": round(eval_tokens.computed),
            "eval_tokens_reused": round(eval_tokens.reused),
            **self._noise(),
            "zero_gradient_share": sum(g == 0 for g in grads) / max(len(grads), 1),
            "clipped_share": sum(abs(g) > self.config.clip for g in grads) / max(len(grads), 1)
            if self.config.clip
            else 0.0,
            "skipped_steps": sum(record.skipped for record in self.records),
        }

    def _noise(self) -> dict:
        """Noise of projected_grad beside its root mean square, over the whole run."""
        rows = [row for row in self.metrics if row["split"] == "noise"]
        noise, signal = (_rms([row[key] for row in rows]) for key in ("noise", "projected_grad_rms"))
        return {"projected_grad_noise": noise, "projected_grad_rms": signal} if rows else {}

    def _interrupt(self, number, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _stop(self) -> None:
        if self.ranks.leads and best_step(self.metrics) is None:
            save_adapter(self.run.adapter, self.runtime.spec.peft, self.runtime.theta())
        done = len(self.records)
        if self.ranks.leads:
            self._log_metrics({"step": done, "split": "stop"})
        self.monitor.say(f"stopped after step {done}; continue with: mezo train --resume {self.run.path}")


def score_split(runtime: Runtime, split: str, n: int, size: int) -> torch.Tensor:
    """Option scores of all n examples of a split at theta, `size` at a time, padded with -inf to one width."""
    parts = [runtime.score(split, range(i, min(n, i + size))) for i in range(0, n, size)]
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in parts])


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / max(len(values), 1))


def _take(row: dict, keys: Sequence[str]) -> dict:
    return {key: row.get(key) for key in keys}


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

"""One row of results: a function timed in turn with a copy of the same bytes and with the original loop."""

import statistics
import time
from collections.abc import Callable

import machine
import torch

ROUNDS, ROUNDS_OF_LARGE, LARGE = 31, 7, 8_000_000
# from the requirements: one perturb_ against one pass of the original loop, one step_ against its four passes
TARGETS = {"perturb": 4.5, "step": 8.0}
summary: list[str] = []


def seconds(run: Callable) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(benchmark, op: str, run: Callable, elements: int, nbytes: int, baseline: Callable | None = None, **facts):
    """Time `run`; before each of its rounds time a copy and, where given, `baseline`, so that all see the same machine.

    Args:
        op: what is done; `TARGETS` has the ratio wanted.
        nbytes: bytes the op cannot avoid reading and writing; the copy reads and writes as many.
        facts: shape, dtype and provider of the row.
    """
    source = torch.zeros(nbytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    copies, baselines = [], []

    def others():
        copies.append(seconds(lambda: target.copy_(source)))
        if baseline:
            baselines.append(seconds(baseline))

    # a round of a small case is many calls, so that the clock and a stray interrupt do not matter
    calls = max(1, min(20, 1_000_000 // elements))
    rounds = ROUNDS if elements < LARGE else ROUNDS_OF_LARGE
    benchmark.pedantic(lambda: [run() for _ in range(calls)], setup=others, rounds=rounds, warmup_rounds=1)
    median, best = benchmark.stats.stats.median / calls, benchmark.stats.stats.min / calls
    copy = statistics.median(copies)
    row = {"op": op, "elements": elements, "bytes": nbytes, "seconds": median, "seconds_best": best, "calls": calls}
    row |= {"elements_per_s": elements / median, "GB_per_s": nbytes / median / 1e9}
    row |= {"copy_seconds": copy, "copy_seconds_best": min(copies), "fraction_of_copy": copy / median}
    if baseline:
        ratio, ratio_of_best = statistics.median(baselines) / median, min(baselines) / best
        row |= {"original_seconds": statistics.median(baselines), "original_seconds_best": min(baselines)}
        row |= {"ratio_to_original": ratio, "ratio_of_best": ratio_of_best, "target_ratio": TARGETS[op]}
        verdict = "meets" if ratio >= TARGETS[op] else "MISSES"
        summary.append(
            f"{op} {facts['shape']} {facts['dtype']}: {ratio:.1f} x the original by medians ({verdict} {TARGETS[op]}),"
            f" {ratio_of_best:.1f} x by best rounds; {row['GB_per_s']:.1f} GB/s, {copy / median:.2f} of a copy"
        )
    benchmark.extra_info.update(row | facts | machine.describe())

"""One row of results: a function timed in turn with a copy of the same bytes and with the original loop."""

import statistics
import time
from collections.abc import Callable

import machine
import memory
import torch

SECONDS_OF_ROW, MIN_ROUNDS, MAX_ROUNDS = 1.5, 5, 31
SECONDS_OF_SAMPLE, MAX_CALLS = 5e-3, 50
# from the requirements: one perturb_ against one pass of the original loop, one step_ against its four passes
TARGETS = {"perturb": 4.5, "step": 8.0}
summary: list[str] = []


def bytes_of(op: str, elements: int, dtype: torch.dtype) -> int:
    """What an op cannot avoid: theta read and written; for a step a float32 master, and plus and minus written."""
    return elements * (8 + 2 * dtype.itemsize if op == "step" else 2 * dtype.itemsize)


def seconds(run: Callable, device: str = "cpu") -> float:
    """Wall time of one call, until the device has done it."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: list[Callable], device: str = "cpu") -> list[tuple[float, ...]]:
    """Seconds of a call of each, by round; as many rounds as fit into SECONDS_OF_ROW.

    A sample of a short call is many of them, so that the clock and a stray interrupt do not matter.
    """
    warm = [seconds(run, device) for run in runs]
    calls = [max(1, min(MAX_CALLS, int(SECONDS_OF_SAMPLE / taken))) for taken in warm]

    def once():
        pairs = zip(runs, calls, strict=True)
        return [seconds(lambda run=run, n=n: [run() for _ in range(n)], device) / n for run, n in pairs]

    first = once()
    rounds = int(SECONDS_OF_ROW / sum(n * taken for n, taken in zip(calls, first, strict=True)))
    return list(zip(first, *(once() for _ in range(min(MAX_ROUNDS, max(MIN_ROUNDS, rounds)) - 1)), strict=True))


def copier(nbytes: int, device: str) -> Callable:
    """A copy on the device that reads and writes `nbytes` in all.

    The source is written first: fresh pages that were never written to are all the kernel's one page of zeros, which
    is read from the cache.
    """
    source = torch.ones(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(benchmark, op: str, work, elements: int, nbytes: int, device: str, baseline=None, **facts):
    """Time `work.run`; in each of its rounds time a copy and, where given, `baseline`, so that all see one machine.

    Args:
        op: what is done; `TARGETS` has the ratio wanted, if there is one.
        work, baseline: `providers.Work`.
        nbytes: bytes the op cannot avoid reading and writing; the copy reads and writes as many.
        facts: shape, dtype and provider of the row.
    """
    work.run()
    peak = memory.peak(work.run, device)
    runs = [work.run, copier(nbytes, device), *([baseline.run] if baseline else [])]
    times = in_turn(runs, device)
    median, copy = statistics.median(times[0]), statistics.median(times[1])
    row = {"op": op, "elements": elements, "bytes": nbytes, "seconds": median, "seconds_best": min(times[0])}
    row |= {"rounds": len(times[0]), "elements_per_s": elements / median}
    row |= {"GB_per_s": nbytes / median / 1e9, "copy_seconds": copy, "copy_seconds_best": min(times[1])}
    row |= {"fraction_of_copy": copy / median, "launches": work.launches}
    row |= {"peak_bytes": peak, "held_bytes": work.held, "device": device}
    if baseline:
        row |= _against(times[2], times[0], op, facts, row)
    record(benchmark, row | facts)


def _against(baseline: list[float], times: list[float], op: str, facts: dict, row: dict) -> dict:
    """The columns that compare with the original loop, and a line of the summary."""
    ratio, best = statistics.median(baseline) / statistics.median(times), min(baseline) / min(times)
    target = TARGETS.get(op)
    verdict = "" if target is None else f" ({'meets' if ratio >= target else 'MISSES'} {target})"
    summary.append(
        f"{facts.get('rule', op)} {facts['shape']} {facts['dtype']}: {ratio:.1f} x the original by medians{verdict},"
        f" {best:.1f} x by best rounds; {row['GB_per_s']:.1f} GB/s, {row['fraction_of_copy']:.2f} of a copy"
    )
    columns = {"original_seconds": statistics.median(baseline), "original_seconds_best": min(baseline)}
    columns |= {} if target is None else {"target_ratio": target}
    return columns | {"ratio_to_original": ratio, "ratio_of_best": best}


def record(benchmark, row: dict) -> None:
    """Put a row measured by our own clock where pytest-benchmark writes it."""
    if benchmark.stats is None:
        benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(row | machine.describe(row.get("device", "cpu")))

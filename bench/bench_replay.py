"""Replay of a log: many updates to a pass, against the original loop step by step and against drawing z alone.

Drawing alone is `sum_of_squares`: the same z, on as many threads, added up in registers rather than stored.
"""

import statistics

import machine
import original
import pytest
from rows import seconds, summary
from shapes import REPLAYED, make

from mezo_kernels import ParamLayout, step_, sum_of_squares

COEFFICIENT, STEPS, ROUNDS = 1e-8, 200, 3
TARGET_TO_ORIGINAL, TARGET_OF_DRAWING = 4.0, 0.8  # from the requirements


@pytest.mark.parametrize("shape", REPLAYED)
def test_replay_of_a_run(benchmark, shape):
    params = make(shape)
    layout, copies = ParamLayout(params), [p.clone() for p in params.values()]
    log = [(seed, COEFFICIENT) for seed in range(STEPS)]

    def step_by_step():
        for seed, coefficient in log:
            original.perturb(copies, -coefficient, seed)

    def draw():
        for seed, _ in log:
            sum_of_squares(layout, seed)

    step_(layout, log[:1])
    originals, draws = [], []

    def others():
        originals.append(seconds(step_by_step))
        draws.append(seconds(draw))

    benchmark.pedantic(lambda: step_(layout, log), setup=others, rounds=ROUNDS)
    ours = benchmark.stats.stats.median
    ratio, share = statistics.median(originals) / ours, statistics.median(draws) / ours
    facts = {"op": "replay of a run", "elements": layout.n_elements, "updates": STEPS, "seconds": ours}
    facts |= {"original_seconds": statistics.median(originals), "draw_seconds": statistics.median(draws)}
    facts |= {"ratio_to_original": ratio, "rate_of_drawing_z": share, "tensors": len(copies), **machine.describe()}
    benchmark.extra_info.update(facts)
    for got, want, against in (
        (ratio, TARGET_TO_ORIGINAL, "x the original step by step"),
        (share, TARGET_OF_DRAWING, "of the rate of drawing z alone"),
    ):
        verdict = "meets" if got >= want else "MISSES"
        summary.append(f"replay of {STEPS} steps, {shape}: {got:.2f} {against} ({verdict} {want})")

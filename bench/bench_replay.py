"""Replay of a log: many updates to a pass, against the original loop step by step and against drawing z alone."""

import statistics

import pytest
import rows
from drawing import drawer
from providers import COEFFICIENT, Work, original_pass
from shapes import REPLAYED, make

from mezo_kernels import step_

STEPS, ROUNDS = 200, 3
TARGET_TO_ORIGINAL, TARGET_OF_DRAWING = 4.0, 0.8  # from the requirements


@pytest.mark.parametrize("updates", [1, 4, 16])
def test_replay(benchmark, device, updates):
    """Updates alone, nothing written but theta."""
    case = make("lora-r8-qv", device=device)
    log = [(seed, COEFFICIENT) for seed in range(updates)]
    facts = {"shape": case.shape, "tensors": len(case.params), "dtype": "float32", "provider": "ours"}
    work = Work(lambda: step_(case.layout, log), 1)
    rows.measure(benchmark, "replay", work, case.elements, 8 * case.elements, device, updates=updates, **facts)


@pytest.mark.parametrize("shape", REPLAYED)
def test_replay_of_a_run(benchmark, device, shape):
    case = make(shape, device=device)
    copies = [p.clone() for p in case.params]
    log = [(seed, COEFFICIENT) for seed in range(STEPS)]

    def step_by_step():
        for seed, coefficient in log:
            original_pass(copies, -coefficient, seed)

    draw_once = drawer(case, device)

    def draw():
        for _ in log:
            draw_once()

    step_(case.layout, log[:1])
    runs = (lambda: step_(case.layout, log), step_by_step, draw)
    times = [[rows.seconds(run, device) for run in runs] for _ in range(ROUNDS)]
    ours, original, drawing = map(statistics.median, zip(*times, strict=True))
    ratio, share = original / ours, drawing / ours
    row = {"op": "replay of a run", "shape": shape, "elements": case.elements, "updates": STEPS, "seconds": ours}
    row |= {"original_seconds": original, "draw_seconds": drawing, "ratio_to_original": ratio, "device": device}
    rows.record(benchmark, row | {"rate_of_drawing_z": share, "tensors": len(copies)})
    for got, want, against in (
        (ratio, TARGET_TO_ORIGINAL, "x the original step by step"),
        (share, TARGET_OF_DRAWING, "of the rate of drawing z alone"),
    ):
        verdict = "meets" if got >= want else "MISSES"
        rows.summary.append(f"replay of {STEPS} steps, {shape}: {got:.2f} {against} ({verdict} {want})")

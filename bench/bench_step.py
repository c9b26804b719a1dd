"""step_: one update, then the next theta + eps z and theta - eps z, in one pass; the original makes four."""

import pytest
from providers import EPS, PROVIDERS, original_pass
from rows import record, summary
from shapes import FLOATS, SHAPES, make

from mezo_kernels import step_

DRIFT_STEPS = 10


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step(measure, shape, dtype, provider):
    measure("step", shape, dtype, provider)


@pytest.mark.parametrize("updates", [4, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_of_many_updates(measure, dtype, updates):
    """Several updates, then plus and minus, in one pass; `test_step` has one update."""
    measure("step", "lora-r8-qv", dtype, "ours", updates=updates)


def rms_change(params, before):
    total = sum((p.double() - b.double()).square().sum().item() for p, b in zip(params, before, strict=True))
    return (total / sum(p.numel() for p in params)) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift(benchmark, device, dtype):
    """Steps of lr 0 should change nothing."""
    current = make("lora-r8-qv", FLOATS[dtype], device).layout
    before = [p.clone() for p in current.tensors]
    theirs = [p.clone() for p in before]
    theta, minus = current.like([p.float().clone() for p in before]), current.like([p.clone() for p in before])
    for seed in range(DRIFT_STEPS):
        for scale in (EPS, -2 * EPS, EPS, 0.0):
            original_pass(theirs, scale, seed)
        step_(theta, [(seed, 0.0)], 1.0, seed + 1, EPS, current, minus)
    drift = {"original": rms_change(theirs, before), "ours": rms_change(current.copy_(theta).tensors, before)}
    row = {"op": "drift", "dtype": dtype, "steps": DRIFT_STEPS, "drift_rms": drift, "device": device}
    record(benchmark, row)
    summary.append(f"drift, {DRIFT_STEPS} steps of lr 0, {dtype}, root mean square: {drift}")
    assert drift["ours"] == 0 < drift["original"]

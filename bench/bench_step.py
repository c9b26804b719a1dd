"""step_: one update, then the next theta + eps z and theta - eps z, in one pass; the original makes four."""

import original
import pytest
import torch
from bench_perturb import FLOATS, facts_of
from rows import summary
from shapes import SHAPES, make

from mezo_kernels import ParamLayout, step_, tensor_id

COEFFICIENT, EPS, DRIFT_STEPS = 1e-8, 1e-3, 10


def bytes_of(elements, dtype):
    """Read and write the float32 master, write plus and minus."""
    return elements * (8 + 2 * FLOATS[dtype].itemsize)


def layouts_of(params):
    current = ParamLayout(params)
    theta = current.like([p.float().clone() for p in current.tensors])
    return theta, current, current.like([p.clone() for p in current.tensors])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ours(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "ours (numba)")
    theta, plus, minus = layouts_of(params)
    copies = [p.clone() for p in params.values()]
    run = lambda: step_(theta, [(1, COEFFICIENT)], 1.0, 2, EPS, plus, minus)  # noqa: E731
    loop = lambda: original.step(copies, COEFFICIENT, EPS, 1)  # noqa: E731
    measure("step", run, elements, bytes_of(elements, dtype), loop, **facts)


@pytest.mark.parametrize("updates", [1, 4, 16])
def test_replay(measure, updates):
    params, elements, facts = facts_of("lora-r8-qv", "float32", f"ours (numba), {updates} updates")
    layout, log = ParamLayout(params), [(seed, COEFFICIENT) for seed in range(updates)]
    measure("replay", lambda: step_(layout, log), elements, 8 * elements, updates=updates, **facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_original(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "original loop")
    params = list(params.values())
    run = lambda: original.step(params, COEFFICIENT, EPS, 1)  # noqa: E731
    measure("step", run, elements, bytes_of(elements, dtype), **facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_foreach(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "torch._foreach, stored z")
    params = list(params.values())
    z = [torch.randn_like(p) for p in params]
    run = lambda: original.foreach_step(params, z, COEFFICIENT, EPS)  # noqa: E731
    measure("step", run, elements, bytes_of(elements, dtype), **facts)


@pytest.mark.parametrize("shape", ["lora-r8-qv", "flat-16M"])
def test_compiled(measure, compiler, shape):
    params, elements, facts = facts_of(shape, "float32", "torch.compile of the reference")
    tags = [torch.tensor(tensor_id(name)) for name in params]
    params = list(params.values())
    run = lambda: original.compiled_step(params, tags, COEFFICIENT, EPS, 1)  # noqa: E731
    measure("step", run, elements, bytes_of(elements, "float32"), **facts)


def rms_change(params, before):
    change = torch.cat([(p.double() - b.double()).flatten() for p, b in zip(params, before, strict=True)])
    return change.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift(benchmark, dtype):
    """Steps of lr 0 should change nothing."""
    before = list(make("lora-r8-qv", FLOATS[dtype]).values())
    params = [p.clone() for p in before]
    for seed in range(DRIFT_STEPS):
        original.step(params, 0.0, EPS, seed)
    theta, current, minus = layouts_of(make("lora-r8-qv", FLOATS[dtype]))

    def ours():
        for seed in range(DRIFT_STEPS):
            step_(theta, [(seed, 0.0)], 1.0, seed + 1, EPS, current, minus)

    benchmark.pedantic(ours, rounds=1)
    drift = {"original": rms_change(params, before), "ours": rms_change(current.copy_(theta).tensors, before)}
    benchmark.extra_info.update(op="drift", dtype=dtype, steps=DRIFT_STEPS, drift_rms=drift)
    summary.append(f"drift, {DRIFT_STEPS} steps of lr 0, {dtype}, root mean square: {drift}")
    assert drift["ours"] == 0 < drift["original"]

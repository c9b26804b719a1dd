"""What a call costs before it does anything: on 448 tensors of 64 elements, and the first time in a process."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import rows
import torch
from shapes import make

from mezo_kernels import Plan, perturb_, step_

TARGETS = {"one thread": 60.0, "parallel": 250.0}  # microseconds, from the requirements
FIRST_CALL = """
import sys, time, torch
from mezo_kernels import ParamLayout, perturb_, step_
theta = ParamLayout({"w": torch.zeros(1 << 20, device=sys.argv[1])})
plus, minus = (theta.like([torch.zeros_like(t) for t in theta.tensors]) for _ in "+-")
begin = time.perf_counter()
perturb_(theta, 1e-3, 1)
step_(theta, [(1, 1e-3)], 1.0, 2, 1e-3, plus, minus)
theta.tensors[0].sum().item()
print(time.perf_counter() - begin)
"""


def test_call(benchmark, device, monkeypatch):
    """`perturb_` by its parts, called in turn: addresses, compiled code, torch.library in between; `step_`; `Plan`."""
    layout = make("tiny-448x64", device=device).layout
    library = torch.ops.mezo_kernels.perturb_
    runs = {
        "one thread": lambda: perturb_(layout, 1e-6, 1),
        "through torch.library": lambda: library(layout.tensors, [layout.geometry], 1e-6, 1, 0, "normal", None),
    }
    if device == "cpu":
        from mezo_kernels.numba import step as cpu

        def parallel():
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "PARALLEL_FROM", 0)
                perturb_(layout, 1e-6, 1)

        runs["addresses"] = lambda: cpu._items(layout.tensors, [], [], [layout.geometry])
        runs["parallel"] = parallel
    theta, plus, minus = (make("tiny-448x64", device=device).layout for _ in range(3))
    plan, after = Plan(theta, plus, minus), {"next_seed": 2, "eps": 1e-3}
    runs["step_"] = lambda: step_(theta, [(1, 1e-9)], **after, plus=plus, minus=minus)
    runs["step_ of a Plan"] = lambda: plan.step_([(1, 1e-9)], **after)
    runs["one thread"]()  # the tables are built at the first call
    times = rows.in_turn(list(runs.values()), device)
    parts = {name: 1e6 * statistics.median(part) for name, part in zip(runs, times, strict=True)}
    through, direct = parts["through torch.library"], parts["one thread"]
    row = {"op": "call overhead", "shape": "tiny-448x64", "dtype": "float32", "microseconds": parts, "device": device}
    row |= {"best_microseconds": {name: 1e6 * min(part) for name, part in zip(runs, times, strict=True)}}
    rows.record(benchmark, row | {"share_of_dispatcher": 1 - direct / through})
    for name, want in TARGETS.items():
        if name in parts and device == "cpu":
            verdict = "meets" if parts[name] <= want else "MISSES"
            rows.summary.append(f"call overhead, 448 tensors, {name}: {parts[name]:.0f} us ({verdict} {want:.0f})")
    rows.summary.append(
        f"call overhead, 448 tensors, through torch.library, entered once: {through:.0f} us,"
        f" {1 - direct / through:.0%} of it the dispatcher"
    )


@pytest.mark.parametrize("cache", ["empty", "warm"])
def test_first_call(benchmark, device, cache, tmp_path_factory):
    """perturb_ and step_ in a fresh process: compiled and written to disk, or read from there."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    if cache == "warm" and not folder.is_dir():
        pytest.skip("the cache is filled by test_first_call[empty]")
    places = {"NUMBA_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder)}
    taken = float(
        subprocess.run(
            [sys.executable, "-c", FIRST_CALL, device],
            env=os.environ | places,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    )
    rows.record(benchmark, {"op": "first call", "cache": cache, "seconds": taken, "device": device})
    rows.summary.append(f"first perturb_ and step_ of a process, {cache} cache of compiled code: {taken:.2f} s")

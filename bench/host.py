"""Host work of a step on 448 tensors and their copies: CPU time without the kernel, of `step_` and of a `Plan`."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import machine
from shapes import make

from mezo_kernels import Plan, step_
from mezo_kernels.numba import step as numba_step
from mezo_kernels.ptx import emulated
from mezo_kernels.triton import step as triton_step

CALLS, ROUNDS = 50, 41


def microseconds(run: Callable) -> float:
    """Median CPU time of a call."""
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time_ns()
        for _ in range(CALLS):
            run()
        found.append((time.process_time_ns() - begin) / CALLS / 1e3)
    return round(statistics.median(found), 1)


def host(backend: str) -> dict[str, float]:
    """Microseconds of a call; what launches the compiled kernel must be replaced by nothing before.

    Args:
        backend: "numba" or "triton".
    """
    theta, plus, minus = (make("tiny-448x64").layout for _ in range(3))
    plan, after = Plan(theta, plus, minus, backend=backend), {"next_seed": 2, "eps": 1e-3}
    options = {"plus": plus, "minus": minus, "backend": backend}
    return {
        "step_": microseconds(lambda: step_(theta, [(1, 1e-9)], **after, **options)),
        "step_ of a Plan": microseconds(lambda: plan.step_([(1, 1e-9)], **after)),
    }


class _Nothing(dict):
    """In place of a table's compiled kernels: each of them is there, and a launch of it does nothing."""

    def get(self, key: tuple) -> "_Nothing":
        return self

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *arguments: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    numba_step._step_items = lambda *arguments: None
    with emulated():
        found = {"numba": host("numba")}
        build = triton_step.tables.build

        def built(*arguments):
            return replace(build(*arguments), compiled=_Nothing())

        triton_step.tables.build = built
        found["triton"] = host("triton")
    about = "CPU time of a call on 448 tensors of 64 elements, plus and minus; microseconds, the kernel left out"
    output.write_text(json.dumps({"about": about, "microseconds": found, **machine.describe("cpu")}, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()

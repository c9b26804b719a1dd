"""CPU time of `perturb_` by what z is drawn from, beside a copy of the same bytes: one thread, 16.8M float32, in turn.

Run: make bench-distributions, or python bench/distributions.py --output bench/results/MACHINE/distributions.json
Seconds are of the CPU: other work changes them less than those of the clock, but the copy's by what else uses memory.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numba
import torch
from machine import describe
from rows import copier
from shapes import make

from mezo_kernels import perturb_

ROUNDS = 31


def cpu_seconds(run) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    case = make("flat-16M")
    kinds = ("normal", "rademacher")
    runs = {kind: lambda kind=kind: perturb_(case.layout, 1e-6, 1, distribution=kind) for kind in kinds}
    runs["copy"] = copier(8 * case.elements, "cpu")  # as many bytes read and written
    for run in runs.values():
        run()  # compiles
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(cpu_seconds(run))
    rows = [
        {"of": name, "cpu_seconds": statistics.median(taken), "best": min(taken)}
        | {"elements_per_cpu_second": case.elements / statistics.median(taken)}
        for name, taken in times.items()
    ]
    found = {"command": "make bench-distributions", "machine": describe(), "elements": case.elements}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found | {"rounds": ROUNDS, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['of']:12} {row['elements_per_cpu_second'] / 1e9:.2f} billion elements a CPU second")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How cost grows: with parameters, with tensors, and with updates to a pass, beside the copy and the drawing of z.

Run: python bench/growth.py --output bench/results/MACHINE/growth.json
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import machine
import rows
import torch
from drawing import drawer
from providers import COEFFICIENT, foreach, original, ours
from shapes import Case, case_of

from mezo_kernels import step_

ELEMENTS = {"cpu": [1 << n for n in range(20, 27)], "cuda": [1 << n for n in range(20, 31)]}
TENSORS, ELEMENTS_OF_TENSORS = [1 << n for n in range(13)], 1 << 20
UPDATES, ELEMENTS_OF_UPDATES = [1 << n for n in range(6)], 1 << 22


def point(x: int, case: Case, runs: dict, device: str) -> dict:
    """Seconds of a call by name, medians of rounds in turn; among them the limits: a copy, and drawing z once."""
    limits = {
        "copy": rows.copier(8 * case.elements, device),
        "drawing z": drawer(case, device),
    }
    times = rows.in_turn([*limits.values(), *runs.values()], device)
    seconds = [statistics.median(part) for part in times]
    return {"x": x, "elements": case.elements, "seconds": dict(zip((*limits, *runs), seconds, strict=True))}


def perturbing(x: int, case: Case, device: str) -> dict:
    """perturb_ and its peers on one case."""
    peers = {"ours": ours, "original loop": original, "torch._foreach, stored z": foreach}
    return point(x, case, {name: make("perturb", case).run for name, make in peers.items()}, device)


def flat(n: int, device: str) -> Case:
    return case_of(f"flat-{n}", {"w": (n,)}, torch.float32, device)


def split(tensors: int, device: str) -> Case:
    """As many elements in that many tensors."""
    sizes = {f"w{i}": (ELEMENTS_OF_TENSORS // tensors,) for i in range(tensors)}
    return case_of(f"{tensors} tensors", sizes, torch.float32, device)


def updating(k: int, device: str) -> dict:
    """k updates in one pass, and one by one."""
    case = flat(ELEMENTS_OF_UPDATES, device)
    log = [(seed, COEFFICIENT) for seed in range(k)]

    def one_by_one():
        for update in log:
            step_(case.layout, [update])

    return point(k, case, {"ours, one pass": lambda: step_(case.layout, log), "ours, a pass each": one_by_one}, device)


def grow(device: str) -> dict:
    """Each series: a list of points."""
    series = {
        "parameters": [perturbing(n, flat(n, device), device) for n in ELEMENTS[device]],
        "tensors": [perturbing(n, split(n, device), device) for n in TENSORS],
        "updates": [updating(k, device) for k in UPDATES],
    }
    return {"command": "make bench-growth", "machine": machine.describe(device), "series": series}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    text = json.dumps(grow(options.device), indent=2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

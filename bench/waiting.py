"""A training step whose threads spin or sleep where they wait for each other, alone and beside busy processes.

Every measurement is a process of its own, since OpenMP reads OMP_WAIT_POLICY once; settings are taken in turn.
Run: make bench-waiting, or python bench/waiting.py --output bench/results/MACHINE/waiting.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from directions import LAYERS, demo_run
from machine import describe
from training_step import OurStep

from mezo.models.load import load_tokenizer
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.tasks import load_splits

SETTINGS = {
    "threads that spin": {"OMP_WAIT_POLICY": "ACTIVE"},
    "the library's default": {},
    "threads that spin shortly, then sleep": {"GOMP_SPINCOUNT": "10000"},
    "threads that sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BATCH = {"last layer": 32, "all layers": 4}
SPIN = "while True: pass"


def step_times(layers: str, steps: int) -> list[float]:
    """Seconds of steps of this process, the first of which, which warms up, is left out."""
    config = demo_run(**LAYERS[layers]).replace(batch_size=BATCH[layers])
    data = load_splits(config, load_tokenizer(config.model.base))["train"][:64]
    with tempfile.TemporaryDirectory() as folder:
        step, seconds = OurStep(HFRuntime(*config.for_runtime), config, data, Path(folder) / "log.jsonl"), []
        for _ in range(steps + 1):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
    return seconds[1:]


def in_a_process(layers: str, steps: int, setting: dict[str, str], busy: int) -> list[float]:
    """`step_times` under a setting, beside so many processes that are always busy."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_NUM_THREADS": str(os.cpu_count()), **setting}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--layers", layers, "--steps", str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--layers", choices=list(LAYERS), help="measure this process, print the seconds")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.layers:
        print(json.dumps(step_times(args.layers, args.steps)))
        return
    rows = []
    for layers in LAYERS:
        for busy in (0, os.cpu_count()):
            seconds = {name: [] for name in SETTINGS}
            for _ in range(args.rounds):
                for name, setting in SETTINGS.items():
                    seconds[name] += in_a_process(layers, args.steps, setting, busy)
            milliseconds = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
            row = {"layers": layers, "batch": BATCH[layers], "busy_processes": busy, "milliseconds": milliseconds}
            rows.append(row)
            print(json.dumps(row), flush=True)
            told = {"machine": describe(), "steps": args.rounds * args.steps, "rows": rows}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

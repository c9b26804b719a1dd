"""A training step whose threads spin or sleep where they wait for each other, alone and beside busy processes.

Every setting is a process of its own, since OpenMP reads OMP_WAIT_POLICY once. They are taken in turn; those whose turn
it is not are stopped, since their threads would spin beside it.
Run: make bench-waiting, or python bench/waiting.py --output bench/results/MACHINE/waiting.json
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def measure(layers: str) -> None:
    """Make as many steps as each line of stdin says, and print their seconds as a line. The first, which warms up, is
    left out."""
    config = demo_run(**LAYERS[layers]).replace(batch_size=BATCH[layers])
    data = load_splits(config, load_tokenizer(config.model.base))["train"][:64]
    with tempfile.TemporaryDirectory() as folder:
        step = OurStep(HFRuntime(*config.for_runtime), config, data, Path(folder) / "log.jsonl")
        print("ready", flush=True)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line) + 1):
                began = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - began)
            print(json.dumps(seconds[1:]), flush=True)


class Measured:
    """A process of `measure` under a setting, which is stopped except while it is asked.

    Args:
        layers: of which step.
        setting: environment variables.
    """

    def __init__(self, layers: str, setting: dict[str, str]):
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment |= {"OMP_NUM_THREADS": str(os.cpu_count()), **setting}
        command = [sys.executable, __file__, "--layers", layers]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(self.process.communicate()[1])
        self.process.send_signal(signal.SIGSTOP)

    def seconds(self, steps: int) -> list[float]:
        """Of so many steps."""
        self.process.send_signal(signal.SIGCONT)
        print(steps, file=self.process.stdin, flush=True)
        found = json.loads(self.process.stdout.readline())
        self.process.send_signal(signal.SIGSTOP)
        return found

    def end(self) -> None:
        """End it, stopped as it is."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def beside(busy: int) -> Iterator[None]:
    """So many processes that are always busy."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def milliseconds(processes: dict[str, Measured], busy: int, rounds: int, steps: int) -> dict[str, float]:
    """Median time of a step under each setting, taken in turn."""
    found = {name: [] for name in processes}
    with beside(busy):
        for _ in range(rounds):
            for name, process in processes.items():
                found[name] += process.seconds(steps)
    return {name: 1e3 * statistics.median(each) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    parser.add_argument("--layers", choices=list(LAYERS), help="measure this process")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.layers:
        measure(args.layers)
        return
    rows = []
    for layers in LAYERS:
        processes: dict[str, Measured] = {}
        try:
            for name, setting in SETTINGS.items():
                processes[name] = Measured(layers, setting)
            for busy in (0, os.cpu_count()):
                row = {"layers": layers, "batch": BATCH[layers], "busy_processes": busy, "load": os.getloadavg()[0]}
                row["milliseconds"] = milliseconds(processes, busy, args.rounds, args.steps)
                rows.append(row)
                print(json.dumps(row), flush=True)
                told = {"machine": describe(), "steps": args.rounds * args.steps, "rows": rows}
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(told, indent=1) + "\n")
        finally:
            for process in processes.values():
                process.end()


if __name__ == "__main__":
    main()

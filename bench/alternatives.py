"""Peak memory and seconds of a step: inference alone, MeZO on both runtimes, AdamW; on an adapter and on all weights.

Run: make bench-alternatives, or python bench/alternatives.py --output bench/results/MACHINE/alternatives.json
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import describe
from training_step import ALL, OurStep, configs

from mezo.config import Config
from mezo.data.example import Example
from mezo.method.objectives import cross_entropy
from mezo.models.linear import as_loaded
from mezo.models.load import load_tokenizer
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.rows import RowBatch, rows_of, scored
from mezo.tasks import load_splits

BATCHES, STEPS = (1, 4, 16, 64), 3
METHODS = {
    "inference alone": "one forward pass, no adapter, nothing kept",
    "MeZO, hf": "two forward passes, adapters on all layers",
    "MeZO, sglang": "the same through the engine; its processes and the trainer's together",
    "MeZO, all weights": "two forward passes, every weight trained, float32",
    "AdamW, adapter": "a backward pass, AdamW on the same adapter",
    "AdamW, all weights": "a backward pass, AdamW on every weight, float32",
}


def examples(batch: int) -> list[Example]:
    """The first prompts of the demo."""
    config = configs()["last layer"]
    return load_splits(config, load_tokenizer(config.model.base), masked=False)["train"][:batch]


class Gradients:
    """A step with the model's own forward pass at the scored positions, and what a method does with it.

    Args:
        config: of the adapter.
        data: the batch.
        trained: "nothing", "adapter" or "all weights".
    """

    def __init__(self, config: Config, data: list[Example], trained: str):
        runtime = HFRuntime(*config.replace(linear="torch").for_runtime)
        self.parts, self.labels = runtime.parts, torch.tensor([example.label for example in data])
        if trained != "adapter":
            self.parts.model.unload()  # the base model alone; body and head are its own modules
        self.rows = RowBatch.of([row for example in data for row in rows_of(example)], 0, "cpu")
        weights = {"nothing": [], "adapter": list(self.parts.params.values())}
        chosen = weights.get(trained, [*self.parts.body.parameters(), *self.parts.head.parameters()])
        chosen = list(dict.fromkeys(chosen))
        for p in chosen:
            p.requires_grad_(True)
        self.trained = chosen
        self.optimizer = torch.optim.AdamW(chosen, lr=1e-5) if chosen else None

    def __call__(self) -> float:
        """Do one step; return the loss before it."""
        with torch.set_grad_enabled(bool(self.trained)):
            with as_loaded():
                out = self.parts.body(self.rows.ids, attention_mask=self.rows.mask, use_cache=False)
            logits = self.parts.head(scored(out.last_hidden_state, self.rows.positions))
            scores = logits.log_softmax(-1).gather(-1, self.rows.targets).flatten(1)
            loss = cross_entropy(scores, self.labels)
        if self.optimizer:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def step_of(method: str, data: list[Example], log: Path):
    """(a step of a method, what to close)."""
    config = configs()["all layers"].replace(target_modules=ALL, batch_size=len(data))
    if method == "MeZO, sglang":
        from mezo.runtimes.sglang.runtime import SGLangRuntime

        runtime = SGLangRuntime(*config.replace(runtime="sglang").for_runtime)
        return OurStep(runtime, config, data, log), runtime
    if method == "MeZO, all weights":
        config = config.replace(tuning="full")
    if method in ("MeZO, hf", "MeZO, all weights"):
        runtime = HFRuntime(*config.for_runtime)
        return OurStep(runtime, config, data, log), runtime
    kinds = {"inference alone": "nothing", "AdamW, adapter": "adapter", "AdamW, all weights": "all weights"}
    return Gradients(config, data, kinds[method]), None


def tree(root: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    return [root, *(pid for child in children for pid in tree(int(child)))]


def forget_peaks(pids: list[int]) -> None:
    """Peaks from here on: what loading took for a moment is not a step's."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pids: list[int]) -> int:
    """Most memory each process held since, summed; pages that several share are counted in each."""
    found = (re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in pids)
    return sum(1024 * int(match.group(1)) for match in found if match)


def one(method: str, batch: int) -> dict:
    """Measure in this process, which does nothing else."""
    data = examples(batch)
    with tempfile.TemporaryDirectory() as folder:
        run, runtime = step_of(method, data, Path(folder) / "log.jsonl")
        try:
            forget_peaks(tree(os.getpid()))
            run()
            times = []
            for _ in range(STEPS):
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            peak = peak_bytes(tree(os.getpid()))
        finally:
            if runtime:
                runtime.close()
    tokens = sum(len(example.prompt) for example in data)
    return {"seconds": statistics.median(times), "peak_bytes": peak, "tokens_a_pass": tokens}


def main() -> int:
    """Each method and batch in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "BATCH"), help="measure in this process and print")
    options = parser.parse_args()
    if options.one:
        print("RESULT", json.dumps(one(options.one[0], int(options.one[1]))))
        sys.stdout.flush()
        return 0
    if not options.output:
        parser.error("give --output")
    rows = []
    for batch in BATCHES:
        for method in METHODS:
            if method == "MeZO, sglang" and not find_spec("sglang"):
                continue
            command = [sys.executable, __file__, "--one", method, str(batch)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
            rows.append({"method": method, "batch": batch, **result})
            print(json.dumps(rows[-1]), file=sys.stderr)
    machine = describe() | {name: version(name) for name in ("transformers", "peft")}
    whole = {"command": "make bench-alternatives", "machine": machine, "methods": METHODS, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

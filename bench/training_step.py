"""One training step of the demo's model, ours and the original's: what it is made of, and how it grows.

Run: make bench-training, or python bench/training_step.py --output bench/results/MACHINE/training_step.json
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import describe
from providers import original_pass

from mezo.config import Config
from mezo.data.example import Example
from mezo.method.objectives import cross_entropy
from mezo.models.linear import as_loaded
from mezo.models.load import load_tokenizer
from mezo.run.trajectory import TrajectoryWriter
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.rows import RowBatch, option_scores, rows_of, scored
from mezo.studies import demo
from mezo.tasks import load_splits
from mezo.training.measurement import Measurement
from mezo.training.ranks import Ranks
from mezo_kernels import lora_init

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH, PAIRS = 32, 20
TARGETS = {"last 4 layers": 5, "last layer": 200}  # times the original
SLOWEST = 1.03  # times two forwards of the same model, adapters on all layers
BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512)


def configs() -> dict[str, Config]:
    """(a), (b) and (c): adapters on all layers, on the last four, and on the last one's query, output and MLP."""
    last = demo.demo_config("it-was", 10**6, Path("unused")).replace(device="cpu", noise=False)
    every = last.replace(target_modules=ALL, layers_to_transform=())
    return {
        "all layers": every,
        "last 4 layers": every.replace(layers_to_transform=(26, 27, 28, 29)),
        "last layer": last,
    }


class OurStep:
    """A step as the trainer does it: losses, log line, update with both signs of the next step."""

    def __init__(self, runtime, config: Config, data: list[Example], log: Path):
        self.config = config.replace(batch_size=min(config.method.batch_size, len(data)))
        self.runtime = runtime
        runtime.prepare({"train": data})
        if runtime.spec.peft:
            runtime.load({name: lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()})
        self.measurement = Measurement(self.config.method, config.machine, runtime, data, {}, Ranks())
        self.writer = TrajectoryWriter(log)
        self.step = self.measurement.step(0)
        runtime.perturb(self.measurement.first(self.step))

    def __call__(self) -> None:
        """Do the next one."""
        record = self.measurement.record(self.step)
        self.writer.append(record)
        self.step = self.measurement.step(self.step.number + 1)
        self.runtime.update([record.update], self.measurement.first(self.step))


class OriginalStep:
    """The same step as the original does it: perturbed in place thrice, two forward passes, an update; no cache.

    Args:
        runtime: hf, whose model and adapter are used, with an adapter of their own in place.
        config: eps and lr are read.
        batch: the examples.
        everywhere: logits at every position, as the original computes them, or at the scored ones alone.
        as_ours: with the products and adapters of the runtime, packed or not.
    """

    def __init__(
        self, runtime: HFRuntime, config: Config, batch: list[Example], everywhere: bool, as_ours: bool = False
    ):
        self.as_ours = as_ours
        self.parts, self.config, self.everywhere, self.batch = runtime.parts, config, everywhere, batch
        self.rows = RowBatch.of([row for example in batch for row in rows_of(example)], 0, "cpu")
        self.labels = torch.tensor([example.label for example in batch])
        if runtime.spec.peft:
            noise = {name: lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()}
            self.weights = [noise[name] for name in self.parts.params]
        else:
            self.weights = [p.data.clone() for p in self.parts.params.values()]
        self.seed = 0

    def in_place(self) -> None:
        """Point the model at weights of this step's own."""
        for p, weight in zip(self.parts.params.values(), self.weights, strict=True):
            p.data = weight

    @torch.no_grad()
    def loss(self) -> float:
        """One forward pass: torch's own products and PEFT's own adapters, unless `as_ours`."""
        rows, run = self.rows, self.parts.model if self.everywhere else self.parts.body
        with nullcontext() if self.as_ours else as_loaded():
            out = run(rows.ids, attention_mask=rows.mask, use_cache=False)
        if self.everywhere:
            logits = scored(out.logits, rows.positions)
        else:
            logits = self.parts.head(scored(out.last_hidden_state, rows.positions))
        log_probs = logits.double().log_softmax(-1).gather(-1, rows.targets)
        return cross_entropy(option_scores(self.batch, log_probs, rows.valid), self.labels).item()

    def two_forwards(self) -> None:
        """The losses alone."""
        self.in_place()
        self.loss()
        self.loss()

    def __call__(self) -> None:
        """Four passes over the weights, two over the batch."""
        self.in_place()
        self.seed += 1
        eps, params = self.config.method.eps, list(self.parts.params.values())
        original_pass(params, eps, self.seed)
        plus = self.loss()
        original_pass(params, -2 * eps, self.seed)
        minus = self.loss()
        original_pass(params, eps, self.seed)
        original_pass(params, -self.config.method.lr * (plus - minus) / (2 * eps), self.seed)
        self.weights = [p.data for p in params]


def in_turn(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round, after one that is not counted."""
    times = {name: [] for name in runs}
    for n in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if n:
                times[name].append(time.perf_counter() - began)
    return times


def hf(config: Config, data: list[Example], log: Path, rounds: int) -> dict:
    """Ours, two forwards and the original's on one model and one batch; medians, and medians of ratios by round."""
    runtime, plain = (HFRuntime(*config.replace(linear=kind).for_runtime) for kind in ("auto", "torch"))
    ours = OurStep(runtime, config, data, log)
    every, alone = (OriginalStep(plain, config, data, everywhere) for everywhere in (True, False))
    times = in_turn(
        {
            "ours": ours,
            "two forwards, scored positions": alone.two_forwards,
            "original": every,
            "original, scored positions": alone,
        },
        rounds,
    )
    before, steps, began = dict(runtime.seconds), max(20, rounds), time.perf_counter()
    computed, total = runtime.tokens.computed, runtime.tokens.scored
    for _ in range(steps):
        ours()
    whole = (time.perf_counter() - began) / steps
    parts = {part: (runtime.seconds[part] - before[part]) / steps for part in before}
    ratio = lambda name: statistics.median(o / t for o, t in zip(times[name], times["ours"], strict=True))  # noqa: E731
    return {
        "examples": len(data),
        "tokens_a_prompt": sum(len(example.prompt) for example in data) / len(data),
        "tokens_a_step": {
            "scored": (runtime.tokens.scored - total) / steps,
            "computed": (runtime.tokens.computed - computed) / steps,
        },
        "parameters": runtime.master.n_elements,
        "rounds": rounds,
        "median_seconds": {name: statistics.median(own) for name, own in times.items()},
        "times_ours": {name: ratio(name) for name in times if name != "ours"},
        "seconds_of_a_step": {**parts, "bookkeeping": whole - sum(parts.values()), "step": whole},
    }


def sglang(config: Config, data: list[Example], log: Path, steps: int) -> dict:
    """A step through the engine, by part; the first one fills its cache and is not counted."""
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    runtime = SGLangRuntime(*config.replace(runtime="sglang").for_runtime)
    try:
        ours, rows = OurStep(runtime, config, data, log), []
        for _ in range(steps + 1):
            before, count, began = dict(runtime.seconds), dataclasses.replace(runtime.tokens), time.perf_counter()
            ours()
            row = {part: runtime.seconds[part] - before[part] for part in before} | {
                "step": time.perf_counter() - began
            }
            row["scored"] = runtime.tokens.scored - count.scored
            rows.append(row | {"computed": runtime.tokens.computed - count.computed})
    finally:
        runtime.close()
    medians = {part: statistics.median(row[part] for row in rows[1:]) for part in rows[0]}
    tokens = {name: medians.pop(name) for name in ("scored", "computed")}
    known = sum(seconds for part, seconds in medians.items() if part != "step")
    return {
        "examples": len(data),
        "tokens_a_step": tokens,
        "steps": steps,
        "seconds_of_a_step": {**medians, "bookkeeping": medians["step"] - known},
    }


def random_prompts(n: int, length: int) -> list[Example]:
    """Prompts of one length."""
    ids = torch.randint(1000, 40000, (n, length), generator=torch.Generator().manual_seed(length))
    return [Example(tuple(row), ((15,), (16,)), i % 2) for i, row in enumerate(ids.tolist())]


def growth(kinds: dict[str, Config], log: Path, rounds: int = 3) -> dict[str, list[dict]]:
    """Seconds of a step over the batch, and over the prompt's length; two forwards of the same model are the limit."""
    shapes = {"batch": [(n, n, 32) for n in BATCHES], "prompt length": [(n, 4, n) for n in LENGTHS]}
    series = {}
    for name, cases in shapes.items():
        series[name] = []
        for x, n, length in cases:
            data, seconds = random_prompts(n, length), {}
            for kind in ("all layers", "last layer"):
                config = kinds[kind].replace(batch_size=n)
                runtime = HFRuntime(*config.for_runtime)
                runs = {f"ours, {kind}": OurStep(runtime, config, data, log)}
                if kind == "all layers":
                    plain = HFRuntime(*config.replace(linear="torch").for_runtime)
                    full = OriginalStep(plain, config, data, everywhere=True)
                    alone = OriginalStep(plain, config, data, everywhere=False)
                    runs |= {"original": full, "two forwards": alone.two_forwards}
                seconds |= {run: statistics.median(own) for run, own in in_turn(runs, rounds).items()}
            series[name].append({"x": x, "examples": n, "tokens_a_prompt": length, "seconds": seconds})
            print(name, x, seconds, file=sys.stderr)
    return series


def verdicts(results: dict) -> dict[str, bool]:
    """What must hold, by its name."""
    slower = 1 / results["hf, all layers"]["times_ours"]["two forwards, scored positions"]
    held = {f"all layers: at most {SLOWEST} times two forwards": slower <= SLOWEST}
    for kind, least in TARGETS.items():
        held[f"{kind}: at least {least} times the original"] = results[f"hf, {kind}"]["times_ours"]["original"] >= least
    return held


def measured(pairs: int) -> dict:
    """The parts of a step, and the ratios that must hold."""
    kinds = configs()
    data = load_splits(kinds["last layer"], load_tokenizer(kinds["last layer"].model.base), masked=False)["train"][
        :BATCH
    ]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        for kind, config in kinds.items():
            results[f"hf, {kind}"] = hf(config, data, log, pairs if kind == "all layers" else 7)
            print(kind, json.dumps(results[f"hf, {kind}"], indent=2), file=sys.stderr)
        for kind in ("all layers", "last layer") if find_spec("sglang") else ():
            results[f"sglang, {kind}"] = sglang(kinds[kind], data, log, 8)
    return results


def main() -> int:
    """Measure, print, write; exit code 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="rounds in turn, adapters on all layers")
    parser.add_argument("--growth-alone", action="store_true", help="keep the rest of what the file has")
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.growth_alone else {"command": "make bench-training"}
    if not options.growth_alone:
        found["results"] = measured(options.pairs)
        found["held"] = verdicts(found["results"])
    with tempfile.TemporaryDirectory() as folder:
        found["series"] = growth(configs(), Path(folder) / "log.jsonl")
    found["machine"] = describe() | {"transformers": version("transformers"), "peft": version("peft")}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found["held"].items():
        print(f"{'holds' if value else 'DOES NOT HOLD'}: {name}")
    return 0 if all(found["held"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

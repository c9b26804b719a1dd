"""The forward passes of a step in CPU seconds of one thread: ours, what it was, the original's, the limit.

Run: make bench-forward, or python bench/forward.py --output bench/results/MACHINE/forward.json
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import describe
from training_step import OriginalStep, OurStep, configs, random_prompts
from transformers import AutoModel

from mezo import MeZO
from mezo.config import Config
from mezo.data.example import Example
from mezo.models.linear import as_loaded, choose, lay_out, measured_gain, pack, packed_product, why_not_by
from mezo.models.load import load_tokenizer
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.rows import RowBatch, rows_of
from mezo.tasks import load_splits


@contextmanager
def medium():
    """The one line that a user of the original may add."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def openvino_pair(model: str, data: list[Example]) -> Callable:
    """Two forward passes of the bare body by OpenVINO, float32, one thread."""
    import openvino

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

        def forward(self, ids, mask):
            return self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    batch = RowBatch.of([row for example in data for row in rows_of(example)], 0, "cpu")
    inputs = (batch.ids, batch.mask)
    with torch.no_grad():
        converted = openvino.convert_model(Body(), example_input=inputs)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(converted, "CPU", settings)
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: [compiled(arrays) for _ in range(2)]


def product_errors(rows: int = 64, width: int = 576) -> dict[str, float]:
    """Largest error of a float32 product, relative to its largest element; bfloat16 on the way would make it 2e-3."""
    x, weight = torch.randn(rows, width), torch.randn(2 * width, width)
    exact = x.double() @ weight.double().T
    error = lambda product: ((product - exact).abs().max() / exact.abs().max()).item()  # noqa: E731
    errors = {"torch": error(torch.nn.functional.linear(x, weight))}
    errors["packed"] = error(packed_product(x, lay_out(weight), None))
    with medium():
        errors['torch, precision "medium"'] = error(torch.nn.functional.linear(x, weight))
    return errors


def product_rates(rows: int = 1024, width: int = 576) -> dict[str, float]:
    """GFLOP/s of one float32 product here, by torch and packed, best of a few calls."""
    x, weight = torch.randn(rows, width), torch.randn(2 * width, width)
    packed = lay_out(weight)
    runs = {
        "torch": lambda: torch.nn.functional.linear(x, weight),
        "packed": lambda: packed_product(x, packed, None),
    }
    flops = 4 * rows * width * width
    return {name: flops / min(cpu_seconds(run) for _ in range(9)) / 1e9 for name, run in runs.items()}


def cpu_seconds(run: Callable) -> float:
    """Of this process, in which one thread works."""
    began = time.process_time()
    run()
    return time.process_time() - began


def as_before(runtime: HFRuntime, run: Callable) -> Callable:
    """The same with rows in padded groups of like length and PEFT's own adapters, as a step was before."""
    padded = runtime.scorer._padded(runtime.scorer.reading)

    def padded_run() -> None:
        way, trunk = runtime.scorer.way, runtime.scorer.trunk
        runtime.scorer.way = dataclasses.replace(way, layout=padded)
        layout = trunk and trunk.layout
        if trunk:
            trunk.layout = padded
        try:
            with as_loaded():
                run()
        finally:
            runtime.scorer.way = way
            if trunk:
                trunk.layout = layout

    return padded_run


def in_turn(name: str, runs: dict[str, Callable], rounds: int, first: str) -> dict:
    """CPU seconds of each by round, after one that is not counted: medians, the best, and medians of ratios to one.

    Args:
        name: of the table.
        runs: what is timed.
        rounds: that count.
        first: name of the run that the others are divided by.
    """
    times = {run: [] for run in runs}
    for n in range(rounds + 1):
        for run, call in runs.items():
            seconds = cpu_seconds(call)
            times[run] += [seconds] if n else []
        print(name, n, {run: round(own[-1], 3) for run, own in times.items() if own}, file=sys.stderr, flush=True)
    return {
        "median_cpu_seconds": {run: statistics.median(own) for run, own in times.items()},
        "best_cpu_seconds": {run: min(own) for run, own in times.items()},
        f"times {first}": {
            run: statistics.median(t / o for t, o in zip(own, times[first], strict=True)) for run, own in times.items()
        },
    }


class Steps:
    """Steps of one configuration, ours and the original's, in this process.

    Args:
        config: the run's.
        data: the batch.
        log: where steps are logged.
    """

    def __init__(self, config: Config, data: list[Example], log: Path):
        self.config, self.data, self.log = config, data, log

    def runtime(self, **options) -> HFRuntime:
        """One with other options."""
        return HFRuntime(*self.config.replace(**options).for_runtime)

    def ours(self, runtime: HFRuntime) -> OurStep:
        """A step of ours."""
        return OurStep(runtime, self.config, self.data, self.log)


def with_line(step: Callable) -> Callable:
    """A step of the original's with the one line that a user may add."""

    def run() -> None:
        with medium():
            step()

    return run


def by_optimizer(runtime: HFRuntime, steps: Steps) -> Callable:
    """A step of `mezo.MeZO` whose closure is the original's forward pass."""
    closure = OriginalStep(runtime, steps.config, steps.data, everywhere=True)
    closure.in_place()
    params = runtime.parts.params
    for p in params.values():
        p.requires_grad_(True)
    optimizer = MeZO(params.items(), lr=steps.config.method.lr, eps=steps.config.method.eps)
    return lambda: optimizer.step(closure.loss)


def all_layers(steps: Steps, rounds: int) -> tuple[dict, float]:
    """Adapters on all layers, beside the original's step and bare forward passes; and seconds of ours at best."""
    packed, plain, half, third = (steps.runtime(linear=kind) for kind in ("packed", "torch", "torch", "torch"))
    ours = steps.ours(packed)
    before = as_before(half, steps.ours(half))
    optimizer = by_optimizer(third, steps)
    original = OriginalStep(plain, steps.config, steps.data, everywhere=True)
    bare = OriginalStep(plain, steps.config, steps.data, everywhere=False)
    bare_packed = OriginalStep(packed, steps.config, steps.data, everywhere=False, as_ours=True)
    table = in_turn(
        "all layers",
        {
            "ours": ours,
            "ours, torch's product": steps.ours(plain),
            "ours before: torch's product, rows padded by length, PEFT's adapters": before,
            "original": original,
            'original, precision "medium"': with_line(original),
            "mezo.MeZO": optimizer,
            'mezo.MeZO, precision "medium"': with_line(optimizer),
            "two forwards, padded": bare.two_forwards,
            "two forwards, padded, packed, adapters in place": bare_packed.two_forwards,
        },
        rounds,
        "ours",
    )
    return table, table["best_cpu_seconds"]["ours"]


def ours_and_before(steps: Steps, rounds: int, name: str, **options) -> dict:
    """A step of ours beside what it was, of a configuration."""
    new, old = steps.runtime(**options), steps.runtime(linear="torch")
    runs = {"ours": steps.ours(new), "before": as_before(old, steps.ours(old))}
    return in_turn(name, runs, rounds, "ours")


def filling(steps: Steps, rounds: int) -> dict:
    """Filling the trunk cache with the examples of a batch."""
    runtimes = {"ours": steps.runtime(linear="packed"), "before": steps.runtime(linear="torch")}
    fills = {}
    for name, runtime in runtimes.items():
        runtime.prepare({"train": steps.data})
        fills[name] = functools.partial(fill, runtime)
    fills["before"] = as_before(runtimes["before"], fills["before"])
    return in_turn("filling", fills, rounds, "ours")


def fill(runtime: HFRuntime) -> None:
    """Fill an empty trunk cache."""
    runtime.scorer.trunk.clear()
    runtime.scorer.trunk.fill("train")


def every_parameter(steps: Steps, rounds: int) -> dict:
    """All weights trained: none can be packed, and the trial says whose product they have."""
    kinds = {name: steps.runtime(linear=name) for name in ("auto", "torch")}
    original = OriginalStep(kinds["torch"], steps.config, steps.data, everywhere=True)
    runs = {
        "ours": steps.ours(kinds["auto"]),
        "ours, torch's product": steps.ours(kinds["torch"]),
        "original": original,
        'original, precision "medium"': with_line(original),
    }
    return in_turn("every parameter", runs, rounds, "ours")


def limit(model: str, rounds: int, rows: int = 16, length: int = 48) -> dict:
    """Two forward passes of the bare body, rows of one length, so that nobody pads: packed, and by OpenVINO."""
    data = random_prompts(rows, length)
    batch = RowBatch.of([row for example in data for row in rows_of(example)], 0, "cpu")
    bodies = {name: AutoModel.from_pretrained(model, dtype=torch.float32).eval() for name in ("packed", "torch")}
    pack(bodies["packed"], set())

    def passes(body: torch.nn.Module) -> None:
        with torch.no_grad():
            for _ in range(2):
                body(input_ids=batch.ids, use_cache=False)

    runs = {f"transformers, {name}": functools.partial(passes, body) for name, body in bodies.items()}
    if find_spec("openvino"):
        runs["OpenVINO"] = openvino_pair(model, data)
    return {"rows": rows, "tokens_a_row": length} | in_turn("bare", runs, rounds, "transformers, packed")


def measured(batch: int, rounds: int) -> dict:
    """All tables."""
    kinds = {name: config.replace(batch_size=batch) for name, config in configs().items()}
    every = kinds["all layers"]
    data = load_splits(every, load_tokenizer(every.model.base), masked=False)["train"][: 4 * batch]
    tokens = 2 * sum(len(example.prompt) for example in data[:batch])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        of = lambda config, n=batch: Steps(config, data[:n], log)  # noqa: E731
        table, best = all_layers(of(every), rounds)
        whole = of(every.replace(tuning="full"))
        makers = {
            "last 4 layers": lambda name: ours_and_before(of(kinds[name]), 3 * rounds, name, linear="packed"),
            "bfloat16, all layers": lambda name: ours_and_before(
                of(every), rounds, name, linear="packed", dtype="bfloat16"
            ),
            "filling the trunk cache below the last layer": lambda _: filling(
                of(kinds["last layer"], 4 * batch), rounds
            ),
            "every parameter": lambda _: every_parameter(whole, rounds),
            "bare": lambda _: limit(every.model.base, rounds),
        }
        tables = {"all layers": table} | {name: make(name) for name, make in makers.items()}
    body = AutoModel.from_pretrained(every.model.base)
    cpu, kinds_of_base = torch.device("cpu"), {"frozen": True, "every parameter trained": False}
    refusal = {name: why_not_by(name, torch.float32, cpu) for name in ("packed", "onednn")}
    weights = sum(m.weight.numel() for m in body.modules() if isinstance(m, torch.nn.Linear))
    return {
        "examples": batch,
        "tokens_of_both_passes": tokens,
        "rounds": rounds,
        "tables": tables,
        "gflops_of_ours_at_best": 2 * weights * tokens / best / 1e9,
        "tokens_per_second_at_best": tokens / best,
        "product_gflops": product_rates(),
        "product_errors": product_errors(),
        "gain_by_the_trial": {
            name: measured_gain(576, torch.float32, name) for name in ("packed", "onednn") if not refusal[name]
        },
        "refused": {name: why for name, why in refusal.items() if why},
        "chosen": {name: choose("auto", 576, torch.float32, cpu, frozen).why for name, frozen in kinds_of_base.items()},
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measured(options.batch, options.rounds)
    packages = ("transformers", "peft", *(["openvino"] if find_spec("openvino") else []))
    machine = describe() | {name: version(name) for name in packages}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"command": "make bench-forward", "machine": machine, **results}, indent=2) + "\n"
    )
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

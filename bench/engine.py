"""What the engine gains on a CPU by packed weights, attention of requests together, and adapters together.

CPU seconds of the engine's processes for the forward passes of a step, of batch 32 of the demo's prompts, with one
direction for the batch and one for each example; and for text of all directions. Each row leaves one thing more to our
code than the row before; the first is SGLang's own. Adapters are beside all layers, or the last.

Run: make bench-engine, or python bench/engine.py --output bench/results/MACHINE/engine.json
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from countdown import seconds_of
from directions import BATCH, LAYERS, demo_run
from machine import describe

from mezo.config import Config
from mezo.method.step import Step
from mezo.models.load import load_tokenizer
from mezo.runtimes.sglang.inside.plugin import WITHOUT
from mezo.runtimes.sglang.runtime import SGLangRuntime
from mezo.tasks import load_splits
from mezo_kernels import perturbation_seed

ROWS = {
    "SGLang's own": ("torch", "attention,lora"),
    "weights packed": ("packed", "attention,lora"),
    "and attention together": ("packed", "lora"),
    "and adapters together": ("packed", ""),
}
"""--linear, and what is left to SGLang."""
NEW, PROMPTS = 8, 2  # tokens and prompts of text


def steps(runtime: SGLangRuntime, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each kind of forward passes; the first round, which warms up, is left out."""
    batch = list(range(BATCH))
    kinds = {
        "one direction": (1, lambda: runtime.score_pairs("train", batch)),
        "a direction for each example": (BATCH, lambda: runtime.score_pairs("train", batch, [[i] for i in batch])),
        "text of all directions": (BATCH, lambda: runtime.generate_pairs("train", batch[:PROMPTS], NEW, ())),
    }
    found = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, (directions, run) in kinds.items():
            runtime.perturb(Step([perturbation_seed(0, number, k) for k in range(directions)], 1e-2))
            before = seconds_of(runtime)
            run()
            found[name] += [seconds_of(runtime) - before] if number else []
    return {name: statistics.median(each) for name, each in found.items()}


def row(config: Config, linear: str, without: str, rounds: int) -> dict[str, float]:
    """`steps` of an engine of its own."""
    os.environ[WITHOUT] = without
    config = config.replace(linear=linear)
    runtime = SGLangRuntime(*config.for_runtime)
    try:
        data = load_splits(config, load_tokenizer(config.model.base))["train"][:BATCH]
        runtime.prepare({"train": data})
        return steps(runtime, rounds)
    finally:
        runtime.close()


def main() -> None:
    """Measure and write the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {
        "machine": describe(),
        "batch": BATCH,
        "prompts_of_text": PROMPTS,
        "tokens_of_text": NEW,
        "cpu_seconds": {},
    }
    for layers in ("all layers", "last layer"):
        options = {name: value for name, value in LAYERS[layers].items() if name != "trunk_cache"}
        with tempfile.TemporaryDirectory() as folder:
            config = demo_run(directions=BATCH, max_new_tokens=NEW, generate="on", **options)
            config = config.replace(runtime="sglang", output_dir=f"{folder}/run")
            rows = found["cpu_seconds"][layers] = {}
            for name, (linear, without) in ROWS.items():
                rows[name] = row(config, linear, without, args.rounds)
                print(layers, name, json.dumps(rows[name]), flush=True)
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the engine gains on a CPU by packed weights, attention of requests together, and adapters together.

CPU seconds of the engine's processes for the forward passes of a step, of batch 32 of the demo's prompts, with one
direction for the batch and one for each example; and for text of all directions. Each row leaves one thing more to our
code than the row before; the first is SGLang's own, the last what a user has. Adapters are beside all layers, or the
last. `products` needs no engine: adapters' products of one module of the demo's model, r 8, on random numbers.

Run: make bench-engine, or python bench/engine.py --output bench/results/MACHINE/engine.json
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from countdown import seconds_of
from directions import BATCH, LAYERS, demo_run
from machine import describe
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABatchInfo
from sglang.srt.lora.torch_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd

from mezo.config import Config
from mezo.method.step import Step
from mezo.models.load import load_tokenizer
from mezo.runtimes.sglang.inside import lora
from mezo.runtimes.sglang.inside.plugin import WITHOUT
from mezo.runtimes.sglang.runtime import SGLangRuntime
from mezo.tasks import load_splits
from mezo_kernels import perturbation_seed

ROWS = {
    "SGLang's own": ("torch", "attention,lora"),
    "weights packed": ("packed", "attention,lora"),
    "and attention together": ("packed", "lora"),
    "and adapters together": ("packed", ""),
    "the same, by the product that a trial chooses": ("auto", ""),
}
"""--linear, and what is left to SGLang."""
NEW, PROMPTS = 8, 1  # tokens and prompts of text
WIDTH, RANK, SLOTS = 576, 8, 65  # of a query projection of the demo's model, and slots of 32 directions and the base


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


def batch_of(segments: list[tuple[int, int]]) -> TorchNativeLoRABatchInfo:
    """A batch of SGLang's with these segments: (slot, rows)."""
    empty = torch.empty(0)
    fields = {field.name: empty for field in dataclasses.fields(TorchNativeLoRABatchInfo) if field.init}
    made = TorchNativeLoRABatchInfo(**fields | {"use_cuda_graph": False, "num_segments": len(segments)})
    slots, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*segments, strict=True))
    made.weight_indices_cpu, made.seg_lens_cpu = slots, lengths
    made.lora_ranks_cpu, made.scalings_cpu = torch.full((SLOTS,), RANK), torch.full((SLOTS,), 2.0)
    return made


def products(rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU milliseconds of both products of a module, SGLang's loop and ours in turn, by the batch's segments."""
    rng, draw = random.Random(0), torch.Generator().manual_seed(0)
    lengths = [rng.randint(12, 45) for _ in range(BATCH)]
    batches = {
        "one direction": [(1, sum(lengths)), (2, sum(lengths))],
        "a direction for each example": [(1 + 2 * i + sign, n) for i, n in enumerate(lengths) for sign in (0, 1)],
        "text of all directions": [(slot, PROMPTS) for slot in range(1, SLOTS)],
    }
    a = torch.randn(SLOTS, RANK, WIDTH, generator=draw)
    b = torch.randn(SLOTS, WIDTH, RANK, generator=draw)
    ends, found = torch.tensor([0, WIDTH]), {}
    for name, segments in batches.items():
        x = torch.randn(sum(n for _, n in segments), WIDTH, generator=draw)
        whole, times = torch.zeros(len(x), WIDTH), {"SGLang's own": [], "ours": []}
        info = batch_of(segments)
        for _ in range(rounds):
            began = time.process_time()
            own = sgemm_lora_b_fwd(sgemm_lora_a_fwd(x, a, info, 1), b, info, ends, torch.zeros_like(whole))
            between = time.process_time()
            ours = lora.shrink(None, x, a, info, 1)
            ours = lora.expand(None, ours, b, info, ends, torch.zeros_like(whole))
            times["ours"].append(time.process_time() - between)
            times["SGLang's own"].append(between - began)
        if not torch.allclose(own, ours, atol=1e-2):
            raise SystemExit(f"{name}: the products differ by {(own - ours).abs().max():.2g}")
        found[name] = {way: 1e3 * statistics.median(each[1:]) for way, each in times.items()}
        found[name]["ratio"] = found[name]["SGLang's own"] / found[name]["ours"]
    return found


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
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="of engines, in this order")
    parser.add_argument(
        "--layers", nargs="*", default=["all layers", "last layer"], help="that engines have adapters on"
    )
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": describe(), "batch": BATCH, "prompts_of_text": PROMPTS, "tokens_of_text": NEW}
    found |= {"products_milliseconds": products(50), "cpu_seconds": {}}
    print(json.dumps(found["products_milliseconds"]), flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    for layers in args.layers:
        options = {name: value for name, value in LAYERS[layers].items() if name != "trunk_cache"}
        with tempfile.TemporaryDirectory() as folder:
            config = demo_run(directions=BATCH, max_new_tokens=NEW, generate="on", **options)
            config = config.replace(runtime="sglang", output_dir=f"{folder}/run")
            rows = found["cpu_seconds"][layers] = {}
            for name in args.rows:
                linear, without = ROWS[name]
                rows[name] = row(config, linear, without, args.rounds)
                print(layers, name, json.dumps(rows[name]), flush=True)
                args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

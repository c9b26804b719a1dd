"""The forward passes of a step, adapters on all layers, in CPU seconds of one thread: ours, the original's, the limit.

Run: make bench-forward, or python bench/forward.py --output bench/results/MACHINE/forward.json
"""

import argparse
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
from training_step import OriginalStep, OurStep, configs

from mezo.data.example import Example
from mezo.models.linear import measured_gain
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
    from transformers import AutoModel

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


def product_rates(rows: int = 1024, width: int = 576) -> dict[str, float]:
    """GFLOP/s of one float32 product here, by torch and packed, best of a few calls."""
    x, weight = torch.randn(rows, width), torch.randn(2 * width, width)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    runs = {
        "torch": lambda: torch.nn.functional.linear(x, weight),
        "packed": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    }
    flops = 4 * rows * width * width
    return {name: flops / min(cpu_seconds(run) for _ in range(9)) / 1e9 for name, run in runs.items()}


def cpu_seconds(run: Callable) -> float:
    """Of this process, in which one thread works."""
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(batch: int, rounds: int, with_openvino: bool) -> dict:
    """Medians of CPU seconds, and of ratios to ours by round."""
    config = configs()["all layers"].replace(batch_size=batch)
    data = load_splits(config, load_tokenizer(config.model.base), masked=False)["train"][:batch]
    kinds = {kind: HFRuntime(*config.replace(linear=kind).for_runtime) for kind in ("torch", "packed")}
    with tempfile.TemporaryDirectory() as folder:
        steps = {kind: OurStep(r, config, data, Path(folder) / f"{kind}.jsonl") for kind, r in kinds.items()}
        original = OriginalStep(kinds["torch"], config, data, everywhere=True)
        bare = OriginalStep(kinds["torch"], config, data, everywhere=False)
        packed = OriginalStep(kinds["packed"], config, data, everywhere=False, as_ours=True)

        def with_line() -> None:
            with medium():
                original()

        runs = {
            "ours, packed": steps["packed"],
            "ours, torch's product": steps["torch"],
            "original": original,
            'original, precision "medium"': with_line,
            "two forwards": bare.two_forwards,
            "two forwards, packed, adapters in place": packed.two_forwards,
        }
        if with_openvino:
            runs["two forwards, OpenVINO, no adapters"] = openvino_pair(config.model.base, data)
        times = {name: [] for name in runs}
        for n in range(rounds + 1):
            for name, run in runs.items():
                seconds = cpu_seconds(run)
                times[name] += [seconds] if n else []
            print(n, {name: round(own[-1], 2) for name, own in times.items() if own}, file=sys.stderr, flush=True)
    tokens = 2 * sum(len(example.prompt) for example in data)
    body = kinds["torch"].parts.body
    weights = sum(
        m.weight.numel() for n, m in body.named_modules() if isinstance(m, torch.nn.Linear) and "lora_" not in n
    )
    ours = times["ours, packed"]
    best = min(ours)
    return {
        "examples": batch,
        "tokens_of_both_passes": tokens,
        "rounds": rounds,
        "median_cpu_seconds": {name: statistics.median(own) for name, own in times.items()},
        "best_cpu_seconds": {name: min(own) for name, own in times.items()},
        "times_ours": {
            name: statistics.median(t / o for t, o in zip(own, ours, strict=True)) for name, own in times.items()
        },
        "gflops_of_ours_at_best": 2 * weights * tokens / best / 1e9,
        "tokens_per_second_at_best": tokens / best,
        "product_gflops": product_rates(),
        "gain_of_packing_by_the_trial": measured_gain(576, torch.float32),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    openvino = bool(find_spec("openvino"))
    results = measured(options.batch, options.rounds, openvino)
    machine = describe() | {name: version(name) for name in ("transformers", "peft", *(["openvino"] * openvino))}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps({"command": "make bench-forward", "machine": machine, **results}, indent=2) + "\n"
    )
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

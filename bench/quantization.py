"""Memory, accuracy and CPU seconds of a step by the number format of the frozen base, on the demo's model and data.

Run: make bench-quantization, or python bench/quantization.py --output bench/results/MACHINE/quantization.json
Rows that the file has already are left alone. Seconds are of the CPU, on one thread: a busy machine changes them least.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from alternatives import examples, forget_peaks, peak_bytes
from machine import describe
from training_step import ALL, OurStep, configs

from mezo.api import train
from mezo.models.quantization import FORMATS, NONE, is_quantised, tensors_of
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies.demo import demo_config

BATCH, STEPS = 16, 2  # of the step through all layers
RUN = {
    "steps": 600,
    "eval_every": 200,
    "num_train": 256,
    "num_dev": 50,
    "num_test": 200,
    "report": False,
    "noise": False,
}
ROWS = {  # --dtype and --quantization
    "float32": ("float32", NONE),
    "bfloat16": ("bfloat16", NONE),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
    "int8, bfloat16": ("bfloat16", "int8"),
    "nf4, bfloat16": ("bfloat16", "nf4"),
    "fp4": ("float32", "fp4"),
    "llm-int8": ("float32", "llm-int8"),
}


def step(dtype: str, quantization: str) -> dict:
    """A step with adapters on all layers: bytes of the base, most resident bytes while it runs, CPU seconds."""
    data = examples(BATCH)
    model = {"dtype": dtype, "quantization": quantization}
    config = configs()["all layers"].replace(target_modules=ALL, batch_size=len(data), **model)
    with tempfile.TemporaryDirectory() as folder:
        runtime = HFRuntime(*config.for_runtime)
        base = runtime.parts.base
        tensors = tensors_of(base) if is_quantised(base) else base.named_parameters()
        nbytes = {name: t.nbytes for name, t in tensors if ".lora_" not in name}
        embedded = sum(size for name, size in nbytes.items() if "embed_tokens" in name)
        run = OurStep(runtime, config, data, Path(folder) / "log.jsonl")
        ctypes.CDLL(None).malloc_trim(0)  # what loading took and gave back
        forget_peaks([os.getpid()])
        run()
        times = []
        for _ in range(STEPS):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    return {
        "base_bytes": sum(nbytes.values()),
        "of_it_embeddings": embedded,
        "peak_bytes": peak_bytes([os.getpid()]),
        "step_cpu_seconds": statistics.median(times),
        "tokens_a_pass": sum(len(example.prompt) for example in data),
    }


def run(dtype: str, quantization: str) -> dict:
    """A short run of the demo: last layer, its trunk cached; what it learnt, and CPU seconds of all of it."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config("it-was", RUN["steps"], Path(folder) / "run")
        result = train(config.replace(**RUN, dtype=dtype, quantization=quantization))
    test = {when: {key: result["test"][when][key] for key in ("accuracy", "auc")} for when in ("before", "after")}
    return {"test": test, "best_step": result["best_step"], "run_cpu_seconds": time.process_time() - began}


def main() -> int:
    """Each row in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write, or go on with")
    parser.add_argument("--one", choices=ROWS, metavar="ROW", help="measure in this process and print")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print("RESULT", json.dumps(step(*ROWS[options.one]) | run(*ROWS[options.one])), flush=True)
        return 0
    if not options.output:
        parser.error("give --output")
    versions = {name: version(name) for name in ("transformers", "peft", "torchao", "bitsandbytes") if find_spec(name)}
    whole = {"command": "make bench-quantization", "machine": describe() | versions, "run": RUN, "batch": BATCH}
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else {}
    for row, (_, quantization) in ROWS.items():
        if row in rows or not find_spec(FORMATS[quantization].library if quantization != NONE else "torch"):
            continue
        command, environment = [sys.executable, __file__, "--one", row], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rows[row] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
        print(row, json.dumps(rows[row]), file=sys.stderr)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**whole, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory, accuracy and CPU seconds of a step by the number format of the frozen base, on the demo's model and data.

Run: make bench-quantization, or python bench/quantization.py --output bench/results/MACHINE/quantization.json
What the file has already is left alone. Seconds are of the CPU, on one thread: a busy machine changes them least. With
--table FILE... the table of these files, between two comments, is written anew from the JSON.
"""

import argparse
import ctypes
import itertools
import json
import os
import re
import signal
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
from mezo.models.linear import PackedLinear
from mezo.models.quantization import FORMATS, NONE, is_quantised, tensors_of
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies import assets
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
SHORT = {"steps": 90, "eval_every": 45, "num_train": 64, "num_dev": 20, "num_test": 20}  # of the run that is killed
GGUF = "gguf"
"""In place of a format: the file that the demo's model comes in, as it is."""
MEZO = (sys.executable, "-m", "mezo", "train")
ROWS = {  # --dtype and --quantization
    "float32": ("float32", NONE),
    "bfloat16": ("bfloat16", NONE),
    "int8": ("float32", "int8"),
    "nf4": ("float32", "nf4"),
    "fp4": ("float32", "fp4"),
    "llm-int8": ("float32", "llm-int8"),
    "float8": ("float32", "float8"),
    "gguf": ("float32", GGUF),
    "int8, bfloat16": ("bfloat16", "int8"),
    "nf4, bfloat16": ("bfloat16", "nf4"),
}


def base_of(dtype: str, quantization: str) -> dict:
    """Options of a row's base."""
    if quantization != GGUF:
        return {"dtype": dtype, "quantization": quantization}
    return {"dtype": dtype, "model": str(assets.fetch_gguf())}


def step(dtype: str, quantization: str) -> dict:
    """A step with adapters on all layers: bytes of the base, most resident bytes while it runs, CPU seconds."""
    data = examples(BATCH)
    base = base_of(dtype, quantization)
    config = configs()["all layers"].replace(target_modules=ALL, batch_size=len(data), **base)
    with tempfile.TemporaryDirectory() as folder:
        runtime = HFRuntime(*config.for_runtime)
        base = runtime.parts.base
        tensors = tensors_of(base) if is_quantised(base) else base.named_parameters()
        nbytes = {name: t.nbytes for name, t in tensors if ".lora_" not in name}
        nbytes |= {name: m.weight.nbytes for name, m in base.named_modules() if isinstance(m, PackedLinear)}
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
        result = train(config.replace(**RUN, **base_of(dtype, quantization)))
    test = {when: {key: result["test"][when][key] for key in ("accuracy", "auc")} for when in ("before", "after")}
    return {"test": test, "best_step": result["best_step"], "run_cpu_seconds": time.process_time() - began}


def killed(dtype: str, quantization: str) -> dict:
    """A shorter run that SIGKILL ends in the middle and that is resumed, beside one that is left alone."""
    with tempfile.TemporaryDirectory() as folder:
        whole, other = (Path(folder) / name for name in ("whole", "killed"))
        for path in (whole, other):
            config = demo_config("it-was", SHORT["steps"], path)
            config = config.replace(**RUN | SHORT, **base_of(dtype, quantization))
            path.with_suffix(".yaml").write_text(json.dumps(config.to_dict()))
        subprocess.run([*MEZO, "--config", f"{whole}.yaml"], check=True, stdout=sys.stderr)
        process = subprocess.Popen([*MEZO, "--config", f"{other}.yaml"], stdout=sys.stderr)
        log = other / "trajectory.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > SHORT["steps"] // 3):
            time.sleep(0.01)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError("the run ended before it was killed")
        at = log.read_bytes().count(b"\n") - 1
        subprocess.run([*MEZO, "--resume", str(other)], check=True, stdout=sys.stderr)
        files = ("trajectory.jsonl", "adapter/adapter_model.safetensors")
        equal = all((whole / name).read_bytes() == (other / name).read_bytes() for name in files)
    return {"killed_at_step": at, "of_steps": SHORT["steps"], "log_and_adapter_equal": equal}


PARTS = {"step": step, "run": run, "killed": killed}
KNOWN = {"step": "step_cpu_seconds", "run": "run_cpu_seconds", "killed": "killed_at_step"}
KILLED = ("int8", "gguf")  # rows that are killed and resumed too
BETWEEN = re.compile("(<!-- quantization -->).*(<!-- end of quantization -->)", re.DOTALL)


def markdown(whole: dict) -> str:
    """The table of a result file: a row of each format that has been measured."""
    memory, speed = "most memory of the process in a step", "steps a CPU second"
    lines = [
        f"| base | its bytes | {memory} | accuracy before, after | AUC after | {speed} |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in whole["rows"].items():
        if not {"base_bytes", "test"} <= row.keys():  # measured in part
            continue
        dtype, quantization = ROWS[name]
        flags = [f"--quantization {quantization}"] if quantization in FORMATS else []
        flags += ["--model ... .Q4_1.gguf"] if quantization == GGUF else []
        flags += [f"--dtype {dtype}"] if dtype != "float32" or not flags else []
        before, after = row["test"]["before"], row["test"]["after"]
        lines.append(
            f"| `{' '.join(flags)}` | {row['base_bytes'] / 1e6:,.0f} MB | {row['peak_bytes'] / 1e6:,.0f} MB"
            f" | {100 * before['accuracy']:.1f}, {100 * after['accuracy']:.1f} % | {after['auc']:.3f}"
            f" | {1 / row['step_cpu_seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Each part of a row in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write, or go on with")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="formats to measure")
    parser.add_argument("--table", nargs="+", type=Path, default=[], help="documents whose table is written anew")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "PART"), help="measure in this process and print")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        row, part = options.one
        print("RESULT", json.dumps(PARTS[part](*ROWS[row])), flush=True)
        return 0
    if not options.output:
        parser.error("give --output")
    measure(options.output, options.rows)
    table = markdown(json.loads(options.output.read_text()))
    for path in options.table:
        path.write_text(BETWEEN.sub(lambda between: f"{between[1]}\n{table}\n{between[2]}", path.read_text()))
    return 0


def measure(output: Path, names: list[str]) -> None:
    """Measure what a result file lacks, and write each part as it is known."""
    versions = {name: version(name) for name in ("transformers", "peft", "torchao", "bitsandbytes") if find_spec(name)}
    whole = {"command": "make bench-quantization", "machine": describe() | versions, "run": RUN, "batch": BATCH}
    known = json.loads(output.read_text())["rows"] if output.exists() else {}
    for name, part in itertools.product(names, PARTS):
        quantization = ROWS[name][1]
        library = FORMATS[quantization].library if quantization in FORMATS else "torch"
        if KNOWN[part] in known.get(name, {}) or not find_spec(library) or (part == "killed" and name not in KILLED):
            continue
        command, environment = [sys.executable, __file__, "--one", name, part], {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))[7:])
        known[name] = known.get(name, {}) | found
        print(name, json.dumps(found), file=sys.stderr)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**whole, "rows": known}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

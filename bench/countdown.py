"""Rewards with populations on the engine: what one continuous batch gains, and what a population learns.

`population`: 32 directions at both signs write answers to the same Countdown puzzles (examples/countdown.py), in one
batch of requests, and one copy after another through one adapter that is written anew, as public code for evolution
strategies does. The engine, prompts and random numbers are the same, and so are the texts.
`demo`: the reward of a run on sampled answers of the demo's model.

Run: make bench-countdown, or python bench/countdown.py --output bench/results/MACHINE/countdown.json
"""

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import describe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mezo.api import train
from mezo.config import Config
from mezo.method.sampling import Sampling
from mezo.method.step import Step
from mezo.models.load import load_tokenizer
from mezo.runtimes.sglang.runtime import SGLangRuntime
from mezo.studies import assets, demo
from mezo.tasks import load_splits
from mezo_kernels import perturbation_seed

ROOT = Path(__file__).parents[1]
DIRECTIONS = 32
NEW = 8  # tokens of an answer
REWARD = f"{ROOT / 'examples' / 'countdown.py'}:solved"
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def example():
    """examples/countdown.py as a module."""
    spec = importlib.util.spec_from_file_location("countdown_example", ROOT / "examples" / "countdown.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(model: str, folder: Path, data: dict, **options) -> Config:
    """A run on the reward, on the engine."""
    common = {"objective": "reward", "reward": REWARD, "max_new_tokens": NEW, "temperature": 1.0}
    common |= {"z_score_rewards": True, "center_rewards": True, "noise": False, "report": False}
    common |= {"model": model, "output_dir": str(folder / "run"), "runtime": "sglang"}
    return Config.of(**{**common, **data, **options})


def adapted() -> dict:
    """The demo's adapter, on the last layer."""
    config = demo.demo_config("it-was", 1, Path("unused"))
    return {"target_modules": config.model.tuning.target_modules, "layers_to_transform": (29,)}


def seconds_of(runtime: SGLangRuntime) -> float:
    """CPU seconds so far of the engine's processes."""
    return sum(sum(process.cpu_times()[:2]) for process in runtime.engine.processes)


def population(counts: list[int], rounds: int, directions: int, model: str, options: dict) -> dict:
    """Tokens a second of both ways, taken in turn, for so many prompts."""
    folder = Path(tempfile.mkdtemp())
    data = example().write(folder, sizes={"train": max(counts), "dev": 4, "test": 4})
    config = run_of(model, folder, data, num_perturbations=directions, batch_size=max(counts), **options)
    runtime = SGLangRuntime(*config.for_runtime)
    rows = []
    try:
        runtime.prepare(load_splits(config, load_tokenizer(model)))
        for prompts in counts:
            ways = {"together": together, "one after another": one_by_one}
            figures = {name: [] for name in ways}
            for number in range(rounds + 1):
                texts = {}
                for name, way in ways.items():
                    figure, texts[name] = timed(runtime, way, number, prompts, directions)
                    figures[name] += [figure] if number else []  # the first round warms up
                pairs = list(zip(*texts.values(), strict=True))
                same = sum(a == b for a, b in pairs) / len(pairs)
            row = {"prompts": prompts, "directions": directions, "rounds": rounds, "equal_texts_of_last": same}
            for kind in ("tokens_per_second", "tokens_per_cpu_second"):
                row[kind] = {name: statistics.median(f[kind] for f in each) for name, each in figures.items()}
                row[f"ratio_of_{kind}"] = row[kind]["together"] / row[kind]["one after another"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        runtime.close()
    return {"adapter": {k: str(v) for k, v in options.items()}, "rows": rows}


def timed(runtime: SGLangRuntime, way, number: int, prompts: int, directions: int) -> tuple[dict, list[str]]:
    """Tokens written, by time and by CPU time, and the texts."""
    seeds = [perturbation_seed(0, number, k) for k in range(directions)]
    cpu, began = seconds_of(runtime), time.perf_counter()
    texts = way(runtime, seeds, list(range(prompts)), Sampling(1.0, number))
    seconds, cpu = time.perf_counter() - began, seconds_of(runtime) - cpu
    tokens = sum(len(runtime.writing.tokenizer(text)["input_ids"]) for text in texts)
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu}, texts


def together(runtime: SGLangRuntime, seeds: list[int], prompts: list[int], sampling: Sampling) -> list[str]:
    """All copies in slots of their own, all texts in one batch."""
    runtime.perturb(Step(seeds, 1e-2))
    pairs = runtime.generate_pairs("train", prompts, NEW, ("\n",), sampling=sampling)
    return [text for pair in pairs for texts in pair for text in texts]


def one_by_one(runtime: SGLangRuntime, seeds: list[int], prompts: list[int], sampling: Sampling) -> list[str]:
    """One copy after another, in slots that are written in place; a batch has the prompts alone."""
    texts = []
    for seed in seeds:
        runtime.perturb(Step([seed], 1e-2))
        for slot in ("plus0", "minus0"):
            asked = [((slot,), i) for i in prompts]
            texts += runtime._write("train", asked, runtime.tokens, NEW, ("\n",), sampling)[slot]
    return texts


def tiny_model(folder: Path) -> str:
    """A model of 0.2M parameters that AdamW has taught to write both numbers with a random sign."""
    words = ["<pad>", "<unk>", "\n", "Numbers", "Target", "Answer", ":", ".", "+", "-", "*", *map(str, range(100))]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, max_position_embeddings=256))
    countdown, rng = example(), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = [countdown.puzzle(rng, 2) for _ in range(16)]
        texts = [f"{row['prompt']} {row['numbers'][0]} {rng.choice('+-*')} {row['numbers'][1]}\n" for row in rows]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[:, -5:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def learnt(model: str, steps: int, options: dict, sizes: dict) -> dict:
    """Rewards of dev along a run, and of test before and after it."""
    folder = Path(tempfile.mkdtemp())
    data = example().write(folder, sizes=sizes)
    result = train(run_of(model, folder, data, steps=steps, eval_every=max(1, steps // 8), **options))
    dev = [{"step": row["step"], "reward": row["reward"]} for row in result["dev"]]
    test = {when: row["reward"] for when, row in result["test"].items()}
    told = {name: str(value) for name, value in options.items()}
    return {"options": told, "sizes": sizes, "dev": dev, "test": test, "seconds": result["seconds_training"]}


TINY = {
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "num_perturbations": 8, "batch_size": 16, "lr": 0.01, "eps": 0.1,
}  # fmt: skip
DEMO = {
    "num_perturbations": 8, "batch_size": 16, "tuning": "lora-xs", "r": 8, "lora_alpha": 8, "lora_a": "calibrated",
    "lr": 0.25, "lr_schedule": "cosine", "eps": 0.3,
}  # fmt: skip


def main() -> None:
    """Measure and write the JSON after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, or to add parts to")
    parser.add_argument("--parts", nargs="+", default=["population", "demo"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 4, 16], help="that a population answers at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="of the demo's model")
    args = parser.parse_args()
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    fetched = str(assets.fetch_model())
    parts = {
        "population": lambda: population(args.prompts, args.rounds, DIRECTIONS, fetched, adapted()),
        "demo": lambda: learnt(fetched, args.steps, adapted() | DEMO, {"train": 96, "dev": 48, "test": 64}),
    }
    for name in args.parts:
        found |= {"machine": describe(), name: parts[name]()}
        print(json.dumps(found[name]), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

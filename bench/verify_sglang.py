"""The SGLang runtime, measured: scores against transformers and PEFT, reuse by the engine's own count, overhead.

Run: make verify-sglang, or python bench/verify_sglang.py --output bench/results/MACHINE/verify_sglang.json
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from bench.machine import describe
from mezo.api import train
from mezo.config import Config
from mezo.data.example import Example
from mezo.method.objectives import cross_entropy
from mezo.method.step import Step, Update
from mezo.models.load import load_tokenizer
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.runtimes.base import TokenCount
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.sglang.runtime import SGLangRuntime
from mezo.studies import demo
from mezo.studies.assets import demo_splits, fetch_sentences
from mezo.tasks import load_splits
from mezo_kernels import lora_init
from tests.tiny_models import save

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EPS, BATCH = 1e-2, 32
FEW_SHOT = {"prefix": 300, "tail": 20, "batch": 16}
TRAJECTORY = {"steps": 20, "lr": 1e-4}


@contextmanager
def prepared(kind, config: Config, data: list[Example]):
    """A runtime with noisy theta on some examples."""
    runtime = kind(*config.for_runtime)
    try:
        runtime.prepare({"train": data})
        runtime.load({name: lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()})
        yield runtime
    finally:
        runtime.close()


def centred(scores: torch.Tensor) -> torch.Tensor:
    """Option scores less the first one's: hf leaves out a constant of each position."""
    return scores - scores[:, :1]


def three_scores(runtime, n: int) -> list[torch.Tensor]:
    """Scores of n examples at theta + eps z, theta - eps z and theta."""
    runtime.perturb(Step([7], EPS))
    return [*map(centred, runtime.score_pairs("train", range(n))[0]), centred(runtime.score("train", range(n)))]


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().nan_to_num(0).max()) for x, y in zip(a, b, strict=True))


def against_transformers(config: Config, data: list[Example], n: int) -> dict:
    """Largest difference of option log-probabilities, cold and with everything cached that may be."""
    plain = config.replace(runtime="hf", trunk_cache="off")
    with prepared(HFRuntime, plain, data) as runtime:
        expected = three_scores(runtime, n)
    with prepared(SGLangRuntime, config, data) as runtime:
        cold, warm = three_scores(runtime, n), three_scores(runtime, n)
    with prepared(SGLangRuntime, config.replace(radix="off"), data) as runtime:
        without = three_scores(runtime, n)
    return {
        "examples": n,
        "first_visit": largest(cold, expected),
        "later_visits": largest(warm, expected),
        "later_visits_against_no_reuse": largest(warm, without),
    }


def tokens_of(runtime, n: int, updates: list[Update], seed: int) -> TokenCount:
    """Tokens of one step."""
    runtime.update(updates, Step([seed], EPS))
    runtime.tokens = TokenCount()
    runtime.score_pairs("train", range(n))
    return dataclasses.replace(runtime.tokens)  # the runtime goes on counting in its own


def reuse_last_layer(config: Config, data: list[Example]) -> dict:
    """Cache-invariant mode: what the engine takes from its cache after the first visits, and what it should."""
    with prepared(SGLangRuntime, config, data) as runtime:
        first = tokens_of(runtime, BATCH, [], 0)
        later = [tokens_of(runtime, BATCH, [Update([k], [0.02])], k + 1) for k in range(5)]
    prompts = sum(len(example.prompt) for example in data[:BATCH])
    return {
        "tokens_a_prompt": prompts / BATCH,
        "first_visit": {"scored": first.scored, "computed": first.computed},
        "later_visits": [count.reused / count.scored for count in later],
        "tokens_computed_later": [count.computed for count in later],
        "requests": 2 * BATCH,
        "predicted": 1 - BATCH / prompts,
    }


def few_shot(config: Config, data: list[Example]) -> dict:
    """A 300-token prefix and adapters on all layers: shared within one version of theta, by the engine's count."""
    n, lengths = FEW_SHOT["batch"], [len(example.prompt) for example in data]
    with prepared(SGLangRuntime, config, data) as runtime:
        counts = [tokens_of(runtime, n, [Update([k], [1e-3])], k + 1) for k in range(3)]
        shared = runtime.score_pairs("train", range(n))[0]
    with prepared(SGLangRuntime, config.replace(radix="off"), data) as runtime:
        for k in range(3):
            runtime.update([Update([k], [1e-3])], Step([k + 1], EPS))
        alone = runtime.score_pairs("train", range(n))[0]
    prefix = FEW_SHOT["prefix"]
    return {
        **FEW_SHOT,
        "reused": [count.reused / count.scored for count in counts],
        "predicted": n * prefix / (prefix + sum(lengths)),
        "difference_from_no_reuse": largest(list(map(centred, shared)), list(map(centred, alone))),
    }


def overhead(config: Config, data: list[Example], steps: int) -> dict:
    """Seconds of a step by part, adapters on all layers, batch 32."""
    with prepared(SGLangRuntime, config, data) as runtime:
        labels = torch.tensor([example.label for example in data[:BATCH]])
        rows = []
        runtime.perturb(Step([0], EPS))
        for k in range(steps + 1):
            before, began = dict(runtime.seconds), time.perf_counter()
            plus, minus = (cross_entropy(s, labels).item() for s in runtime.score_pairs("train", range(BATCH))[0])
            runtime.update([Update([k], [1e-4 * (plus - minus) / (2 * EPS)])], Step([k + 1], EPS))
            parts = {part: runtime.seconds[part] - before[part] for part in before}
            rows.append({**parts, "step": time.perf_counter() - began})
    medians = {part: statistics.median(row[part] for row in rows[1:]) for part in rows[0]}
    ours = medians["step"] - medians["engine"]
    return {"steps": steps, "batch": BATCH, "median_seconds": medians, "share_of_our_code": ours / medians["step"]}


def trajectory(runtime, labels: torch.Tensor) -> tuple[list[float], list[Update]]:
    """Plain MeZO steps through a runtime."""
    runtime.perturb(Step([0], EPS))
    losses, updates = [], []
    for step in range(TRAJECTORY["steps"]):
        scores = runtime.score_pairs("train", range(len(labels)))[0]
        plus, minus = (cross_entropy(s, labels).item() for s in scores)
        losses += [plus, minus]
        updates.append(Update([step], [TRAJECTORY["lr"] * (plus - minus) / (2 * EPS)], 0.999))
        runtime.update(updates[-1:], Step([step + 1], EPS))
    return losses, updates


def tensor_parallel(config: Config, data: list[Example]) -> dict:
    """One rank and two: the same losses, and fed the same updates the same bits."""
    labels, made = torch.tensor([example.label for example in data]), {}
    for tp in (1, 2):
        with prepared(SGLangRuntime, config.replace(tp=tp), data) as runtime:
            start = runtime.theta()
            losses, updates = trajectory(runtime, labels)
            runtime.load(start)
            runtime.update(made[1]["updates"] if tp == 2 else updates, Step([0], EPS))
            made[tp] = {"losses": losses, "updates": updates, "theta": runtime.theta()}
    worst = max(abs(a - b) for a, b in zip(made[1]["losses"], made[2]["losses"], strict=True))
    return {
        **TRAJECTORY,
        "largest_difference_of_losses": worst,
        "adapters_equal_bit_for_bit": same_bits(made[1]["theta"], made[2]["theta"]) is None,
    }


def demo_run(directory: Path, steps: int) -> dict:
    """The demo's task through the engine."""
    config = demo.demo_config("it-was", steps, directory / "demo").replace(runtime="sglang")
    result = train(config)
    theta, _, _ = rebuild(directory / "demo")
    same = same_bits(theta, read_adapter(directory / "demo" / "adapter")) is None
    share = result["tokens_reused"] / result["tokens_scored"]
    return {**result, "reused_share_of_run": share, "log_replays_to_adapter": same}


def tiny(family: str, directory: Path, **others) -> tuple[Config, list[Example]]:
    """A tiny model and random prompts for it."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    data = [Example(tuple(draw(3, 64, n)), ((5,), (9,)), i % 2) for i, n in enumerate(draw(5, 21, 16))]
    model = save(family, directory / family)
    return Config.of(
        model=model, output_dir="unused", task="sst2", runtime="sglang", target_modules=ALL, **others
    ), data


def few_shot_examples(model: str) -> list[Example]:
    """Reviews of at most 20 tokens after 300 tokens of others with their labels."""
    tokenizer, rows = load_tokenizer(model), demo_splits(fetch_sentences())["train"]
    shots = "".join(f"{row['text']} It was {('terrible', 'great')[row['label']]}\n\n" for row in rows[100:])
    prefix = tokenizer(shots)["input_ids"][: FEW_SHOT["prefix"]]
    options = tuple((tokenizer(word)["input_ids"][0],) for word in (" terrible", " great"))
    tails = [(tokenizer(f"{row['text']} It was")["input_ids"], row["label"]) for row in rows[:100]]
    short = [(ids, label) for ids, label in tails if len(ids) <= FEW_SHOT["tail"]][: FEW_SHOT["batch"]]
    return [Example((*prefix, *ids), options, label) for ids, label in short]


def measure(directory: Path, steps: int, results: dict, keep) -> dict:
    """Every part that `results` lacks, in the order of its cost; `keep` is called with the results after each."""
    last = demo.demo_config("it-was", 10, directory / "unused").replace(runtime="sglang")
    every = last.replace(layers_to_transform=(), target_modules=ALL)
    data = load_splits(last, load_tokenizer(last.model.base), masked=False)["train"]
    families = {family: tiny(family, directory) for family in ("llama", "qwen2")}
    parts = {
        **{f"scores, tiny {f}": lambda c=c: against_transformers(*c, 16) for f, c in families.items()},
        **{f"tensor parallel, tiny {f}": lambda c=c: tensor_parallel(*c) for f, c in families.items()},
        "scores, demo model, last layer": lambda: against_transformers(last, data, BATCH),
        "scores, demo model, all layers": lambda: against_transformers(every, data, 8),
        "reuse, last layer": lambda: reuse_last_layer(last, data),
        "reuse, few-shot prefix, all layers": lambda: few_shot(every, few_shot_examples(last.model.base)),
        "overhead, all layers": lambda: overhead(every, data, 8),
        "demo": lambda: demo_run(directory, steps),
    }
    for name, part in ((name, part) for name, part in parts.items() if name not in results):
        began = time.perf_counter()
        results[name] = part()
        keep(results)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return results


def verdicts(results: dict) -> dict[str, bool]:
    """What must hold, by its name."""
    scores = [r for name, r in results.items() if name.startswith("scores")]
    ranks = [r for name, r in results.items() if name.startswith("tensor parallel")]
    shot, last, run = (results[n] for n in ("reuse, few-shot prefix, all layers", "reuse, last layer", "demo"))
    return {
        "scores within 5e-5 of transformers": max(max(r["first_visit"], r["later_visits"]) for r in scores) <= 5e-5,
        "scores within 5e-5 of no reuse": max(r["later_visits_against_no_reuse"] for r in scores) <= 5e-5,
        "one and two ranks: losses within 5e-5": max(r["largest_difference_of_losses"] for r in ranks) <= 5e-5,
        "one and two ranks: adapters equal": all(r["adapters_equal_bit_for_bit"] for r in ranks),
        "one token a request after the first visit": set(last["tokens_computed_later"]) == {last["requests"]},
        "few-shot prefix: at least 85 % reused": min(shot["reused"]) >= 0.85,
        "few-shot prefix: losses within 5e-5 of no reuse": shot["difference_from_no_reuse"] <= 5e-5,
        "our code: at most 5 % of a step": results["overhead, all layers"]["share_of_our_code"] <= 0.05,
        "demo: test accuracy at least 70 %": run["test"]["after"]["accuracy"] >= 0.70,
        "demo: at least 92 % reused, first visits counted": run["reused_share_of_run"] >= 0.92,
        "demo: the log gives the adapter": run["log_replays_to_adapter"],
    }


def main() -> int:
    """Measure, print, write; exit code 1 if something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file; parts that are in it are kept")
    parser.add_argument("--again", action="store_true", help="measure every part again")
    parser.add_argument("--steps", type=int, default=1000, help="of the demo")
    options = parser.parse_args()
    output = options.output
    before = json.loads(output.read_text()) if output.is_file() and not options.again else {}
    machine = {**describe(), **{name: version(name) for name in ("sglang", "transformers", "peft")}}

    def keep(results: dict, **others) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        everything = {"command": "make verify-sglang", **others, "machine": machine, **results}
        output.write_text(json.dumps(everything, indent=2) + "\n")

    known = {name: part for name, part in before.items() if name not in ("command", "holds", "machine")}
    with tempfile.TemporaryDirectory() as directory:
        results = measure(Path(directory), options.steps, known, keep)
    holds = verdicts(results)
    keep(results, holds=holds)
    print(output.read_text())
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

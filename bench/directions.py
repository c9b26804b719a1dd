"""What a direction for each group of a batch costs, and what it gains: the demo's task at equal scored rows.

Run: make bench-directions, or python bench/directions.py --output bench/results/MACHINE/directions.json
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import describe
from training_step import ALL, OurStep

from mezo.api import start
from mezo.config import Config
from mezo.models.load import load_tokenizer
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies import demo
from mezo.tasks import load_splits

BATCH, DIRECTIONS = 32, (1, 8, 32)
LAYERS = {"last layer": {}, "all layers": {"target_modules": ALL, "layers_to_transform": (), "trunk_cache": "off"}}
RATES = {1: (1e-3, 2e-3, 4e-3), 8: (2e-3, 4e-3, 8e-3), 32: (3e-3, 6e-3, 12e-3)}
FIRST = 0  # the seed that a learning rate is chosen on; others are reported


def demo_run(**options) -> Config:
    """The demo's run with other options, without what is not measured here."""
    return demo.demo_config("it-was", 10**6, Path("unused")).replace(
        noise=False, report=False, best_metric="loss", batch_size=BATCH, **options
    )


def costs(layers: str, rounds: int) -> dict:
    """Milliseconds of a step with each number of directions, taken in turn, and the ratio to one direction."""
    steps, folder = {}, Path(tempfile.mkdtemp())
    for m in DIRECTIONS:
        config = demo_run(directions=m, **LAYERS[layers])
        data = load_splits(config, load_tokenizer(config.model.base))["train"][:128]
        steps[m] = OurStep(HFRuntime(*config.for_runtime), config, data, folder / f"{m}.jsonl")
    seconds = {m: [] for m in DIRECTIONS}
    for number in range(rounds + 1):
        for m, step in steps.items():
            began = time.perf_counter()
            step()
            if number:  # the first one warms up
                seconds[m].append(time.perf_counter() - began)
    ratios = {m: [a / b for a, b in zip(seconds[m], seconds[1], strict=True)] for m in DIRECTIONS}
    return {
        "rounds": rounds,
        "milliseconds": {m: 1e3 * statistics.median(each) for m, each in seconds.items()},
        "ratio_to_one_direction": {m: statistics.median(each) for m, each in ratios.items()},
    }


def learnt(steps: int, seeds: int) -> Iterator[dict]:
    """Test figures after equally many steps: lr by the dev loss of one seed, then as many others."""
    config = demo_run(steps=steps, lr_schedule="cosine", directions=max(DIRECTIONS))
    runtime, splits = HFRuntime(*config.for_runtime), load_splits(config, load_tokenizer(config.model.base))
    runtime.prepare(splits)

    def run(m: int, lr: float, seed: int) -> dict:
        chosen = config.replace(directions=m, lr=lr, seed=seed, output_dir=f"{tempfile.mkdtemp()}/run")
        result = start(chosen, runtime, splits)
        dev = min(row["loss"] for row in _metrics(chosen) if row["split"] == "dev")
        return {"dev_loss": dev, **result["test"]["after"], "seconds": result["seconds_training"]}

    for m in DIRECTIONS:
        tried = {lr: run(m, lr, FIRST)["dev_loss"] for lr in RATES[m]}
        lr = min(tried, key=tried.__getitem__)
        runs = [run(m, lr, seed) for seed in range(FIRST + 1, FIRST + 1 + seeds)]
        yield {
            "directions": m,
            "lr": lr,
            "dev_loss_by_lr": tried,
            "rows_scored": 2 * BATCH * steps,
            **{name: _mean([each[name] for each in runs]) for name in ("accuracy", "auc", "loss", "seconds")},
        }


def _metrics(config: Config) -> list[dict]:
    lines = Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _mean(values: list[float]) -> dict:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "of": values}


def main() -> None:
    """Measure and write the JSON after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--steps", type=int, default=500, help="of a run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each number of directions; 0: costs alone")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each number of directions that are timed")
    options = parser.parse_args()
    found = {"machine": describe(), "batch": BATCH, "cost": {}, "learnt": []}
    for layers in LAYERS:
        found["cost"][layers] = costs(layers, options.rounds)
        options.output.write_text(json.dumps(found, indent=1))
    for row in learnt(options.steps, options.seeds) if options.seeds else ():
        found["learnt"].append(row)
        options.output.write_text(json.dumps(found, indent=1))
        print(json.dumps(row))


if __name__ == "__main__":
    main()

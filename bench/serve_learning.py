"""A task learnt while users are served: the curve of dev, versions, and each answer checked against its version.

`demo`: the demo's film reviews. `tp2`: the same on an engine of two tensor-parallel ranks; the model has a key head of
zeros more there, since its three cannot be divided by two. `reward`: Countdown's reward (examples/countdown.py) with a
population of directions, on a tiny model and two ranks. Meanwhile users ask for the base, the promoted version and
steps by number. Each answer is computed again by transformers and PEFT in this process, under the version that the
answer names, rebuilt from the log. At the end the log is replayed, and compared with the adapter that the engine left.

Run: make bench-serve-learning, or python bench/serve_learning.py --output bench/results/MACHINE/serve_learning.json
"""

import argparse
import copy
import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import countdown
import torch
from machine import describe
from serve import Server, arrivals
from transformers import AutoModelForCausalLM

from mezo.config import Config
from mezo.models.load import load_tokenizer
from mezo.models.parts import load_parts
from mezo.run import outcome
from mezo.run.directory import RunDirectory
from mezo.run.header import INITIAL, frozen_part
from mezo.run.replay import rebuild, theta_after
from mezo.run.trajectory import read_trajectory
from mezo.studies import assets, demo
from mezo_kernels import ParamLayout, perturb_

TOKENS = 6  # that a user is written
TOLERANCE = 1e-3  # of log-probabilities in float32, on another way through the layers
XS = {"tuning": "lora-xs", "r": 8, "lora_alpha": 8, "lora_a": "calibrated"}
LEARNING = {"batch_size": 64, "directions": 64, "lr": 0.5, "lr_schedule": "cosine"}
LEARNING |= {"num_train": 512, "num_dev": 200, "eval_test": False}


class Versions:
    """What each version answers, by transformers and PEFT.

    Args:
        run: directory of the run, which has ended.
    """

    def __init__(self, run: Path):
        self.run, config = run, RunDirectory(run).read_config()
        self.first_line, self.records = read_trajectory(run / "trajectory.jsonl")
        self.parts, _ = load_parts(config.model, torch.device("cpu"), torch.float32)
        frozen = frozen_part(self.first_line, run / INITIAL)
        for name, tensor in frozen.items():
            self.parts.attached.frozen[name].data.copy_(tensor)
        self.eps, self.kept = config.method.eps, {}

    def theta(self, version: str) -> dict[str, torch.Tensor]:
        """Of "mezo@STEP", or of "plus@STEP": a copy that the step after so many measured."""
        name, _, step = version.partition("@")
        theta = theta_after(self.first_line, self.run, self.records[: int(step)])
        if name == "plus":
            perturb_(ParamLayout(theta), self.eps, self.records[int(step)].update.seeds[0])
        return theta

    @torch.no_grad()
    def difference(self, version: str, ids: list[int], written: list[int], logprobs: list[float]) -> float:
        """Largest difference of log-probabilities from a version's; inf where a token was not the likeliest."""
        if version not in self.kept:
            start = {name: torch.zeros_like(p) for name, p in self.parts.params.items()}
            self.kept[version] = start if version == "base" else self.theta(version)
        for name, tensor in self.kept[version].items():
            if version == "base" and "lora_A" in name:
                continue  # the product is zero already
            self.parts.params[name].data.copy_(tensor)
        logits = self.parts.model(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = logits[range(len(written)), written]
        if (logits.max(-1).values - own).max() > TOLERANCE:
            return float("inf")
        return float((own - torch.tensor(logprobs)).abs().max())


def watched(server: Server, prompts: list[list[int]], rate: float, limit: float) -> tuple[list, list, list]:
    """Users until the training is over; their answers, what went wrong, and the state every two seconds."""
    rng, answers, faults, states = random.Random(0), [], [], []

    def user(adapter: str, ids: list[int]) -> None:
        body = {"input_ids": ids, "return_logprob": True}
        body |= {"sampling_params": {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True}}
        answer = server.ask("/generate", body | ({"lora_path": adapter} if adapter else {}))
        try:
            values = answer["meta_info"]["output_token_logprobs"]
            written, logprobs = [each[1] for each in values], [each[0] for each in values]
            answers.append((adapter, answer["meta_info"]["weight_version"], ids, written, logprobs))
        except (KeyError, TypeError):
            faults.append(str(answer)[:200])

    threads, began, at = [], time.monotonic(), iter(arrivals(rate, limit, 1))
    following, looked = next(at), 0.0
    while (now := time.monotonic() - began) < limit:
        if now - looked > 2 or not states:
            status, looked = server.ask("/mezo/status"), now
            states.append({"seconds": now, "step": status["step"], "promoted": status["promoted"]})
            if status["state"] != "training":
                break
        if now >= following:
            step = rng.randrange(0, states[-1]["step"] + 1)
            adapter = rng.choice(("", "mezo", "mezo", f"mezo@{step}"))
            threads.append(threading.Thread(target=user, args=(adapter, rng.choice(prompts))))
            threads[-1].start()
            following = next(at, limit)
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return answers, faults, states


def checked(run: Path, answers: list) -> dict:
    """How many answers are those of the version that they name, and whether a perturbed copy's would show."""
    versions, wrong, worst, perturbed = Versions(run), 0, 0.0, []
    for adapter, version, ids, written, logprobs in answers:
        named = {"": "base", "mezo": version}.get(adapter, adapter)
        difference = versions.difference(version, ids, written, logprobs)
        wrong += named != version or not difference <= TOLERANCE
        worst = max(worst, difference)
        if version != "base" and len(versions.records) > int(version[5:]):
            perturbed.append(versions.difference(f"plus@{version[5:]}", ids, written, logprobs))
    told = {"answers": len(answers), "wrong": wrong, "largest_difference": worst, "tolerance": TOLERANCE}
    told["answers_by_version"] = dict(Counter(version for _, version, *_ in answers))
    told["answers_a_perturbed_copy_would_fail"] = sum(d > TOLERANCE for d in perturbed)
    return told | {"answers_held_against_a_perturbed_copy": len(perturbed)}


def learnt(config: Config, prompts: list[list[int]], cost: float, rate: float, limit: float) -> dict:
    """Serve a run until it has ended, with users meanwhile, and check it."""
    run = Path(config.machine.output_dir)
    server = Server(config, cost)
    try:
        answers, faults, states = watched(server, prompts, rate, limit)
        status = server.ask("/mezo/status")
    finally:
        server.end()
    theta, first_line, steps = rebuild(run, until=str(status["promoted"]))
    same = outcome.difference(RunDirectory(run), first_line, theta) is None
    keys = ("batch_size", "num_perturbations", "directions", "lr", "eps", "temperature", "tp")
    options = {key: value for key, value in config.to_dict().items() if key in keys}
    return {
        "options": options | {"max_latency_cost": cost, "users_per_second": rate},
        "steps": status["step"],
        "seconds": states[-1]["seconds"],
        "dev": status["dev"],
        "promotions": status["promotions"],
        "over_time": states,
        "users_refused": faults,
        **checked(run, answers),
        "replay_of_promoted_step": steps,
        "replay_equals_adapter_bit_for_bit": same,
        "users": status["users"],
        "training": status["training"],
    }


def with_key_heads(base: str, heads: int, folder: Path) -> str:
    """A Llama model with key heads of zeros at the end, and their query heads: the same function of its inputs.

    The columns of o_proj for them are zero, so whatever they attend to is multiplied by zero.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config, weights = copy.deepcopy(model.config), model.state_dict()
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads, config.num_attention_heads = heads, heads * group
    rows = {"q_proj": heads * group * size, "k_proj": heads * size, "v_proj": heads * size}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in rows:
            weights[name] = torch.nn.functional.pad(weight, (0, 0, 0, rows[kind] - len(weight)))
        elif kind == "o_proj":
            weights[name] = torch.nn.functional.pad(weight, (0, rows["q_proj"] - weight.shape[1]))
    wider = type(model)(config)
    wider.load_state_dict(weights)
    wider.tie_weights()
    ids = torch.arange(config.vocab_size)[None, -32:]
    with torch.no_grad():
        difference = (wider(ids).logits - model(ids).logits).abs().max()
    if not difference <= TOLERANCE:
        raise SystemExit(f"the wider model is another one: its logits differ by {difference:.2g}")
    wider.save_pretrained(folder / "wider")
    load_tokenizer(base).save_pretrained(folder / "wider")
    return str(folder / "wider")


def demo_part(folder: Path, steps: int, **options) -> dict:
    """The demo's task, an adapter of 5 small matrices on the last layer."""
    config = demo.demo_config("it-was", steps, folder / "run")
    config = config.replace(runtime="sglang", eval_every=5, noise=False, report=False, **XS, **LEARNING, **options)
    tokenizer = load_tokenizer(config.model.base)
    rows = [json.loads(line) for line in Path(config.data.dev_file).read_text().splitlines()][:64]
    return learnt(config, [tokenizer(row["text"])["input_ids"] for row in rows], cost=1.0, rate=0.5, limit=390)


def tp2_part(folder: Path, steps: int) -> dict:
    """The demo's task on two ranks."""
    return demo_part(folder, steps, model=with_key_heads(str(assets.fetch_model()), 4, folder), tp=2)


def reward_part(folder: Path, steps: int) -> dict:
    """Two ranks, a reward, a population, sampled texts."""
    model = countdown.tiny_model(folder)
    data = countdown.example().write(folder, sizes={"train": 64, "dev": 32, "test": 16})
    options = countdown.TINY | {"steps": steps, "tp": 2, "eval_every": max(1, steps // 8), "eval_test": False}
    config = countdown.run_of(model, folder, data, **options)
    tokenizer = load_tokenizer(model)
    rows = [json.loads(line) for line in Path(data["dev_file"]).read_text().splitlines()]
    return learnt(config, [tokenizer(row["prompt"])["input_ids"] for row in rows], cost=1.0, rate=1.0, limit=390)


def main() -> None:
    """Measure and write the JSON after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write, or to add parts to")
    parser.add_argument("--parts", nargs="+", default=["demo", "tp2", "reward"])
    parser.add_argument("--steps", type=int, default=0, help="in place of 30, 30 and 40")
    args = parser.parse_args()
    parts = {"demo": (demo_part, 30), "tp2": (tp2_part, 30), "reward": (reward_part, 40)}
    found = json.loads(args.output.read_text()) if args.output.is_file() else {}
    for name in args.parts:
        part, steps = parts[name]
        with tempfile.TemporaryDirectory() as folder:
            found[name] = {"machine": describe()} | part(Path(folder), args.steps or steps)
        print(json.dumps({k: v for k, v in found[name].items() if k != "over_time"}), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

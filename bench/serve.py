"""What training costs the users of a server, and what users cost training: one server, training off and on in turn.

Run: make bench-serve, or python bench/serve.py --output bench/results/MACHINE/serve.json
"""

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from machine import describe

LOADS = (0.5, 2.0, 8.0)  # requests a second that come, at random moments (a Poisson process)
TOKENS = 8  # of an answer
ROUNDS, SECONDS = 2, 40.0  # of each load and state; they take turns
PROMPTS = ("the film was good It was", "a story It was", "the plot was awful and the acting was fine It was")
ROWS = {"train": 48, "dev": 20}


class Server:
    """`mezo serve` of a tiny model with random weights, or of one that is named, on a free port.

    Args:
        folder: for its run and its data.
        model: path or hub id; "" is the tiny one.
        cost: --max-latency-cost.
    """

    def __init__(self, folder: Path, model: str, cost: float):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.tiny_data import write_jsonl
        from tests.tiny_models import save

        self.model = model or save("llama", folder / "model", hidden_size=128, intermediate_size=512)
        files = [word for i, split in enumerate(ROWS) for word in (
            f"--{split}-file", write_jsonl(folder / f"{split}.jsonl", ROWS[split], i))]  # fmt: skip
        self.run, log = folder / "run", (folder / "log").open("w")
        method = [
            "--steps",
            "1000000",
            "--batch-size",
            "16",
            "--lr",
            "1e-4",
            "--eps",
            "1e-2",
            "--eval-every",
            "1000000",
        ]
        text = ["--prompt", "{text} It was", "--label-words", " terrible", " great", "--no-noise"]
        where = ["--output-dir", str(self.run), "--port", "0", "--max-latency-cost", str(cost)]
        command = [sys.executable, "-m", "mezo", "serve", "--model", self.model, *files, *text, *method, *where]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while not (self.run / "serve.json").exists():
            if self.process.poll() is not None:
                sys.exit((folder / "log").read_text())
            time.sleep(0.2)
        self.url = json.loads((self.run / "serve.json").read_text())["url"]

    def ask(self, path: str, body: dict | None = None) -> dict:
        """An answer of an endpoint."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def stream(self, prompt: str) -> tuple[float, float]:
        """(seconds to the first token, seconds to the last) of a streamed answer of the promoted version."""
        body = {"model": f"{self.model}:mezo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        body["ignore_eos"] = True
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=600)
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response, first = connection.getresponse(), 0.0
        while line := response.readline():
            if line.startswith(b"data: {") and not first:
                first = time.perf_counter() - began
        connection.close()
        assert response.status == 200
        return first, time.perf_counter() - began


def load(server: Server, rate: float, seconds: float, seed: int) -> dict:
    """Users come at random moments, whether others have been answered or not."""
    rng, answers, threads = random.Random(seed), [], []
    before, began = server.ask("/mezo/status"), time.perf_counter()
    ask = lambda prompt: answers.append(server.stream(prompt))  # noqa: E731
    comes = rng.expovariate(rate)
    while comes < seconds:
        time.sleep(max(0.0, began + comes - time.perf_counter()))
        threads.append(threading.Thread(target=ask, args=(rng.choice(PROMPTS),)))
        threads[-1].start()
        comes += rng.expovariate(rate)
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    after = server.ask("/mezo/status")
    parts = after["training"]["seconds"] - before["training"]["seconds"]
    return {
        "answers": answers,
        "seconds": took,
        "steps": after["step"] - before["step"],
        "training_tokens": after["training"]["tokens"]["steps"] - before["training"]["tokens"]["steps"],
        "seconds_training": parts,
    }


def summary(rounds: list[dict]) -> dict:
    """Figures of the rounds of one load and state."""
    answers = [answer for each in rounds for answer in each["answers"]]
    seconds = sum(each["seconds"] for each in rounds)
    total = lambda name: sum(each[name] for each in rounds)  # noqa: E731
    kinds = dict(zip(("ms_first_token", "ms_whole_answer"), zip(*answers, strict=True), strict=True))
    quantiles = lambda values: {f"p{p}": 1e3 * quantile(values, p / 100) for p in (50, 90, 99)}  # noqa: E731
    return {
        "requests": len(answers),
        "user_tokens_per_second": TOKENS * len(answers) / seconds,
        **{name: quantiles(values) for name, values in kinds.items()},
        "training_steps_per_second": total("steps") / seconds,
        "training_tokens_per_second": total("training_tokens") / seconds,
        "share_of_time_training": total("seconds_training") / seconds,
    }


def quantile(values: tuple[float, ...], share: float) -> float:
    """The smallest value that at least a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def measure(model: str, cost: float, loads: tuple[float, ...], rounds: int, seconds: float) -> dict:
    """Each load with training held back and not, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        server, found = Server(Path(folder), model, cost), {}
        try:
            for rate in loads:
                states: dict[str, list[dict]] = {"off": [], "on": []}
                for number in range(rounds):
                    for state, path in (("off", "/mezo/pause"), ("on", "/mezo/resume")):
                        server.ask(path, {})
                        time.sleep(1)
                        states[state].append(load(server, rate, seconds, number))
                row = {state: summary(each) for state, each in states.items()}
                ratio = lambda name, row=row: row["on"][name]["p99"] / row["off"][name]["p99"]  # noqa: E731
                row["p99_on_to_off"] = {name: ratio(f"ms_{name}") for name in ("first_token", "whole_answer")}
                found[f"{rate:g} requests/s"] = row
                print(json.dumps({rate: row}), flush=True)
            alone = load(server, 1e-9, seconds, 0)
            found["nobody"] = (
                {"training_steps_per_second": alone["steps"] / alone["seconds"]} if alone["seconds"] else {}
            )
            found["status"] = {key: server.ask("/mezo/status")[key] for key in ("users", "training")}
        finally:
            server.process.terminate()
            server.process.wait()
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="", help="a tiny one with random weights if it is left out")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sizes = (tuple(given.loads), given.rounds, given.seconds)
    begin = describe()
    found = {f"max_latency_cost {cost:g}": measure(given.model, cost, *sizes) for cost in given.costs}
    settings = {
        "model": given.model or "tiny llama",
        "rounds": given.rounds,
        "seconds": given.seconds,
        "tokens": TOKENS,
    }
    result = {"machine": begin, "load_at_the_end": os.getloadavg()[0], "settings": settings, "costs": found}
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What training costs users of `mezo serve`: their throughput and waits at three loads, training off and on.

One server, so the arguments of the engine are the same; training is off where it is paused. Users come at random times
(Poisson) whether or not earlier ones have been answered, and read a stream; the same ones in both rows of a load. Rates
are shares of what one user after another is served at. The first minutes with training let the server learn what users
wait for without it; they are a row of their own. Each --max-latency-cost is measured by a call of its own, which adds
to the JSON.

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
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from machine import describe

from mezo.config import Config
from mezo.serve.admission import percentile
from mezo.studies import demo

SHARES = (0.2, 0.4, 0.7)
STARTING, ANSWERING = 600.0, 120.0  # most seconds
ALONE = 8  # requests, one after another, that the rates follow from


class Server:
    """`mezo serve` as a process.

    Args:
        config: of the run, which must not end meanwhile.
        cost: --max-latency-cost.
    """

    def __init__(self, config: Config, cost: float):
        self.run, self.model = Path(config.machine.output_dir), config.model.base
        options = self.run.parent / "options.yaml"
        options.write_text(json.dumps(config.changes()))  # JSON is YAML
        command = [sys.executable, "-m", "mezo", "serve", "--config", str(options), "--port", "0"]
        self.process = subprocess.Popen([*command, "--max-latency-cost", str(cost)], stdout=sys.stderr)
        address, deadline = self.run / "serve.json", time.monotonic() + STARTING
        while not address.is_file():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise SystemExit("mezo serve did not start")
            time.sleep(0.2)
        where = urlsplit(json.loads(address.read_text())["url"])
        self.host, self.port = where.hostname, where.port

    def ask(self, path: str, body: dict | None = None) -> dict:
        """The answer of an endpoint."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWERING)
        sent = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, sent, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def stream(self, prompt: str, tokens: int) -> dict:
        """Seconds until the first token, and until the last, of a user's request."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWERING)
        body = {"model": f"{self.model}:mezo", "prompt": prompt, "max_tokens": tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer, first = connection.getresponse(), None
        for line in answer:
            if line.startswith(b"data: {") and first is None:
                first = time.perf_counter() - began
        whole = time.perf_counter() - began
        connection.close()
        if answer.status != 200 or first is None:
            raise RuntimeError(f"a request failed with status {answer.status}")
        return {"first": first, "whole": whole}

    def end(self) -> None:
        """End it as a service manager does."""
        self.process.terminate()
        self.process.wait(ANSWERING)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Random times, in seconds from the start, at which users come: `rate` a second on average."""
    rng, times = random.Random(seed), []
    at = rng.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += rng.expovariate(rate)
    return times


def load(server: Server, prompts: Sequence[str], rate: float, seconds: float, tokens: int, seed: int) -> dict:
    """What users saw, and what training did, under a load."""
    seen: list[dict] = []
    faults: list[str] = []

    def user(prompt: str) -> None:
        try:
            seen.append(server.stream(prompt, tokens))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            faults.append(str(error))

    times, threads = arrivals(rate, seconds, seed), []
    rng = random.Random(seed)
    before, began = server.ask("/mezo/status"), time.monotonic()
    for at in times:
        time.sleep(max(0.0, began + at - time.monotonic()))
        threads.append(threading.Thread(target=user, args=(rng.choice(prompts),)))
        threads[-1].start()
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    for thread in threads:
        thread.join()
    took, after = time.monotonic() - began, server.ask("/mezo/status")
    spent = {name: after["training"][name] - before["training"][name] for name in ("seconds", "seconds_held_back")}
    return {
        "rate": rate,
        "seconds": took,
        "requests": len(times),
        "failed": len(faults),
        "requests_per_second": len(seen) / took,
        "tokens_per_second": tokens * len(seen) / took,
        **{name: waits([each[name] for each in seen]) for name in ("first", "whole")},
        "steps_per_second": (after["step"] - before["step"]) / took,
        "training": spent,
        "seconds_of_a_part": after["training"]["seconds_of_a_part"],
        "load_average": os.getloadavg()[0],
    }


def waits(seconds: Sequence[float]) -> dict:
    """Percentiles of what users waited for, in seconds."""
    return {"n": len(seconds)} | {f"p{p}": percentile(seconds, p / 100) for p in (50, 90, 99) if seconds}


def verdicts(rows: Sequence[dict], cost: float) -> list[dict]:
    """Of each load, by how much training raised the 99th percentile of the first token, and whether that was held."""
    found = []
    for share in dict.fromkeys(row["share"] for row in rows if not row["warm_up"]):
        of_load = {row["training_on"]: row for row in rows if row["share"] == share and not row["warm_up"]}
        if len(of_load) == 2 and all(row["first"]["n"] for row in of_load.values()):
            on, off = (of_load[state]["first"] for state in (True, False))
            raised = on["p99"] / off["p99"] - 1
            others = {f"raised_p{p}": on[f"p{p}"] / off[f"p{p}"] - 1 for p in (90, 50)}
            found.append({"share": share, "raised_p99": raised, **others})
            found[-1] |= {"held": raised <= cost, "n": min(on["n"], off["n"])}
            found[-1] |= {"steps_per_second": of_load[True]["steps_per_second"]}
            on, off = (of_load[state]["tokens_per_second"] for state in (True, False))
            found[-1] |= {"users_throughput": on / off}
    return found


def measured(server: Server, prompts: Sequence[str], args: argparse.Namespace, keep) -> None:
    """Measure all rows; each is kept as soon as it is there."""
    server.ask("/mezo/pause", {})
    alone = [server.stream(prompts[i % len(prompts)], args.tokens)["whole"] for i in range(ALONE)]
    capacity = 1 / percentile(alone[1:], 0.5)
    server.ask("/mezo/resume", {})
    keep({"warm_up": True, "training_on": True, "share": SHARES[1]}, capacity * SHARES[1], args.warm_up, 0)
    for number, share in enumerate(SHARES, 1):
        for on in (False, True) if number % 2 else (True, False):  # neither is always the later one
            server.ask("/mezo/resume" if on else "/mezo/pause", {})
            keep({"warm_up": False, "training_on": on, "share": share}, capacity * share, args.seconds, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--seconds", type=float, default=120, help="of a row")
    parser.add_argument("--warm-up", type=float, default=120, help="seconds")
    parser.add_argument("--tokens", type=int, default=16, help="that a user is written")
    parser.add_argument("--max-latency-cost", type=float, default=0.1)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options in place of the demo's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = demo.demo_config("it-was", 10**7, Path(folder) / "run")
        # a rate at which theta stays where it is: what is measured is time
        unmeasured = {"eval_every": 10**7, "eval_test": False, "noise": False, "report": False}
        few = {"num_train": 64, "num_dev": 16, "batch_size": 8}
        # so few that all were read in the warm-up: every step after it finds its prompts in the cache
        config = config.replace(**{"runtime": "sglang", "lr": 1e-9, **few, **unmeasured, **args.options})
        rows = [json.loads(line) for line in Path(config.data.train_file).read_text().splitlines()]
        prompts = [row["text"] for row in rows[:64]]
        found = json.loads(args.output.read_text()) if args.output.is_file() else {}
        found.setdefault("by_cost", {})
        server, kept = Server(config, args.max_latency_cost), []

        def keep(row: dict, rate: float, seconds: float, seed: int) -> None:
            kept.append(row | load(server, prompts, rate, seconds, args.tokens, seed))
            print(json.dumps(kept[-1]), flush=True)
            told = {"machine": describe(), "model": Path(config.model.base).name, "tokens": args.tokens}
            told |= {"batch_size": config.method.batch_size, "num_train": config.data.num_train}
            told |= {"verdicts": verdicts(kept, args.max_latency_cost), "rows": kept}
            found["by_cost"][str(args.max_latency_cost)] = told
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")

        try:
            measured(server, prompts, args, keep)
        finally:
            server.end()


if __name__ == "__main__":
    main()

"""What training costs users of `mezo serve`: their throughput and waits at three loads, training off and on.

One server, so the arguments of the engine are the same; training is off where it is paused. It is paused in every other
block of some seconds, so that whatever else the machine does meets both alike; both blocks of a pair have the same
users, and the order within a pair changes from pair to pair. A pair in which other processes took part of a core is
measured again. Users come at random times (Poisson) whether or not earlier ones have been answered, and read a stream.
Rates are shares of what one user after another is served at. Before any user comes training reads each of its few
prompts once, so that what is measured are steps that find them in the engine's cache. The first minutes with training
and users let the server learn what users wait for without it; they are a row of their own. Each --max-latency-cost is
measured by a call of its own, which adds to the JSON; so may each load be.

Run: make bench-serve, or python bench/serve.py --output bench/results/MACHINE/serve.json
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from machine import describe

from mezo.config import Config
from mezo.serve.admission import percentile
from mezo.studies import demo

SHARES = (0.2, 0.4, 0.7)
STARTING, ANSWERING = 600.0, 120.0  # most seconds
ALONE = 8  # requests, one after another, that the rates follow from
SETTLING = 1.0  # seconds of a block whose users do not count: a part of the block before may still run
DRAWS = 1000  # of the bootstrap
DISTURBED = 0.1  # cores that other processes take: a pair of blocks with more is measured again


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


def busy(server: Server) -> tuple[float, float]:
    """CPU seconds of the whole machine so far, with what its host took, and those of the server and of this process."""
    whole = psutil.cpu_times()
    ours = [psutil.Process(), psutil.Process(server.process.pid)]
    spent = [process.cpu_times() for process in (*ours, *ours[1].children(recursive=True))]
    total = sum(whole) - whole.idle - whole.iowait - whole.guest - whole.guest_nice
    return total, sum(times.user + times.system for times in spent)


def block(server: Server, prompts: Sequence[str], rate: float, seconds: float, tokens: int, seed: int) -> dict:
    """What users saw, and what training did, in some seconds under a load."""
    seen: list[dict] = []
    faults: list[str] = []

    def user(prompt: str, counts: bool) -> None:
        try:
            wait = server.stream(prompt, tokens)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            faults.append(str(error))
        else:
            seen.append(wait | {"counts": counts})

    threads, rng = [], random.Random(seed)
    before, spent, began = server.ask("/mezo/status"), busy(server), time.monotonic()
    for at in arrivals(rate, seconds, seed):
        time.sleep(max(0.0, began + at - time.monotonic()))
        threads.append(threading.Thread(target=user, args=(rng.choice(prompts), at > SETTLING)))
        threads[-1].start()
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    for thread in threads:
        thread.join()
    took, (whole, ours), after = time.monotonic() - began, busy(server), server.ask("/mezo/status")
    others = (whole - spent[0] - ours + spent[1]) / took
    training = after["training"]["seconds"] - before["training"]["seconds"]
    told = {"seconds": took, "seen": seen, "failed": len(faults), "training_seconds": training}
    told["others"] = others
    told |= {"parts": after["training"]["parts"], "more": after["users"]["seconds_more_after_a_part"]["first_token"]}
    told["alone"] = after["users"]["seconds_waited"]["first_token"]["alone"]
    return told | {"steps": after["step"] - before["step"]}


def joined(blocks: Sequence[dict], tokens: int) -> dict:
    """What users saw, and what training did, in several blocks."""
    took, seen = sum(each["seconds"] for each in blocks), [wait for each in blocks for wait in each["seen"]]
    counted = [wait for wait in seen if wait["counts"]]
    return {
        "seconds": took,
        "requests": len(seen),
        "failed": sum(each["failed"] for each in blocks),
        "requests_per_second": len(seen) / took,
        "tokens_per_second": tokens * len(seen) / took,
        **{name: waits([each[name] for each in counted]) for name in ("first", "whole")},
        "first_seconds": [round(each["first"], 4) for each in counted],
        "steps_per_second": sum(each["steps"] for each in blocks) / took,
        "training_seconds": sum(each["training_seconds"] for each in blocks),
        "seconds_more_after_a_part": blocks[-1]["more"],
        "alone_by_the_server": blocks[-1]["alone"],
        "parts": blocks[-1]["parts"],
        "others_cores": max(each["others"] for each in blocks),
    }


def waits(seconds: Sequence[float]) -> dict:
    """Percentiles of what users waited for, in seconds."""
    return {"n": len(seconds)} | {f"p{p}": percentile(seconds, p / 100) for p in (50, 90, 99) if seconds}


def raised(on: Sequence[float], off: Sequence[float], p: float) -> dict:
    """By how much a percentile is larger with training, and an interval that holds it with 90 % (bootstrap)."""
    rng = random.Random(0)
    drawn = sorted(
        percentile(rng.choices(on, k=len(on)), p) / percentile(rng.choices(off, k=len(off)), p) - 1
        for _ in range(DRAWS)
    )
    by = percentile(on, p) / percentile(off, p) - 1
    return {"by": by, "from": percentile(drawn, 0.05), "to": percentile(drawn, 0.95)}


def verdict(row: dict, cost: float) -> dict:
    """By how much training raised what users of a load wait for, and whether the bound was held."""
    on, off = (row[state]["first_seconds"] for state in ("on", "off"))
    found = {"share": row["share"], "n": min(len(on), len(off))}
    found |= {f"raised_p{p}": raised(on, off, p / 100) for p in (99, 90, 50)}
    found["held"] = found["raised_p99"]["by"] <= cost
    found["users_throughput"] = row["on"]["tokens_per_second"] / row["off"]["tokens_per_second"]
    share = row["on"]["training_seconds"] / row["on"]["seconds"]
    return found | {"steps_per_second": row["on"]["steps_per_second"], "training_share_of_time": share}


def measured(server: Server, prompts: Sequence[str], args: argparse.Namespace, keep) -> None:
    """Measure all rows; each is kept as soon as it is there."""
    deadline = time.monotonic() + STARTING
    while server.ask("/mezo/status")["step"] < args.epoch:
        if time.monotonic() > deadline:
            raise SystemExit(f"training did not do {args.epoch} steps in {STARTING:.0f} s without users")
        time.sleep(0.5)
    server.ask("/mezo/pause", {})
    alone = [server.stream(prompts[i % len(prompts)], args.tokens)["whole"] for i in range(ALONE)]
    capacity = 1 / percentile(alone[1:], 0.5)
    server.ask("/mezo/resume", {})
    rate = capacity * SHARES[1]
    warm_up = block(server, prompts, rate, args.warm_up, args.tokens, 0)
    keep(
        {
            "warm_up": True,
            "share": SHARES[1],
            "before": list(args.shares),
            "rate": rate,
            "on": joined([warm_up], args.tokens),
        }
    )
    for number, share in enumerate(args.shares, 1):
        rate, blocks = capacity * share, {"off": [], "on": []}
        wanted, pair = max(1, round(args.users / rate / args.block)), 0
        while len(blocks["on"]) < wanted and pair < 2 * wanted:
            both = {}
            for state in ("off", "on") if pair % 2 else ("on", "off"):
                server.ask("/mezo/resume" if state == "on" else "/mezo/pause", {})
                both[state] = block(server, prompts, rate, args.block, args.tokens, 1000 * number + pair)
            pair += 1
            if max(each["others"] for each in both.values()) <= DISTURBED:
                for state, each in both.items():
                    blocks[state].append(each)
        if not blocks["on"]:
            raise SystemExit("other processes took part of a core in every block: measure on an idle machine")
        rows = {state: joined(of_state, args.tokens) for state, of_state in blocks.items()}
        server.ask("/mezo/pause", {})
        by_hand = server.ask("/mezo/promote", {"step": server.ask("/mezo/status")["step"]})
        more = {"promoted_by_hand": by_hand, "pairs_disturbed": pair - len(blocks["on"])}
        keep({"warm_up": False, "share": share, "rate": rate, **more, **rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where to write the JSON")
    parser.add_argument("--users", type=int, default=200, help="about so many without training, and with it, a load")
    parser.add_argument("--block", type=float, default=20, help="seconds")
    parser.add_argument("--warm-up", type=float, default=120, help="seconds")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of what the engine can serve: loads")
    parser.add_argument("--tokens", type=int, default=16, help="that a user is written")
    parser.add_argument("--max-latency-cost", type=float, default=0.1)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of options in place of the demo's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = demo.demo_config("it-was", 10**7, Path(folder) / "run")
        # a rate at which theta stays where it is: what is measured is time
        unmeasured = {"eval_every": 10**7, "eval_test": False, "noise": False, "report": False}
        few = {"num_train": 64, "num_dev": 16, "batch_size": 8}
        config = config.replace(**{"runtime": "sglang", "lr": 1e-9, **few, **unmeasured, **args.options})
        args.epoch = -(-config.data.num_train // config.method.batch_size)  # steps that read every prompt once
        rows = [json.loads(line) for line in Path(config.data.train_file).read_text().splitlines()]
        prompts = [row["text"] for row in rows[:64]]
        found = json.loads(args.output.read_text()) if args.output.is_file() else {}
        found.setdefault("by_cost", {})
        former = found["by_cost"].get(str(args.max_latency_cost), {"rows": []})["rows"]
        kept = [row for row in former if not set(row.get("before", [row["share"]])) <= set(args.shares)]
        server = Server(config, args.max_latency_cost)

        def keep(row: dict) -> None:
            kept.append(row | {"machine": describe()})
            told = {"model": Path(config.model.base).name, "tokens": args.tokens}
            told |= {"batch_size": config.method.batch_size, "num_train": config.data.num_train}
            told["verdicts"] = [verdict(row, args.max_latency_cost) for row in kept if not row["warm_up"]]
            print(json.dumps(told["verdicts"][-1:]), flush=True)
            told["rows"] = kept
            found["by_cost"][str(args.max_latency_cost)] = told
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")

        try:
            measured(server, prompts, args, keep)
        finally:
            server.end()


if __name__ == "__main__":
    main()

"""A run killed with SIGKILL at random moments and resumed each time ends like an uninterrupted one, bit for bit.

Run: python bench/crash_test.py --moments 30 --output bench/results/MACHINE/crash_test.json
"""

import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.tiny_models import save

SHARES = {"starting": 0.3, "stepping": 0.7}  # of the moments: before and after the first new line of the log
SECONDS_STEPPING = 0.6  # most time a process may step before it is killed


def command(model: str, data: Path, run: Path, steps: int) -> list[str]:
    """`mezo train` on a tiny Llama: one thread, weight decay, evaluations every 25 steps."""
    files = [f"--{split}-file={data / split}.jsonl" for split in ("train", "dev", "test")]
    options = (
        "--eps 1e-2 --lr 1e-2 --weight-decay 0.1 --batch-size 8 --layers-to-transform 2 --target-modules q_proj o_proj"
    )
    fixed = ["--model", model, *files, "--prompt", "{text} It was", "--label-words", " terrible", " great"]
    return [
        *mezo(),
        "train",
        *fixed,
        *options.split(),
        "--steps",
        str(steps),
        "--eval-every",
        "25",
        "--output-dir",
        str(run),
    ]


def mezo() -> list[str]:
    return [sys.executable, "-m", "mezo"]


def write_data(directory: Path) -> None:
    """Three small files of words that say good or bad."""
    rng = random.Random(0)
    for split, n in (("train", 48), ("dev", 20), ("test", 20)):
        words = (("bad", "awful", "poor"), ("good", "fine", "nice"))
        rows = [{"text": f"the film was {rng.choice(words[i % 2])}", "label": i % 2} for i in range(n)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    return subprocess.Popen(argv, env=environment, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at_random(process: subprocess.Popen, log: Path, rng: random.Random, startup: float) -> str:
    """Wait for a random moment of start-up or stepping and send SIGKILL; return which, or "finished"."""
    before = log.read_bytes().count(b"\n") if log.is_file() else 0
    began = time.monotonic()
    moment = rng.choices(list(SHARES), SHARES.values())[0]
    deadline = began + (rng.uniform(0, startup) if moment == "starting" else 120)
    while process.poll() is None and time.monotonic() < deadline:
        if moment == "stepping" and log.is_file() and log.read_bytes().count(b"\n") > max(before, 1):
            deadline = min(deadline, time.monotonic() + rng.uniform(0, SECONDS_STEPPING))
            moment = "stepping "
        time.sleep(0.001)
    if process.poll() is not None:
        return "finished"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return moment.strip()


def crash_test(moments: int, steps: int, seed: int, directory: Path) -> dict:
    """Run once in peace and once under fire; return what differed."""
    rng = random.Random(seed)
    model = save("llama", directory / "model")
    write_data(directory)
    whole, killed = directory / "whole", directory / "killed"
    began = time.monotonic()
    process = start(command(model, directory, whole, steps))
    while not (whole / "trajectory.jsonl").is_file():
        assert process.poll() is None, "the run does not start"
        time.sleep(0.01)
    startup = time.monotonic() - began
    assert process.wait() == 0
    first, kills, torn = command(model, directory, killed, steps), [], 0
    for _ in range(moments):
        resumable = (killed / "trajectory.jsonl").is_file()
        argv = [*mezo(), "train", "--resume", str(killed)] if resumable else first
        if not resumable and killed.exists():
            # killed while the directory was being made: nothing had been trained
            killed.rename(directory / f"unborn-{len(kills)}")
        kills.append(kill_at_random(start(argv), killed / "trajectory.jsonl", rng, startup))
        log = killed / "trajectory.jsonl"
        data = log.read_bytes() if log.is_file() else b""
        torn += len(data) - data.rfind(b"\n") - 1
        if kills[-1] == "finished":
            break
    final = [*mezo(), "train", "--resume", str(killed)] if (killed / "trajectory.jsonl").is_file() else first
    assert start(final).wait() == 0
    files = ("trajectory.jsonl", "adapter/adapter_model.safetensors")
    same = {name: (whole / name).read_bytes() == (killed / name).read_bytes() for name in files}
    log = (whole / "trajectory.jsonl").read_bytes()
    return {
        "moments": len(kills),
        "killed_while": {name: kills.count(name) for name in sorted(set(kills))},
        "steps": steps,
        "bytes_of_torn_lines": torn,
        "equal": same,
        "log_bytes": len(log),
        "log_bytes_compressed": len(gzip.compress(log)),
        "startup_seconds": round(startup, 2),
    }


def main() -> int:
    """Print (and write) the result; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=30, help="times the run is killed")
    parser.add_argument("--steps", type=int, default=4000, help="length of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = crash_test(options.moments, options.steps, options.seed, Path(directory))
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")
    return 0 if all(result["equal"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

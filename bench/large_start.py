"""The start of a run on millions of rows: seconds and peak memory of `mezo train` to the end of its tenth step.

Run: python bench/large_start.py --output bench/results/MACHINE/large_start.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
ROWS = 2_000_000


def write(path: Path, rows: int, words: list[str]) -> None:
    """Labelled texts of 4 to 24 words, one JSON object a line."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(rows):
            text = " ".join(draw.choices(words, k=draw.randint(4, 24)))
            file.write(f'{{"text": "{text}", "label": {i % 2}}}\n')


def measured(command: list[str], environment: dict) -> dict:
    """Wall seconds, CPU seconds and peak memory of a command, with the processes that it waits for."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, error.decode()[-3000:]
    return {"wall": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss << 10}


def main() -> None:
    """A first start, which converts the file once, a later one, and one on few rows: what the libraries take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.tiny_models import WORDS, save

    with tempfile.TemporaryDirectory() as folder:
        model = save("llama", Path(folder) / "model")
        words = [word for word in WORDS if word.isalpha()]
        files = {"first": options.rows, "later": options.rows, "200 rows": 200}
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT)}
        found = {"machine": describe(), "rows": options.rows, "starts": {}}
        for name, rows in files.items():
            path = Path(folder) / f"{rows}.jsonl"
            if not path.exists():
                write(path, rows, words)
            command = [sys.executable, "-m", "mezo", "train", "--model", model, "--train-file", str(path), "--steps"]
            command += ["10", "--prompt", "{text} It was", "--label-words", " terrible", " great", "--no-report"]
            command += ["--max-length", "64"]
            found["starts"][name] = measured([*command, "--output-dir", f"{folder}/{name}"], environment)
            found["starts"][name]["file_bytes"] = path.stat().st_size
            print(name, found["starts"][name], os.getloadavg()[0], flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

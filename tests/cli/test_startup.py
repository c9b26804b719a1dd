"""What a look at the help costs, no library of models, no torch; and what is said before they are imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["export", "--help"]])
def test_help_imports_no_heavy_library(argv):
    code = f"import sys\nfrom mezo.cli.main import main\ntry: main({argv})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "numpy"} & set(done.stdout.splitlines()[-1].split())


FIRST = """
import logging, os, sys

class Look(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), "torch" in sys.modules, flush=True)
        os._exit(0)

logging.getLogger("mezo").addHandler(Look())
from mezo.cli.main import main
main(sys.argv[1:])
"""
RUN = ["--model", "m", "--train-file", "t", "--output-dir", "o"]
COMMANDS = {
    "train": [["train", *RUN], ["train", "--resume", "r"], ["train", "--resume", "r", "--steps", "9"]],
    "adapter": [["train", *RUN[2:], "--adapter", "a"], ["tune", *RUN[2:], "--adapter", "a"]],
    "others": [["serve", *RUN], ["serve", "--resume", "r"], ["tune", *RUN], ["demo"], ["reproduce"]],
    "runs": [["eval", "r"], ["report", "r"], ["leaderboard", "r"], ["trajectory", "show", "r"]],
    "results": [["export", "r", "--output-dir", "o"], ["replay", "r", "--output-dir", "o"], ["verify"]],
    "push": [["push", "r", "--output-dir", "o"]],
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_first_line_comes_before_the_seconds_that_imports_take(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for argv in COMMANDS[kind]:
        command = [sys.executable, "-c", FIRST, *argv]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.stdout == "starting: importing torch and transformers False\n", (argv, done.stderr)

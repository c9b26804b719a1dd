"""The script for the day with a GPU: rehearsed on the CPU, and what runs on a bare image of torch and Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = """
import sys
MISSING = ("annotated_types", "datasets", "filelock", "gguf", "hypothesis", "matplotlib", "numba", "optuna", "peft",
           "pytest_benchmark", "rich", "sglang", "sklearn", "tensorboard", "tyro", "yaml")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "tests/kernels"]))
"""


def test_the_tests_of_the_kernels_can_be_collected_on_a_bare_image():
    """`make test-gpu` asks for torch, Triton, numpy and pytest."""
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "test_gpu.py" in run.stdout


def test_a_machine_without_a_gpu_is_told_to_rehearse():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "bench/gpu_day.py"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 2
    assert "--rehearse" in run.stderr


@pytest.mark.slow  # two minutes; its parts have tests of their own
def test_rehearsal(tmp_path):
    """Every part goes well and writes its result; what went well is not run again."""
    command = [sys.executable, "bench/gpu_day.py", "--rehearse", "--output-dir", tmp_path]
    seen = []
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr[-3000:]
        seen.append({path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 7
    assert all(part["ok"] and part["rehearsal"] for part in seen[0].values())

"""Two real processes under torchrun that step as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    script = str(Path(__file__).with_name("steps_of_a_rank.py"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run(command, env=environment, check=True, timeout=120)
    return torch.load(path)


@pytest.mark.parametrize("way", ["plain", "conservative", "guided", "wrapped"])
def test_ranks_hold_one_theta(found, way):
    assert torch.equal(*found[way])


def test_a_wrapper_changes_nothing(found):
    assert torch.equal(found["plain"][0], found["wrapped"][0])


def test_averaging_can_be_turned_off(found):
    assert not torch.equal(*found["apart"])


@pytest.mark.parametrize("what", ["parameters", "eps"])
def test_ranks_that_differ_are_refused(found, what):
    assert f"rank 1 has other {what} than rank 0" in found[f"other {what}"]

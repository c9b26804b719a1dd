"""One engine over two machines, here processes that meet at an address: the first trains, the second serves."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mezo.cli.main import main
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from tests.tiny_data import flags_of, write_jsonl

STEPS = 6
ENGINE = {"runtime": "sglang", "tp": 2}
ROUNDING = 5e-5


@pytest.fixture
def options(tmp_path, model, own_engine):
    """Command line of a run, by its directory."""
    data = write_jsonl(tmp_path / "train.jsonl", 24, 0)
    own = {"model": model("llama"), "train_file": data, "prompt": "{text} It was", "lr": 1e-4, "eps": 1e-2,
           "label_words": (" terrible", " great"), "steps": STEPS, "batch_size": 4, "verify_every": 1,
           "target_modules": ("q_proj", "v_proj", "down_proj")}  # fmt: skip
    return lambda name, **others: flags_of({**own, "output_dir": tmp_path / name, **others})


def start(flags, *engine):
    extra = ["--engine-arg", *engine] if engine else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "mezo", "train", *flags, *extra]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def machines(flags):
    """(first, second)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"dist_init_addr=127.0.0.1:{free.getsockname()[1]}"
    return [start(flags, "nnodes=2", f"node-rank={node}", address) for node in (0, 1)]


@pytest.mark.slow  # test_versions.py: what is refused; test_parallel.py: ranks of one machine
def test_two_machines_train_as_one_process_does(options, tmp_path):
    before = set(Path(tempfile.gettempdir()).glob("mezo-placeholder-*"))
    first, second = machines(options("two", **ENGINE))
    output = [process.communicate(timeout=300) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), output
    assert main(["train", *options("one")]) == 0
    two, one = (read_trajectory(tmp_path / name / "trajectory.jsonl")[1] for name in ("two", "one"))
    assert len(two) == STEPS
    losses = [[x for r in records for x in r.losses.plus + r.losses.minus] for records in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=ROUNDING)
    theta = rebuild(tmp_path / "two")[0]
    assert same_bits(theta, read_adapter(tmp_path / "two" / "adapter")) is None
    assert set(Path(tempfile.gettempdir()).glob("mezo-placeholder-*")) <= before


@pytest.mark.slow  # test_parallel.py: a dead rank is noticed; test_runs.py: a killed worker ends the run
def test_a_machine_that_dies_ends_the_run_on_the_other(options, tmp_path):
    """The second one is killed once steps are logged; the first says so, and its log is whole."""
    first, second = machines(options("lost", **ENGINE, steps=100000))
    log = tmp_path / "lost" / "trajectory.jsonl"
    for _ in range(2000):
        if log.is_file() and log.read_bytes().count(b"\n") > 2:
            break
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(timeout=0.1)
    os.kill(second.pid, signal.SIGKILL)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "the SGLang engine" in errors
    assert "resume the run" in errors
    assert len(read_trajectory(log)[1]) >= 2

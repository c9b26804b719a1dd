"""Data parallelism by scalars: real processes on gloo, equal to one process, stopped by a rank that differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mezo.api import _started_here, train
from mezo.run.adapter import WEIGHTS
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_trajectory

SUMS = 1e-6  # float32 forward passes of other batch shapes; the sums over ranks are float64


def torchrun(config, ranks, as_flags, before="", restarts=0):
    """Run `mezo train` in several processes; `before` is Python code each of them runs first."""
    script = Path(config.machine.output_dir).with_suffix(".py")
    script.write_text(f"import sys\n{before}\nfrom mezo.cli.main import main\nsys.exit(main())\n")
    launch = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launch,
        str(script),
        "train",
        *as_flags(config.changes()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def outcome(directory):
    records = read_trajectory(Path(directory) / "trajectory.jsonl")[1]
    return records, load_file(Path(directory) / "adapter" / WEIGHTS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharing_the_batch_equals_one_process_to_summation_order(tiny_config, tmp_path, as_flags, ranks):
    one = tiny_config.replace(steps=12, eval_every=6)
    several = one.replace(output_dir=str(tmp_path / "several"))
    train(one)
    done = torchrun(several, ranks, as_flags)
    assert done.returncode == 0, done.stderr
    for a, b in zip(outcome(one.machine.output_dir)[0], outcome(several.machine.output_dir)[0], strict=True):
        assert b.update.seeds == a.update.seeds
        assert b.losses.plus == pytest.approx(a.losses.plus, abs=SUMS)
    result = json.loads((Path(several.machine.output_dir) / "result.json").read_text())
    assert result["ranks"] == ranks
    # three float64 numbers a rank each step, and two where theta is compared: a hash, and whether to stop
    assert 3 * 8 * ranks <= result["bytes_exchanged_per_step"] <= 5 * 8 * ranks


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"update_rule": "adam", "weight_decay": 0.5},
        {"update_rule": "fzoo", "lr": 1e-4},
        {"update_rule": "momentum", "normalise_z": True, "lr": 1e-3},
    ],
    ids=lambda rule: rule.get("update_rule", "sgd"),
)
def test_sharing_perturbations_equals_one_process_bit_for_bit(rule, tiny_config, tmp_path, as_flags):
    options = {"num_perturbations": 3, "parallel": "perturbations", "verify_every": 3, **rule}
    one = tiny_config.replace(steps=12, eval_every=6, **options)
    several = one.replace(output_dir=str(tmp_path / "several"))
    train(one)
    done = torchrun(several, 2, as_flags)
    assert done.returncode == 0, done.stderr
    (records, adapter), (again, same) = outcome(one.machine.output_dir), outcome(several.machine.output_dir)
    assert again == records
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)


def test_a_rank_whose_theta_differs_stops_the_run_by_name(tiny_config, as_flags):
    flip = """
import os, torch
from mezo.runtimes.hf.runtime import HFRuntime
load = HFRuntime.load
def wrong(self, theta):
    load(self, theta)
    if os.environ["RANK"] == "1":
        self.master.tensors[0].view(torch.int32)[0, 0] ^= 1
HFRuntime.load = wrong
"""
    done = torchrun(tiny_config.replace(steps=12, verify_every=3), 2, as_flags, before=flip)
    assert done.returncode != 0
    assert "step 3: theta of rank 1 differs from that of rank 0" in done.stderr


def test_a_killed_rank_is_restarted_and_the_log_carries_on(tiny_config, tmp_path, as_flags):
    """SIGKILL to rank 1 in step 7: torchrun starts all ranks again and they replay the log."""
    kill = """
import os, signal
from mezo.training.measurement import Measurement
record = Measurement.record
def die(self, step, *rest):
    if step.number == 7 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return record(self, step, *rest)
Measurement.record = die
"""
    options = {"steps": 12, "eval_every": 6, "num_perturbations": 2, "parallel": "perturbations"}
    one = tiny_config.replace(**options)
    several = one.replace(output_dir=str(tmp_path / "several"))
    train(one)
    done = torchrun(several, 2, as_flags, before=kill, restarts=1)
    assert done.returncode == 0, done.stderr
    (records, adapter), (again, same) = outcome(one.machine.output_dir), outcome(several.machine.output_dir)
    assert again == records
    assert all(torch.equal(adapter[name], same[name]) for name in adapter)


def test_more_ranks_than_work_are_refused(tiny_config, as_flags):
    done = torchrun(tiny_config.replace(parallel="perturbations"), 2, as_flags)
    assert "--num-perturbations 1 cannot be shared by 2 ranks" in done.stderr
    assert not Path(tiny_config.machine.output_dir).exists()


def test_a_restart_never_continues_a_run_of_another_launch(tiny_config, as_flags):
    """The directory is there before the launch: it is refused, also by the second attempt of an elastic restart."""
    train(tiny_config.replace(steps=5))
    before = (Path(tiny_config.machine.output_dir) / "trajectory.jsonl").read_bytes()
    done = torchrun(tiny_config.replace(steps=5), 2, as_flags, restarts=1)
    assert done.returncode != 0
    assert done.stderr.count("exists and is never overwritten") >= 2
    assert (Path(tiny_config.machine.output_dir) / "trajectory.jsonl").read_bytes() == before


@pytest.mark.parametrize(("name", "known"), [("a1b2", True), ("none", False), ("", False)])
def test_a_launch_without_a_name_of_its_own_is_nobodys(tiny_config, monkeypatch, name, known):
    """torchrun calls every launch "none" that meets at a given address."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    train(tiny_config.replace(steps=2), until=1)
    config = RunDirectory(Path(tiny_config.machine.output_dir)).read_config()
    assert _started_here(config) is known

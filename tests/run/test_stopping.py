"""Runs that end before their last step: when dev no longer improves, when the loss runs away, when told to pause."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mezo.api import resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import RunError, UserError
from mezo.method.estimator import Losses
from mezo.method.step import Update
from mezo.run import stopping
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.replay import rebuild
from mezo.run.stopping import loss_ratio
from mezo.run.trajectory import StepRecord, read_trajectory
from tests.tiny_models import LAST_LAYER


def log_of(directory):
    return Path(directory, "trajectory.jsonl").read_bytes()


def dev(directory):
    rows = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["is_best"]) for row in rows if row["split"] == "dev"]


@pytest.fixture
def stalling(tiny_config):
    """A run whose dev accuracy cannot improve after its start for long: the smallest of steps, evaluated often."""
    return tiny_config.replace(lr=1e-12, eval_every=4, early_stopping=3, best_metric="accuracy")


def test_a_run_ends_when_dev_has_not_improved(stalling, tmp_path):
    result = train(stalling)
    assert result["steps"] == 12
    assert result["stopped_early"]
    assert result["best_step"] == 0
    assert dev(stalling.machine.output_dir) == [(0, True), (4, False), (8, False), (12, False)]
    whole = stalling.replace(early_stopping=0, output_dir=str(tmp_path / "whole"))
    assert not train(whole)["stopped_early"]
    assert log_of(whole.machine.output_dir).startswith(log_of(stalling.machine.output_dir))
    assert resume(stalling.machine.output_dir)["checked_steps"] == 0


@pytest.mark.parametrize("kept", [5, 11, 12])
def test_a_crash_does_not_move_the_end(stalling, tmp_path, kept):
    """Killed before the end, or after the last step but before its evaluation, it ends where it would have."""
    train(stalling)
    copy = tmp_path / "copy"
    shutil.copytree(stalling.machine.output_dir, copy)
    (copy / "result.json").unlink()
    (copy / "trajectory.jsonl").write_bytes(b"".join(log_of(copy).splitlines(keepends=True)[: kept + 1]))
    rows = [row for row in RunDirectory(copy).read_metrics() if row["step"] < kept]
    rows = [row for i, row in enumerate(rows) if row["split"] != "test" or i == 0]
    RunDirectory(copy).write_metrics(rows)
    again = resume(str(copy))
    assert (again["steps"], again["stopped_early"]) == (12, True)
    assert log_of(copy) == log_of(stalling.machine.output_dir)
    assert dev(copy) == dev(stalling.machine.output_dir)


def test_a_run_that_ended_early_goes_on_when_asked_to(stalling, tmp_path):
    whole = stalling.replace(early_stopping=0, output_dir=str(tmp_path / "whole"))
    train(whole)
    train(stalling)
    assert main(["train", "--resume", stalling.machine.output_dir, "--early-stopping", "0"]) == 0
    assert log_of(stalling.machine.output_dir) == log_of(whole.machine.output_dir)
    result = RunDirectory(Path(stalling.machine.output_dir)).read_result()
    assert (result["steps"], result["stopped_early"]) == (40, False)


def test_patience_given_at_resume_ends_the_run_for_good(stalling, tmp_path):
    """It is not in config.json: a later call without options checks a finished run, as ever."""
    config = stalling.replace(early_stopping=0)
    train(config, until=4)
    ended = resume(config.machine.output_dir, machine={"early_stopping": 3})
    assert (ended["steps"], ended["stopped_early"]) == (12, True)
    assert resume(config.machine.output_dir)["checked_steps"] == 0
    assert resume(config.machine.output_dir, machine={"early_stopping": 0})["steps"] == 40


def test_a_run_that_cannot_go_on_keeps_its_result(stalling, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_bytes(Path(stalling.data.train_file).read_bytes())
    config = stalling.replace(train_file=str(data))
    train(config)
    files = [Path(config.machine.output_dir, name) for name in ("result.json", "metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    data.write_text(data.read_text().replace("film", "plot"))
    with pytest.raises(UserError, match="data_hash of the log"):
        resume(config.machine.output_dir, machine={"early_stopping": 0})
    data.unlink()
    with pytest.raises(UserError, match="no such file"):
        resume(config.machine.output_dir, machine={"early_stopping": 0})
    assert [path.read_bytes() for path in files] == before


def test_an_improvement_starts_the_count_again(tiny_config):
    """Only the evaluations after the best count; the run that learns is not ended."""
    config = tiny_config.replace(lr=5e-2, eval_every=4, early_stopping=5)
    result = train(config)
    if result["stopped_early"]:
        assert result["steps"] == result["best_step"] + 5 * 4
    else:
        assert result["best_step"] > 40 - 5 * 4


def test_early_stopping_needs_a_dev_set(tiny_config):
    with pytest.raises(UserError, match="--early-stopping 2 needs a dev set: give --dev-file"):
        train(tiny_config.replace(dev_file="", early_stopping=2))
    assert not Path(tiny_config.machine.output_dir).exists()


def record(step, loss, skipped=False):
    update = Update((1,), (0.0,), skipped=skipped)
    return StepRecord(step, update, Losses((loss,), (loss,)), (0.0,))


def test_the_ratio_is_of_the_last_whole_window_to_the_first():
    rising = [record(step, 1.0 if step < 100 else 3.0) for step in range(299)]
    assert loss_ratio(rising) == 3
    assert loss_ratio(rising[:199]) is None
    assert loss_ratio([*rising[:250], *(record(step, 100.0) for step in range(250, 299))]) == 3
    broken = [record(step, float("nan"), skipped=True) for step in range(200, 220)]
    assert loss_ratio([*rising[:200], *broken, *(record(step, 5.0) for step in range(220, 300))]) == 5
    assert loss_ratio([record(step, -0.5) for step in range(200)]) is None


@pytest.fixture
def diverging(tiny_config, tmp_path, monkeypatch):
    """A good adapter, and steps that grow far too long; looked at in short windows."""
    monkeypatch.setattr(stopping, "WINDOW", 5)
    monkeypatch.setattr("mezo.training.trainer.WINDOW", 5)
    monkeypatch.setattr("mezo.training.trainer.WARNED", 1.5)
    modules = {"target_modules": LAST_LAYER["llama"]}
    good = tiny_config.replace(steps=300, batch_size=16, eval_every=50, output_dir=str(tmp_path / "good"), **modules)
    train(good)
    start = {"adapter": good.machine.output_dir + "/adapter", "lr": 0.3, "warmup_steps": 12, "steps": 20}
    return tiny_config.replace(max_loss_ratio=1.5, **modules, **start)


@pytest.mark.parametrize("with_dev", [True, False])
def test_a_loss_that_runs_away_ends_the_run_and_keeps_what_there_is(diverging, capsys, with_dev):
    config = diverging if with_dev else diverging.replace(dev_file="")
    with pytest.raises(
        RunError, match=r"step \d+: the mean loss of 5 steps is .* above --max-loss-ratio 1.5: lower --lr"
    ):
        train(config)
    _, records = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))
    done = len(records)
    assert done % 5 == 0
    assert loss_ratio(records) > 1.5
    assert all(loss_ratio(records[:n]) is None or loss_ratio(records[:n]) <= 1.5 for n in range(done))
    theta, _, _ = rebuild(config.machine.output_dir, until="best" if with_dev else "last")
    assert same_bits(theta, read_adapter(Path(config.machine.output_dir, "adapter"))) is None
    assert main(["train", "--resume", config.machine.output_dir]) == 1
    assert len(read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]) == done
    assert main(["train", "--resume", config.machine.output_dir, "--max-loss-ratio", "0"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "times that of the first 5: lower --lr; --max-loss-ratio ends such a run" in shown


@pytest.mark.parametrize("ratio", [1.0, 0.5, -1.0, float("nan"), float("inf")])
def test_ratios_that_cannot_be_are_refused(ratio):
    with pytest.raises(UserError, match="--max-loss-ratio must be "):
        Config.of(model="m", output_dir="o", task="sst2", max_loss_ratio=ratio)


def test_a_paused_run_goes_on_to_the_same_end(tiny_config, tmp_path):
    whole = tiny_config.replace(output_dir=str(tmp_path / "whole"))
    result = train(whole)
    assert train(tiny_config, until=10) is None
    assert len(read_trajectory(Path(tiny_config.machine.output_dir, "trajectory.jsonl"))[1]) == 10
    assert resume(tiny_config.machine.output_dir, until=25) is None
    assert resume(tiny_config.machine.output_dir, until=25) is None
    assert len(read_trajectory(Path(tiny_config.machine.output_dir, "trajectory.jsonl"))[1]) == 25
    assert resume(tiny_config.machine.output_dir)["test"] == result["test"]
    assert log_of(tiny_config.machine.output_dir) == log_of(whole.machine.output_dir)
    adapters = [read_adapter(Path(c.machine.output_dir, "adapter")) for c in (tiny_config, whole)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])

"""A run, finished or not, that is given more steps goes on as one that had them from the start."""

import json
import shutil

import pytest

from mezo.api import replay, resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.run import logbook
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from tests.log_by_formula import follows


@pytest.fixture
def run(tiny_options, tmp_path):
    """Make a run of some steps; returns its directory."""

    def made(name, steps, until=None, **others):
        path = tmp_path / name
        train(Config.of(**{**tiny_options, **others, "steps": steps, "output_dir": str(path)}), until)
        return path

    return made


def lines(path):
    return (path / "trajectory.jsonl").read_bytes().splitlines()


def test_a_lengthened_run_is_the_long_one_to_the_bit(run, tmp_path):
    short, long = run("short", 20), run("long", 40)
    result = resume(str(short), machine={"steps": 30})
    assert result["steps"] == 30
    result = resume(str(short), machine={"steps": 40})
    assert lines(short)[1:] == lines(long)[1:]
    chain = [{"at": 20, "from": 20, "to": 30}, {"at": 30, "from": 30, "to": 40}]
    first = read_trajectory(short / "trajectory.jsonl")[0]
    assert first == {**read_trajectory(long / "trajectory.jsonl")[0], "lengthened": chain}
    whole = json.loads((long / "result.json").read_text())
    assert result["test"] == whole["test"]
    assert [row["step"] for row in result["dev"]] == [row["step"] for row in whole["dev"]]
    assert same_bits(read_adapter(short / "adapter"), read_adapter(long / "adapter")) is None
    assert replay(str(short), str(tmp_path / "again"), until="last") == 40
    assert same_bits(rebuild(short, "last")[0], rebuild(long, "last")[0]) is None
    assert logbook.verify(str(short)) == follows(short) == 40
    assert logbook.summary(str(short))["lengthened"] == "from 20 to 30 steps after 20, from 30 to 40 steps after 30"
    assert resume(str(short))["checked_steps"] == result["best_step"], "it is finished, and its steps are its own"


def test_a_stopped_run_can_be_lengthened_and_cut_back(run):
    path, long = run("stopped", 20, until=15), run("long", 40)
    resume(str(path), machine={"steps": 40})
    assert lines(path)[1:] == lines(long)[1:]
    logbook.truncate(str(path), 10)
    assert read_trajectory(path / "trajectory.jsonl")[0]["lengthened"] == [{"at": 10, "from": 20, "to": 40}]
    resume(str(path))
    assert lines(path)[1:] == lines(long)[1:]


def test_the_rest_of_a_schedule_is_that_of_the_longer_run(run, caplog):
    """lr had come near 0; it goes on where a run of 40 would be, and the log of both parts can be verified."""
    path = run("linear", 20, lr_schedule="linear")
    with caplog.at_level("INFO"):
        resume(str(path), machine={"steps": 40})
    assert "the 20 steps done had the learning rates of a run of 20, the rest have those of one of 40" in caplog.text
    assert logbook.verify(str(path)) == 40
    logbook.truncate(str(path), 10)
    resume(str(path))
    assert logbook.verify(str(path)) == 40


def test_evaluations_keep_their_distance(run):
    path = run("auto", 20, eval_every=0)
    resume(str(path), machine={"steps": 24})
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "dev"] == list(range(0, 26, 2))


def test_a_crash_between_header_and_configuration_is_mended(run, tmp_path):
    path = run("crashed", 20)
    config = (path / "config.json").read_text()
    resume(str(path), machine={"steps": 30}, until=20)
    (path / "config.json").write_text(config)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    resume(str(copy), machine={"steps": 40})
    assert read_trajectory(copy / "trajectory.jsonl")[0]["lengthened"] == [{"at": 20, "from": 20, "to": 40}]
    assert logbook.verify(str(copy)) == 40


def test_a_run_that_ended_early_needs_more_patience_too(run):
    path = run("stalled", 40, early_stopping=1, lr=1e-12)
    assert json.loads((path / "result.json").read_text())["stopped_early"]
    with pytest.raises(UserError, match=r"--steps 60: dev did not improve for 1 evaluations.*--early-stopping 0"):
        resume(str(path), machine={"steps": 60})
    assert resume(str(path), machine={"steps": 60, "early_stopping": 0})["steps"] == 60

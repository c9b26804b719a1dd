"""`--report-to`: curves on TensorBoard, W&B and Trackio, without an account or a network."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from mezo.api import train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.report.dashboards import check
from tests.tiny_data import flags_of

ROOT = Path(__file__).parents[2]
RUN = {"steps": 20, "eval_every": 10, "noise": False}


def run_apart(options, **environment):
    """`mezo train` in a process of its own: these libraries read the environment when they are imported."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "mezo", "train", *flags_of(options)]
    return subprocess.run(command, env=known, capture_output=True, text=True, check=False)


def test_none_writes_no_curves_and_the_log_is_the_same(tiny_options):
    logs = []
    for name in ("none", "tensorboard"):
        out = Path(f"{tiny_options['output_dir']}-{name}")
        train(Config.of(**{**tiny_options, **RUN, "output_dir": str(out), "report_to": name}))
        logs.append((out / "trajectory.jsonl").read_bytes())
        assert (out / "tensorboard").exists() == (name == "tensorboard")
    assert logs[0] == logs[1]


def test_what_cannot_be_is_one_line_and_nothing_is_written(tiny_options, as_flags, monkeypatch, capsys):
    for name, message in (
        ("tensorbord", "--report-to must be some of tensorboard, wandb, trackio with commas between, or none; got"),
        ("none,wandb", "--report-to must be some of"),
    ):
        assert main(["train", *as_flags({**tiny_options, "report_to": name})]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", *as_flags({**tiny_options, "report_to": "tensorboard,trackio"})]) == 2
    error = capsys.readouterr().err
    assert "tensorboard is not installed: pip install tensorboard, or leave it out" in error
    assert len(error.strip().splitlines()) == 1
    assert not Path(tiny_options["output_dir"]).exists()


def test_wandb_without_an_account(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match=r"no account of W&B is known here: run wandb login, or set WANDB_MODE=offline"):
        check("wandb")


def test_wandb_writes_files_offline(tiny_options):
    pytest.importorskip("wandb")
    done = run_apart({**tiny_options, **RUN, "report_to": "wandb,tensorboard"}, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert "wandb sync" not in done.stdout
    run = Path(tiny_options["output_dir"])
    assert (run / "tensorboard").is_dir()
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    names, steps = curves(file)
    assert {"train/loss", "dev/accuracy", "dev/loss", "test/accuracy"} <= names
    assert {0, 10, 20} <= steps


def curves(file):
    """Names and steps of the points in a file of W&B."""
    from wandb.proto import wandb_internal_pb2

    names, steps = set(), set()
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            names.add(name)
            steps |= {json.loads(item.value_json)} if name == "step" else set()
    return names, steps


def records(data, block=32_768):
    """The records of a file of W&B, LevelDB's log after 7 bytes: in blocks, each part with checksum, length, kind."""
    at, parts = 7, []
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_trackio_fills_its_database(tiny_options, tmp_path):
    pytest.importorskip("trackio")
    done = run_apart({**tiny_options, **RUN, "report_to": "trackio"}, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    assert "Trackio" not in done.stdout
    (file,) = (tmp_path / "trackio").glob("mezo*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    names = {name for _, metrics in rows for name in json.loads(metrics)}
    assert {"train/loss", "dev/accuracy", "dev/loss", "test/accuracy"} <= names
    assert {0, 10, 20} <= {step for step, _ in rows}

"""What a machine can do to a run: a full disk, a place that cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mezo.api import replay, resume, train
from mezo.errors import UserError
from mezo.run import logbook
from mezo.run.trajectory import read_trajectory

LIMIT = 12_000  # bytes a file may have: more than an adapter, a little more than half of the log of 80 steps


def test_a_full_disk_loses_nothing_that_was_logged(tiny_config, tmp_path, as_flags):
    """A limit on the size of files stands for the disk: the write that crosses it is cut short, as on a full one."""
    config = tiny_config.replace(steps=80)
    train(config.replace(output_dir=str(tmp_path / "whole")))
    changed = config.changes()
    limited = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mezo.report import monitor\nmonitor.LOG_EVERY = 10**9\n"
        f"from mezo.cli.main import main\nresource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, -1))\nsys.exit(main())\n"
    )
    command = [sys.executable, "-c", limited, "train", *as_flags(changed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "the log could not be written" in done.stderr
    log = Path(tiny_config.machine.output_dir) / "trajectory.jsonl"
    assert log.read_bytes().endswith(b"}\n")
    assert 10 < len(read_trajectory(log)[1]) < 80
    resume(tiny_config.machine.output_dir)
    assert log.read_bytes() == (tmp_path / "whole" / "trajectory.jsonl").read_bytes()


def test_a_place_that_cannot_be_written_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config.replace(output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="cannot be created: Not a directory; choose another"):
        train(config)


def as_ordinary_user(argv):
    """The command without root's licence to write everywhere."""
    return argv if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *argv]


def at_once(*commands):
    """What the commands, run beside each other by an ordinary user, ended with."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(as_ordinary_user(argv), env=environment, **pipes) for argv in commands]
    output = [process.communicate(timeout=120) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, *own) for p, own in zip(started, output, strict=True)]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root, and no setpriv to drop its rights")
def test_a_read_only_directory_is_refused_and_a_read_only_run_loses_nothing(tiny_config, tmp_path, as_flags):
    places = {"parent": tmp_path / "parent", "run": tmp_path / "run"}
    places["parent"].mkdir()
    train(tiny_config.replace(steps=4, output_dir=str(places["run"])))
    (places["run"] / "result.json").unlink()
    log = (places["run"] / "trajectory.jsonl").read_bytes()
    for place in places.values():
        place.chmod(0o555)
    changed = tiny_config.changes() | {"output_dir": str(places["parent"] / "run")}
    mezo = [sys.executable, "-m", "mezo", "train"]
    new, old = at_once([*mezo, *as_flags(changed)], [*mezo, "--resume", str(places["run"])])
    for place in places.values():
        place.chmod(0o755)
    assert new.returncode == 2, new.stderr
    assert "cannot be created: Permission denied; choose another" in new.stderr
    assert not list(places["parent"].iterdir())
    assert old.returncode in (1, 2), old.stderr
    assert "mezo: error:" in old.stderr
    assert "Permission denied" in old.stderr
    assert (places["run"] / "trajectory.jsonl").read_bytes() == log


def test_a_run_keeps_the_adapter_it_started_from_and_names_it_if_lost(tiny_config, tmp_path):
    train(tiny_config.replace(steps=2))
    started = tiny_config.replace(
        adapter=tiny_config.machine.output_dir + "/adapter", output_dir=str(tmp_path / "second"), steps=2
    )
    train(started)
    shutil.rmtree(tiny_config.machine.output_dir)
    replay(str(tmp_path / "second"), str(tmp_path / "replayed"))
    whole = (tmp_path / "second" / "trajectory.jsonl").read_bytes()
    logbook.truncate(str(tmp_path / "second"), 1)
    resume(str(tmp_path / "second"))
    assert (tmp_path / "second" / "trajectory.jsonl").read_bytes() == whole
    (tmp_path / "second" / "initial_adapter.safetensors").unlink()
    with pytest.raises(UserError, match="the adapter this run started from is missing or differs"):
        replay(str(tmp_path / "second"), str(tmp_path / "again"))

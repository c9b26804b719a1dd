"""The lock of a run directory: it lives as long as the process that holds it."""

import json
import signal
import subprocess
import sys

import pytest

from mezo.errors import UserError
from mezo.run.directory import RunDirectory

HOLD = "import sys, time; from mezo.run.directory import RunDirectory; run = RunDirectory.open(sys.argv[1])"


def test_a_lock_dies_with_its_process(tmp_path):
    """The lock file stays, as those of older runs do: a killed process keeps nobody out."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "trajectory.jsonl").write_text(json.dumps({}) + "\n")
    (tmp_path / ".lock").touch()
    command = [sys.executable, "-c", f"{HOLD}; print('held', flush=True); time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training in this run directory; wait or stop it"):
            RunDirectory.open(str(tmp_path))
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").is_file()
    RunDirectory.open(str(tmp_path)).release()

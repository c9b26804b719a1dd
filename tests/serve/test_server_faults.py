"""Servers that are killed: nothing is left, nothing that was logged is lost, and the run goes on."""

import signal

import psutil
import pytest

from mezo.cli.main import main
from mezo.run.trajectory import read_trajectory
from tests.serve.server import Server, left_of
from tests.tiny_data import flags_of

STEPS, ROWS = 120, [{"text": "a fine story", "label": 1}, {"text": "a poor plot", "label": 0}]
NAME = "adapter_model.safetensors"


def scheduler_of(server):
    """The process of the engine that computes: the one with most memory below the server."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    return max(below, key=lambda process: process.memory_info().rss)


@pytest.mark.slow  # three engines, one after another; tests/run/test_feedback.py shows the same of the logs
def test_a_run_goes_on_after_its_engine_and_its_server_were_killed(installed, options, tmp_path):
    run = tmp_path / "run"
    given = {**options, "output_dir": str(run), "steps": STEPS}
    known = 0
    for turn, victim in enumerate((scheduler_of, lambda server: psutil.Process(server.process.pid))):
        server = Server(flags_of(given) if turn == 0 else ["--resume", str(run)], run)
        server.wait_for(lambda status, known=known: status["step"] > known + 2)
        assert server.ask("/mezo/examples", ROWS)[0] == 200
        server.wait_for(lambda status, known=known: status["step"] > known + 8)
        below = server.processes()
        victim(server).send_signal(signal.SIGKILL)
        code = server.process.wait(120)
        assert code == (1 if turn == 0 else -signal.SIGKILL), server.output
        assert not left_of(below), server.output
        (run / "serve.json").unlink(missing_ok=True)  # of a server that could not
        known = len(read_trajectory(run / "trajectory.jsonl")[1])
        assert main(["trajectory", "verify", str(run)]) == 0
    before = (run / "trajectory.jsonl").read_bytes()
    server = Server(["--resume", str(run)], run)
    server.wait_for(lambda status: status["state"] == "finished")
    fed = server.status()["fed"]
    assert server.end() == 143
    assert (run / "trajectory.jsonl").read_bytes().startswith(before)
    records = read_trajectory(run / "trajectory.jsonl")[1]
    assert (len(records), fed["example"]) == (STEPS, 4)
    assert [record.fed[0] for record in records if record.fed][-1] == fed["in_use"] == 4
    assert main(["trajectory", "verify", str(run)]) == 0
    assert main(["replay", str(run), "--output-dir", str(tmp_path / "replayed")]) == 0
    assert (tmp_path / "replayed" / NAME).read_bytes() == (run / "adapter" / NAME).read_bytes()

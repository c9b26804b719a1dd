"""A server that is killed, clients that leave, a worker that dies: what is left, and how it goes on."""

import json
import os
import signal
import socket
import threading
import time

import psutil
import pytest

from mezo.cli.main import main
from mezo.run.trajectory import read_trajectory
from tests.serve.server import KEY, Reference, Server, left_of
from tests.tiny_data import flags_of

pytestmark = pytest.mark.slow

TOLERANCE = 2e-4
PROMPT = "the film was good It was"


@pytest.fixture(scope="module")
def interrupted(installed, options):
    """A run of 400 steps whose server was killed at work, and what was said of it then."""
    flags = flags_of({**options, "steps": 400, "target_modules": ("q_proj", "o_proj"), "layers_to_transform": (2,)})
    server = Server(flags, options["output_dir"])
    server.wait_for(lambda status: status["step"] >= 10)
    assert server.ask("/mezo/promote", {"step": 7})[0] == 200
    paused = server.ask("/mezo/pause", {})
    time.sleep(1)
    first = server.status()
    time.sleep(1)
    assert paused == (200, {"state": "paused"})
    assert server.status()["step"] == first["step"] < 400
    assert server.ask("/mezo/resume", {}) == (200, {"state": "training"})
    server.wait_for(lambda status: status["step"] > first["step"])
    below, log = server.processes(), (server.run / "trajectory.jsonl").read_bytes()
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert not left_of(below)
    return server, log


def test_a_killed_server_goes_on_with_the_same_log_and_version(interrupted):
    killed, before = interrupted
    server = Server(["--resume", str(killed.run), "--max-latency-cost", "10"], killed.run)
    try:
        status = server.status()
        assert status["promotions"][-1] == status["promoted"] >= 7
        version, *answer = server.complete(f"mezo@{7}", PROMPT, 4)
        assert version == "mezo@7"
        done = server.wait_for(lambda status: status["step"] >= before.count(b"\n") + 5)["step"]
        assert (server.run / "trajectory.jsonl").read_bytes().startswith(before)
        assert done > 0
    finally:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 130, server.output
    assert Reference(server.run).difference(version, PROMPT, *answer) <= TOLERANCE
    assert main(["trajectory", "verify", str(server.run)]) == 0


@pytest.fixture(scope="module")
def again(interrupted):
    """The same run, served once more, training held back."""
    server = Server(["--resume", str(interrupted[0].run)], interrupted[0].run)
    assert server.ask("/mezo/pause", {})[0] == 200
    yield server
    if server.process.poll() is None:
        server.end(120)


def test_where_nothing_depends_on_theta_versions_share_keys_and_values_and_stay_apart(again):
    reference = Reference(again.run)
    for adapter in ("mezo@0", "mezo@9", "", "mezo@7", "mezo@0", "mezo"):
        version, *answer = again.complete(adapter, PROMPT, 6)
        assert reference.difference(version, PROMPT, *answer) <= TOLERANCE


def test_clients_that_leave_in_mid_answer_leave_nothing_in_flight(again):
    host, port = again.url.removeprefix("http://").split(":")
    for stream in (True, False):
        body = {
            "model": f"{again.model}:mezo@3",
            "prompt": PROMPT,
            "max_tokens": 100,
            "stream": stream,
            "ignore_eos": True,
        }
        text = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + text)
            time.sleep(0.1)
    # the slot is free again: other steps push version 3 out
    deadline = time.monotonic() + 60
    while 3 in again.status()["versions"]:
        assert time.monotonic() < deadline
        for step in (4, 5, 6):
            again.complete(f"mezo@{step}", PROMPT, 1)


def test_many_connections_are_answered(again):
    codes = []

    def ask():
        codes.append(
            again.ask("/v1/completions", {"model": again.model, "prompt": PROMPT, "max_tokens": 1}, timeout=300)[0]
        )

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 200


def test_a_worker_that_dies_ends_the_server(again):
    """The log is whole, nothing is left, and no request waits for ever."""
    below = again.processes()
    scheduler = next(pid for pid in below if "scheduler" in " ".join(psutil.Process(pid).cmdline()))
    os.kill(scheduler, signal.SIGKILL)
    assert again.process.wait(120) == 1, again.output
    assert "the SGLang engine died" in again.output
    assert not left_of(below)
    assert not (again.run / "serve.json").exists()
    assert read_trajectory(again.run / "trajectory.jsonl")[1]


def test_a_port_that_is_in_use_is_refused_before_anything_is_written(options, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = tmp_path / "run"
        flags = flags_of({**options, "output_dir": run, "port": port})
        assert main(["serve", *flags]) == 2
    assert f"--port {port}" in capsys.readouterr().err
    assert not run.exists()

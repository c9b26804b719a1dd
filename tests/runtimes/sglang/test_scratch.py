"""Whatever ends a trainer, at whatever stage: no process of its engine, no folder and no shared memory stay."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from mezo.errors import RunError, UserError
from mezo.runtimes.sglang import scratch as module
from mezo.runtimes.sglang.inside.handshake import ENVIRONMENT
from mezo.runtimes.sglang.scratch import LONGEST, Scratch
from mezo.runtimes.sglang.sweeper import orphans, processes
from tests.tiny_data import flags_of, write_jsonl

TRAINER = """
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by, such as nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mezo.runtimes.sglang.scratch import Scratch
scratch = Scratch("run")
with scratch.holding_temporary_files() as variables:
    variables["MEZO_ENGINE"] = f"{os.getpid()}:token:{scratch.path}"
    child = "import os, time; open(f'/dev/shm/sgl_shm_mq_{os.getpid()}_test', 'w'); print(flush=True); time.sleep(600)"
    for number in range(2):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, env=os.environ | variables)
        process.stdout.readline()
print(scratch.path, process.pid, flush=True)
how = sys.argv[1]
if how == "returns":
    scratch.close()
elif how == "raises":
    raise ValueError(how)
elif how == "thread":
    threading.Thread(target=os._exit, args=(3,)).start()
time.sleep(600 if how == "waits" else 0.5)
"""


@pytest.fixture
def temporary(monkeypatch):
    """A short temporary directory of its own for this process and its children."""
    with tempfile.TemporaryDirectory(prefix="mezo-t-", dir="/tmp") as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)
    tempfile.tempdir = None


def gone(folder, shared=(), seconds=60.0):
    """Whether the sweeper has done its work."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not processes(str(folder), ENVIRONMENT) and not folder.exists() and not any(map(os.path.exists, shared)):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "how", ["returns", "raises", "thread", signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL], ids=str
)
def test_nothing_outlives_a_trainer_however_it_ends(temporary, how):
    word = how if isinstance(how, str) else "waits"
    argv = [sys.executable, "-c", TRAINER, word]
    trainer = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    folder, pid = trainer.stdout.readline().split()
    shared = f"/dev/shm/sgl_shm_mq_{pid}_test"
    if word == "waits":
        assert len(processes(folder, ENVIRONMENT)) == 2, "or this test would show nothing"
        assert os.path.exists(shared)
        trainer.send_signal(how)
    assert gone(Path(folder), [shared])
    trainer.wait(10)
    assert list(temporary.glob("mezo-*")) == []


def test_shared_memory_of_the_dead_is_known_by_its_age_and_by_who_uses_it():
    """A process that died by itself has nothing open any more, and SGLang's loads do not have its id in their name."""
    began, mine, old = time.time() - 1, *(f"/dev/shm/sglang_loads_test{os.getpid()}_{n}" for n in "ab")
    for path in (mine, old):
        Path(path).touch()
    try:
        assert {mine, old} <= orphans(began)
        assert not {mine, old} & orphans(time.time() + 1), "what was there before is another's"
        with open(old, "r+b") as file:
            file.truncate(1)
            with mmap.mmap(file.fileno(), 1):
                assert {mine, old} & orphans(began) == {mine}
    finally:
        os.unlink(mine)
        os.unlink(old)


def test_the_sweeper_is_no_child_of_the_trainer(temporary):
    """SGLang ends an engine by killing every descendant of this process."""
    before = set(psutil.Process().children(recursive=True))
    scratch = Scratch("run")
    assert set(psutil.Process().children(recursive=True)) == before
    scratch.close()
    assert not scratch.path.exists()


def test_what_a_killed_sweeper_left_is_swept_at_the_next_start_and_a_living_folder_is_not(temporary):
    dead, alive = temporary / "mezo-engine-dead", temporary / "mezo-engine-alive"
    for folder in (dead, alive):
        (folder / "placeholder").mkdir(parents=True)
        (folder / "lock").touch()
    with open(alive / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Scratch("run").close()
    assert sorted(path.name for path in temporary.iterdir()) == [alive.name]


def test_a_long_temporary_directory_is_not_taken_for_sockets(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    scratch = Scratch("run")
    with scratch.holding_temporary_files(), tempfile.NamedTemporaryFile() as file:
        assert file.name.startswith(str(scratch.path))
        assert len(f"{file.name}") <= 107
    assert tempfile.gettempdir() == str(long)
    scratch.close()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match=f"TMPDIR .*xx: .* at most {LONGEST} characters.*shorter one"):
        Scratch("run")


def test_a_full_temporary_directory_is_named_with_what_is_needed(temporary):
    with pytest.raises(UserError, match=rf"{temporary} has no room .* 1,000,000,001,048,576 bytes .*TMPDIR"):
        Scratch("run", needed=10**15)
    assert list(temporary.iterdir()) == []
    scratch = Scratch("run")
    with pytest.raises(RunError, match=r"40 bytes are needed .*TMPDIR"):
        scratch.save({"a": torch.zeros(10)}, scratch.path / "no such folder" / "file")
    scratch.close()


def test_the_log_of_a_failure_alone_stays_and_the_next_one_of_that_run_replaces_it(temporary):
    for text in ("first", "second"):
        scratch = Scratch("run")
        scratch.log.write_text(text)
        scratch.keep_log = True
        scratch.close()
    assert [path.read_text() for path in temporary.iterdir()] == ["second"]
    assert next(temporary.iterdir()) == scratch.kept_log


def stage_of(run, stage, scratch_folder):
    """Whether a run has come to a stage."""
    if stage == "starting":
        return any(len(processes(str(folder), ENVIRONMENT)) > 1 for folder in scratch_folder.glob(f"{module.PREFIX}*"))
    log = run / "trajectory.jsonl"
    return log.is_file() and log.read_bytes().count(b"\n") > 5


@pytest.mark.slow  # ways to end, with processes that stand for an engine's: the tests above
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("stage", ["starting", "training"])
def test_a_run_through_the_engine_ends_with_all_that_belongs_to_it(temporary, model, tmp_path, stage, number):
    run, shared = tmp_path / "run", set(os.listdir("/dev/shm"))
    flags = {"train_file": write_jsonl(tmp_path / "train.jsonl", 48, 0), "prompt": "{text} It was", "steps": 100000,
             "label_words": (" terrible", " great"), "target_modules": ("q_proj",), "layers_to_transform": (2,),
             "model": model("llama"), "runtime": "sglang", "output_dir": str(run)}  # fmt: skip
    argv = [sys.executable, "-m", "mezo", "train", *flags_of(flags)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 180
    while not stage_of(run, stage, temporary) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(4 if stage == "starting" else 0)  # its processes import their libraries by then
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    if number == signal.SIGINT and stage == "training":
        time.sleep(0.1)
        with suppress(ProcessLookupError):
            process.send_signal(number)  # the second one does not wait for the step
    error = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}.get(number, 128 + number), error
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(temporary.glob("mezo-*")):
        time.sleep(0.05)
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
    assert list(temporary.glob("mezo-*")) == []
    assert set(os.listdir("/dev/shm")) <= shared
    assert "Traceback" not in error
    assert "Task was destroyed" not in error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

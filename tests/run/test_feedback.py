"""What a run is fed: which step may draw from it follows from the logs alone, and a line is whole or not there."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from mezo.api import replay, resume, train
from mezo.cli.main import main
from mezo.data.example import Example
from mezo.errors import RunError, UserError
from mezo.method.batches import Batches
from mezo.run import logbook
from mezo.run.directory import RunDirectory
from mezo.run.feedback import FeedbackLog
from mezo.run.share import write_share
from mezo.run.trajectory import read_header, read_trajectory
from mezo.tasks import load_splits

ONE = Example((5, 6), ((7,), (8,)), 1)
NAME = "adapter_model.safetensors"


def lines_of(log, *at):
    for step in at:
        log.append(lambda step=step: step, "example", [({"text": "a"}, [ONE])])
    return log


@pytest.mark.parametrize(
    ("n", "size", "grown"), [(10, 4, {3: 13, 7: 20}), (3, 8, {1: 5, 2: 9}), (7, 7, {1: 8}), (48, 8, {11: 50})]
)
def test_epochs_hold_what_there_is_when_they_begin(n, size, grown):
    """Against epochs that are laid end to end by hand."""
    batches, steps = Batches(n, size, 5), 30
    for step, examples in grown.items():
        batches.grow(step, examples)
    drawn, epoch = [], 0
    while len(drawn) < steps * size:
        examples = max([n, *(more for step, more in grown.items() if step * size <= len(drawn))])
        assert batches.begins_epoch(len(drawn) // size) or max(grown) > len(drawn) // size
        drawn += [int(i) for i in Batches(examples, 1, 5)._order(epoch, examples)]
        epoch += 1
    assert [i for step in range(steps) for i in batches(step)] == drawn[: steps * size]


def test_the_chain_is_found_again_and_belongs_to_its_run(tmp_path):
    log = lines_of(FeedbackLog(tmp_path, "data"), 0, 3, 3, 8)
    again = FeedbackLog(tmp_path, "data")
    assert (len(again), again.kinds) == (4, {"feedback": 0, "example": 4})
    assert [again.before(step) for step in (0, 1, 3, 4, 8, 9)] == [0, 1, 1, 3, 3, 4]
    assert again.examples(1, 3) == [ONE, ONE]
    assert all(again.holds(i, log.hash_of(i)) for i in range(5))
    assert not again.holds(5, log.hash_of(4))
    with pytest.raises(UserError, match="line 1 does not follow from the line before it, or from this run's data"):
        FeedbackLog(tmp_path, "other data")


def test_a_torn_line_is_dropped_by_who_writes(tmp_path):
    lines_of(FeedbackLog(tmp_path, "data"), 1)
    path = tmp_path / "feedback.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"at": 2')
    assert len(FeedbackLog(tmp_path, "data")) == 1
    assert path.read_bytes() != whole
    log = lines_of(FeedbackLog(tmp_path, "data"), 2)
    assert (len(log), len(FeedbackLog(tmp_path, "data"))) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1]["examples"][0].update(label=0), "line 2 does not follow"),
        (lambda rows: rows[1]["given"].update(text="b"), "line 2 does not follow"),
        (lambda rows: rows.pop(0), "line 1 does not follow"),
        (lambda rows: rows.reverse(), "line 1 does not follow"),
        (lambda rows: rows[0]["examples"][0].update(label=2), "label 2 is none of its 2 options"),
        (lambda rows: rows[0]["examples"][0].update(prompt=[-1]), "greater than or equal to 0"),
        (lambda rows: rows[0]["examples"][0].update(path="/etc"), "Extra inputs"),
        (lambda rows: rows[0].update(at=-1), "greater than or equal to 0"),
    ],
)
def test_a_changed_line_is_named(tmp_path, change, message):
    lines_of(FeedbackLog(tmp_path, "data"), 1, 2)
    path = tmp_path / "feedback.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        FeedbackLog(tmp_path, "data")


def test_lines_of_several_threads_are_one_chain(tmp_path):
    log, done = FeedbackLog(tmp_path, "data"), iter(range(10**6))
    work = lambda: [log.append(lambda: next(done), "feedback", [({}, [ONE])]) for _ in range(20)]  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = FeedbackLog(tmp_path, "data")
    assert (len(log), len(again)) == (80, 80)
    assert again.hash_of(80) == log.hash_of(80)


def test_what_is_no_json_is_not_kept(tmp_path):
    log = FeedbackLog(tmp_path, "data")
    with pytest.raises(UserError, match="use finite numbers"):
        log.append(lambda: 0, "example", [({"text": "a"}, [ONE]), ({"text": float("inf")}, [ONE])])
    assert len(log) == 0
    assert not log.path.exists()


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path):
    """A limit on the size of files stands for the disk: the write that crosses it is cut short, as on a full one."""
    limited = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom mezo.data.example import Example\n"
        "from mezo.errors import RunError\nfrom mezo.run.feedback import FeedbackLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))\n"
        "log, one = FeedbackLog(Path(sys.argv[1]), 'data'), Example((5, 6), ((7,), (8,)), 1)\n"
        "kept = 0\n"
        "try:\n    while kept < 100:\n        log.append(lambda: 1, 'example', [({'text': 'a'}, [one])])\n"
        "        kept += 1\n"
        "except RunError as error:\n    print(kept, len(log), error)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", limited, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    kept, held, error = done.stdout.split(maxsplit=2)
    assert 2 < int(kept) == int(held) < 100
    assert "free some space" in error
    log = FeedbackLog(tmp_path, "data")
    assert len(log) == int(kept)
    assert log.path.read_bytes().endswith(b"}\n")
    assert len(lines_of(log, 2)) == int(kept) + 1


def test_a_disk_that_does_not_take_a_line_leaves_none(tmp_path, monkeypatch):
    log = lines_of(FeedbackLog(tmp_path, "data"), 1)
    whole = log.path.read_bytes()

    def fails(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(RunError, match="Input/output error"):
            lines_of(log, 2)
    assert (len(log), log.path.read_bytes()) == (1, whole)
    assert len(FeedbackLog(tmp_path, "data")) == len(lines_of(log, 2)) - 1


@pytest.fixture
def fed(tiny_config, tmp_path):
    """The log of what a finished run of 40 steps, six an epoch, was fed after 10 steps and after 25."""
    from mezo.models.load import load_tokenizer

    config = tiny_config.replace(output_dir=str(tmp_path / "fed"), steps=40)
    path = config.machine.output_dir
    further = load_splits(config, load_tokenizer(config.model.base)).further
    train(config, until=10)
    log = FeedbackLog(
        RunDirectory(tmp_path / "fed").path, read_header(tmp_path / "fed" / "trajectory.jsonl")["data_hash"]
    )
    rows = [{"text": f"a {word} story", "label": i % 2} for i, word in enumerate(("bad", "fine", "poor", "great"))]
    log.append(lambda: 10, "example", [(row, further.of_row(row, "the row")) for row in rows])
    resume(path, until=25)
    log.append(lambda: 25, "feedback", [({}, further.of_answer("the film was good It was", " great", (), 1.0))])
    resume(path)
    return log


def test_a_run_that_was_fed_follows_from_its_logs_to_the_bit(fed, tiny_config, tmp_path, capsys):
    log = fed
    run = RunDirectory(tmp_path / "fed")
    _, records = read_trajectory(run.trajectory)
    # 48 examples are 6 steps an epoch: the third begins in step 12. Then 52 are 6.5: the fourth of these in step 31
    assert [(r.step, r.fed) for r in records if r.fed] == [(12, (4, log.hash_of(4))), (31, (5, log.hash_of(5)))]
    train(tiny_config.replace(output_dir=str(tmp_path / "alone"), steps=40))
    alone = read_trajectory(tmp_path / "alone" / "trajectory.jsonl")[1]
    assert alone[:12] == records[:12]
    assert alone[12:] != records[12:]

    assert main(["trajectory", "verify", str(run.path)]) == 0
    assert logbook.summary(str(run.path))["fed"] == "4 lines from step 12 on, 5 lines from step 31 on"
    replay(str(run.path), str(tmp_path / "replayed"))
    assert (tmp_path / "replayed" / NAME).read_bytes() == (run.adapter / NAME).read_bytes()
    # a process that was killed at some step has lost what the log did not have yet, and does it again
    whole = run.trajectory.read_bytes()
    for step in (5, 12, 13, 30):
        logbook.truncate(str(run.path), step)
        resume(str(run.path))
        assert run.trajectory.read_bytes() == whole
    capsys.readouterr()


def test_feedback_that_is_lost_is_missed_where_it_is_needed(fed, tmp_path, capsys):
    run = RunDirectory(tmp_path / "fed")
    write_share(str(run.path), str(tmp_path / "shared"))
    assert not list((tmp_path / "shared").rglob("feedback.jsonl"))  # what users said is not shared
    assert main(["trajectory", "verify", str(tmp_path / "shared" / "run")]) == 0
    logbook.truncate(str(run.path), 20)
    shutil.copy(run.feedback, tmp_path / "kept")
    run.feedback.unlink()
    with pytest.raises(UserError, match=r"step 12 drew from 4 lines of feedback.jsonl, which are not there"):
        resume(str(run.path))
    run.feedback.write_bytes(b"".join((tmp_path / "kept").read_bytes().splitlines(keepends=True)[:3]))
    assert main(["trajectory", "verify", str(run.path)]) == 2
    assert "line 14 draws from 4 lines of feedback" in capsys.readouterr().err

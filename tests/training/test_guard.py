"""--max-step-ratio: no step is much longer than those before it, and the log says which were shortened."""

from pathlib import Path

import pytest

from mezo.api import replay, resume, train
from mezo.errors import UserError
from mezo.method.guard import LEAST, WINDOW, StepGuard, length_of
from mezo.method.step import Update
from mezo.run import logbook
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.trajectory import read_trajectory
from tests.log_by_formula import follows

RATIO = 1.3


@pytest.fixture
def guarded(tiny_config):
    return tiny_config.replace(max_step_ratio=RATIO, steps=60, eval_every=30, directions=2)


@pytest.mark.parametrize("options", [{}, {"update_rule": "adam", "lr": 1e-3}], ids=str)
def test_a_run_shortens_its_longest_steps_resumes_and_replays_to_the_bit(guarded, tmp_path, options, capsys):
    whole = guarded.replace(**options)
    result = train(whole)
    path = Path(whole.machine.output_dir)
    records = read_trajectory(path / "trajectory.jsonl")[1]
    shortened = [record.step for record in records if record.shortened < 1]
    assert len(shortened) > 3
    assert result["shortened_steps"] == len(shortened)
    assert min(shortened) >= LEAST
    assert capsys.readouterr().err.count("shortened by --max-step-ratio") == 1
    assert follows(path) == 60
    assert logbook.verify(str(path)) == 60
    parted = whole.replace(output_dir=str(tmp_path / "parted"))
    assert train(parted, until=shortened[0] + 1) is None
    resume(parted.machine.output_dir)
    assert (tmp_path / "parted/trajectory.jsonl").read_bytes() == (path / "trajectory.jsonl").read_bytes()
    replay(str(path), str(tmp_path / "again"))
    assert same_bits(read_adapter(tmp_path / "again"), read_adapter(path / "adapter")) is None


def test_a_log_that_hides_what_was_shortened_is_refused(guarded):
    train(guarded)
    log = Path(guarded.machine.output_dir) / "trajectory.jsonl"
    lines = log.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if '"shortened"' in line)
    lines[number] = lines[number][: lines[number].index(', "shortened"')] + "}"
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"line {number + 1}: the estimates or coefficients do not follow"):
        logbook.verify(guarded.machine.output_dir)


def test_one_leap_does_not_move_the_bound():
    """The median of the last steps: a leap among them, or steps of nothing, change it little."""
    guard = StepGuard(2.0)
    for _ in range(WINDOW):
        guard.see(Update((1,), (1.0,)))
    guard.see(Update((1,), (1e6,)))
    for _ in range(LEAST):
        guard.see(Update.skip((1,)))
    update, factor = guard.shorten(Update((1, 2), (30.0, 40.0), decay=0.9))
    assert length_of(update) == pytest.approx(2.0)
    assert (factor, update.decay) == (pytest.approx(0.04), 0.9)
    assert guard.shorten(Update((1,), (1.9,)))[1] == 1.0
    for _ in range(WINDOW):
        guard.see(Update((1,), (5.0,)))
    assert guard.shorten(Update((1,), (9.9,)))[1] == 1.0, "old steps are forgotten"


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_a_ratio_that_shortens_half_of_all_steps_is_refused(tiny_config, ratio):
    with pytest.raises(UserError, match=f"--max-step-ratio must be 0 or a finite number > 1, got {ratio}"):
        tiny_config.replace(max_step_ratio=ratio)

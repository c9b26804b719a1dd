"""The run log: floats round-trip, torn lines are dropped, damage is named, and no bytes crash the reader."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.step import Update
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.files import drop_torn_line
from mezo.run.header import header
from mezo.run.replay import rebuild
from mezo.run.trajectory import StepRecord, TrajectoryWriter, read_trajectory
from mezo_kernels import available_backends

GOLDEN, STEPS_OF_GOLDEN = Path(__file__).parents[1] / "golden", 8
SPEC = {"peft": {}, "shapes": {"w.lora_A.weight": [8, 4]}, "model": "m", "model_hash": "0", "dtype": "float32"}
floats = st.floats(allow_nan=False)
finite = st.floats(allow_nan=False, allow_infinity=False)


def record(step, skipped=False, grad=0.1):
    update = Update((2**64 - 1 - step,), (1e-3 * grad,), 0.999, skipped=skipped)
    return StepRecord(step, update, Losses((1 / 3,), (math.pi,)), (grad,))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "trajectory.jsonl"
    path.write_text(json.dumps(header(7, "d", {"kind": "stream"}, SPEC)) + "\n")
    writer = TrajectoryWriter(path)
    for step in range(5):
        writer.append(record(step))
    writer.close()
    return path


def test_round_trip(log):
    first, records = read_trajectory(log)
    fixed = {"format": "mezo-trajectory", "version": 1, "z_stream": 1}
    assert first == {**fixed, "run_seed": 7, "data_hash": "d", "init": {"kind": "stream"}, **SPEC}
    assert records == [record(step) for step in range(5)]


@given(grads=st.lists(finite, min_size=1, max_size=3), loss=floats, seed=st.integers(0, 2**64 - 1))
def test_every_float_and_seed_round_trips(grads, loss, seed):
    n = len(grads)
    update = Update((seed,) * n, tuple(grads), grads[0], lr=loss if math.isfinite(loss) else None)
    written = StepRecord(0, update, Losses((loss,) * n, (-loss,) * n), tuple(grads), (loss, 1.0, 2.0))
    assert StepRecord.of_line(written.to_line()) == written


def test_a_loss_that_is_not_finite_round_trips():
    written = StepRecord(0, Update.skip((1,)), Losses((math.inf,), (-math.inf,)), (math.nan,))
    again = StepRecord.of_line(written.to_line())
    assert (again.losses.plus, again.losses.minus) == ((math.inf,), (-math.inf,))
    assert math.isnan(again.projected_grads[0])


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_a_torn_last_line_is_dropped(log, cut):
    log.write_bytes(log.read_bytes()[:-cut])
    assert len(read_trajectory(log)[1]) == 4
    drop_torn_line(log)
    assert log.read_bytes().endswith(b"}\n")
    writer = TrajectoryWriter(log)
    writer.append(record(4))
    writer.close()
    assert read_trajectory(log)[1] == [record(step) for step in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:2] + [b"{broken"] + lines[3:], "line 3 is damaged"),
        (lambda lines: lines[:2] + lines[3:], "line 3 holds step 2, expected 1"),
        (lambda lines: lines[:2] + [b'{"step": 1}'] + lines[3:], "line 3 is not a step record"),
        (lambda lines: lines[1:], "expected a header of mezo-trajectory version 1"),
        (lambda lines: [lines[0].replace(b'"version": 1', b'"version": 9')] + lines[1:], "version 9"),
        (lambda lines: [lines[0].replace(b'"z_stream": 1', b'"z_stream": 2')] + lines[1:], "z stream 2"),
        (lambda lines: [lines[0].replace(b'"init"', b'"inix"')] + lines[1:], "the header lacks init"),
        (lambda lines: lines[:1] + [lines[1].replace(b'"decay": 0.999', b'"decay": "nan"'), b""], "finite"),
        (lambda lines: [b"", b""], "damaged"),
        (lambda lines: [], "expected a header"),
    ],
)
def test_damage_is_named(log, change, message):
    log.write_bytes(b"\n".join(change(log.read_bytes().split(b"\n"))))
    with pytest.raises(UserError, match=message):
        read_trajectory(log)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), at=st.integers(0, 2000))
def test_no_bytes_crash_the_reader(tmp_path_factory, data, at):
    path = tmp_path_factory.mktemp("fuzz") / "trajectory.jsonl"
    whole = json.dumps(header(7, "d", {"kind": "stream"}, SPEC)) + "\n" + "".join(record(s).to_line() for s in range(3))
    base = whole.encode()
    path.write_bytes(base[:at] + data + base[at:])
    try:
        _, records = read_trajectory(path)
    except UserError:
        return
    assert [r.step for r in records] == list(range(len(records)))


@pytest.mark.parametrize("backend", ["reference", "numba", "triton"])
@pytest.mark.parametrize("log", ["v1", "v2-fzoo", "v2-adam"])
def test_every_version_is_read_and_replayed_for_good(log, backend):
    """The adapters were written by the runs themselves. v2-adam was along normalised z, without decay of lora_B."""
    if backend not in available_backends("cpu"):
        pytest.skip("Triton is interpreted only where there is no GPU")
    golden = GOLDEN / f"trajectory-{log}"
    theta, first, steps = rebuild(golden, backend=backend)
    assert (first["version"], first["run_seed"], steps) == (int(log[1]), 2**64 - 3, STEPS_OF_GOLDEN)
    assert same_bits(theta, read_adapter(golden)) is None

"""Runs that somebody else made, or that a disk damaged: one line and exit code 2, or the right result."""

import contextlib
import json
import os
import random
import re
import resource
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mezo.api import train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.report import tables
from mezo.run.adapter import PEFT_CONFIG, adapter_options, base_of, read_adapter, same_bits
from mezo.run.agreement import check_run
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_trajectory

FILES = ("config.json", "trajectory.jsonl", "metrics.jsonl", "result.json",
         "adapter/adapter_config.json", "adapter/mezo_base.json", "adapter/adapter_model.safetensors")  # fmt: skip
NUMBER = re.compile(rb"-?\d+(\.\d+)?(e-?\d+)?")
ODD = (
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"abc"',
    b"true",
    b"1000000000000",
    b"0",
    b"1" * 400,
    b"[" * 200_000,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data):
    run = tmp_path_factory.mktemp("runs") / "run"
    config = Config.of(
        model=tiny_model, **tiny_data, output_dir=str(run), prompt="{text} It was", label_words=(" terrible", " great"),
        target_modules=("q_proj", "o_proj"), layers_to_transform=(2,), steps=12, batch_size=8, lr=3e-2, eval_every=4,
        report=False,
    )  # fmt: skip
    train(config)
    return run


def damaged(data, draw):
    """What a fault, a fool or a foe makes of a file."""
    at, line = draw.randrange(len(data)), data.split(b"\n")
    kind = draw.choice(("flip", "cut", "drop", "repeat", "insert", "number", "value", "key", "lines", "zeros"))
    if kind in ("number", "value") and (found := list(NUMBER.finditer(data))):
        one = draw.choice(found)
        other = draw.choice(ODD) if kind == "value" else str(draw.randrange(10)).encode()
        return data[: one.start()] + other + data[one.start() + 1 if kind == "number" else one.end() :]
    draw.shuffle(line)
    return {
        "flip": data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :],
        "cut": data[:at],
        "drop": data[:at] + data[at + draw.randrange(1, 40) :],
        "repeat": data[:at] + data[max(0, at - 60) :],
        "insert": data[:at] + draw.choice(ODD) + data[at:],
        "key": data.replace(b'"', b"'", 1) if draw.random() < 0.2 else re.sub(rb"[a-z]_[a-z]", b"x_y", data, count=1),
        "lines": b"\n".join(line),
        "zeros": data[:at] + bytes(len(data) - at),
    }.get(kind, b"")


def outcome_of(command, capsys):
    """Exit code of a command, which must be 0, or 2 with one line."""
    capsys.readouterr()
    code, shown = main(command), capsys.readouterr().err
    assert code == 0 or (code, shown.count("\n")) == (2, 1), (command, shown)
    assert len(shown) < 2000
    return code


def check_damage(run, name, tmp_path, capsys, times, seed):
    """Damage a file so many times; then every command ends well or in one line, and no other theta is written."""
    whole, draw, right = (run / name).read_bytes(), random.Random(f"{name}{seed}"), read_adapter(run / "adapter")
    copy, before = shutil.copytree(run, tmp_path / "copy"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(times):
        (copy / name).write_bytes(damaged(whole, draw))
        out = tmp_path / f"out-{i}"
        for command in (["trajectory", "show"], ["trajectory", "verify"], *([["report"]] if i % 20 == 0 else [])):
            outcome_of([*command, str(copy)], capsys)
        with contextlib.suppress(UserError):  # what `mezo report` prints; its figures take long
            assert tables.tables(str(copy))
            tables.warnings(str(copy))
        if outcome_of(["replay", str(copy), "--output-dir", str(out)], capsys) == 0:
            assert same_bits(read_adapter(out), right) is None
            assert (out / PEFT_CONFIG).read_bytes() == (run / "adapter" / PEFT_CONFIG).read_bytes()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kB


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line_or_changes_nothing(finished, name, tmp_path, capsys):
    check_damage(finished, name, tmp_path, capsys, 8, "quick")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_200_damages_of_a_file(finished, name, tmp_path, capsys):
    check_damage(finished, name, tmp_path, capsys, 200, "all")


def test_an_evaluation_without_its_step_is_named(finished, tmp_path, capsys):
    """Found among the 200 damages of result.json."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    result = json.loads((copy / "result.json").read_text())
    del result["dev"][1]["step"]
    (copy / "result.json").write_text(json.dumps(result))
    assert main(["report", str(copy)]) == 2
    assert "a step of dev is missing" in capsys.readouterr().err


def test_a_null_is_a_figure_that_a_run_does_not_have(finished, tmp_path, capsys):
    """Found by hypothesis: a run whose test was null had a table of its changes."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    result = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(result | {"test": None}))
    assert outcome_of(["report", str(copy)], capsys) == 0


def rewritten(copy, **changes):
    """A run with other fields in its header, and no configuration or adapter that would contradict it."""
    for name in ("config.json", "result.json", "metrics.jsonl"):
        (copy / name).unlink()
    shutil.rmtree(copy / "adapter")
    first, *lines = (copy / "trajectory.jsonl").read_text().splitlines(keepends=True)
    (copy / "trajectory.jsonl").write_text("".join([json.dumps(json.loads(first) | changes) + "\n", *lines]))


HUGE = {"base_model.model.q_proj.lora_A.weight": [8, 10**8], "base_model.model.q_proj.lora_B.weight": [2**30, 8]}
HEADERS = {
    "shapes of text": {"shapes": "abc"},
    "a seed of text": {"run_seed": "x"},
    "a negative seed": {"run_seed": -1},
    "a rule of a number": {"rule": 5},
    "eight terabytes": {"shapes": {"base_model.model.x.weight": [10**6, 10**6]}},
    "a huge adapter": {"shapes": {**HUGE, **{f"base_model.model.{i}.lora_A.weight": [8, 2**31] for i in range(20)}}},
    "an adapter that is a list": {"peft": [1, 2]},
    "a rank of a billion": {"peft": {"peft_type": "LORA", "r": 10**9, "lora_alpha": 1, "target_modules": ["x"]}},
    "a start outside": {"init": {"kind": "file", "file": "../../../etc/passwd", "sha256": "0"}},
    "a start to download": {"init": {"kind": "base"}, "peft": None, "model": "nobody/there"},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_not_trusted(finished, name, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    rewritten(copy, **HEADERS[name])
    assert outcome_of(["replay", str(copy), "--until", "last", "--output-dir", str(tmp_path / "out")], capsys) == 2
    assert not (tmp_path / "out").exists()


def test_a_run_copied_while_it_trained_is_refused(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "result.json").unlink()
    (copy / "trajectory.jsonl").write_text("".join((copy / "trajectory.jsonl").open().readlines()[:6]))
    for command in (["trajectory", "verify", str(copy)], ["replay", str(copy), "--output-dir", str(tmp_path / "out")]):
        capsys.readouterr()
        assert main(command) == 2
        assert "they are not of one moment" in capsys.readouterr().err


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 38)


@pytest.mark.parametrize("name", ["trajectory.jsonl", "config.json", "metrics.jsonl"])
def test_what_has_no_end_is_not_read(finished, name, tmp_path, capsys):
    """A log of a billion updates (a sparse file stands for it), a pipe, a device."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo, sparse):
        (copy / name).unlink()
        make(copy / name)
        for command in (
            ["trajectory", "verify", str(copy)],
            ["replay", str(copy), "--output-dir", str(tmp_path / "x")],
        ):
            assert outcome_of(command, capsys) == 2


@pytest.mark.parametrize("name", [".lock", "trajectory.jsonl", "metrics.jsonl", "adapter"])
def test_nothing_is_written_through_a_link(finished, name, tmp_path, capsys):
    copy, victim = shutil.copytree(finished, tmp_path / "copy"), tmp_path / "victim"
    (copy / name).rename(victim) if (copy / name).exists() else victim.write_text("mine")
    (copy / name).symlink_to(victim)
    before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
    for command in (["trajectory", "truncate", str(copy), "--step", "2"], ["train", "--resume", str(copy)]):
        assert outcome_of(command, capsys) == 2
    assert before == (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir()))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def check_any_field(finished, tmp_path, name, data):
    """A field of the first line, or of a field in it, is replaced; the readers say so or give what is usable."""
    run = RunDirectory(tmp_path / "run")
    if not run.path.exists():
        shutil.copytree(finished, run.path)
    text = (finished / name).read_text()
    lines = text.splitlines() if name.endswith("l") else [text]
    values = place = json.loads(lines[0])
    key = data.draw(st.sampled_from(sorted(place)))
    if isinstance(place[key], dict) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(anything)
    (run.path / name).write_text("\n".join([json.dumps(values), *lines[1:], ""]))
    with contextlib.suppress(UserError):
        check_run(run, *read_trajectory(run.trajectory))
    with contextlib.suppress(UserError):
        tables.tables(str(run.path))
        tables.warnings(str(run.path))
    with contextlib.suppress(UserError):
        adapter_options(run.adapter)
    with contextlib.suppress(UserError):
        base_of(run.adapter)


FUZZED = pytest.mark.parametrize("name", [name for name in FILES if "safetensors" not in name])
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=40, derandomize=True, **UNTIMED)  # the same forty on every machine
@given(data=st.data())
@FUZZED
def test_any_field_may_hold_anything(finished, tmp_path, name, data):
    check_any_field(finished, tmp_path, name, data)


@pytest.mark.slow
@settings(max_examples=2000, **UNTIMED)
@given(data=st.data())
@FUZZED
def test_any_field_may_hold_anything_of_2000_draws(finished, tmp_path, name, data):
    check_any_field(finished, tmp_path, name, data)

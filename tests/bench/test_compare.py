"""`make bench-compare`: what is a slow-down and what is not, on results of a few rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def row(fraction, provider="ours", op="perturb", seconds=1.0, **facts):
    facts = {"op": op, "shape": "flat-16M", "dtype": "float32", "provider": provider, "device": "cpu"} | facts
    return facts | {"fraction_of_copy": fraction, "seconds": seconds}


@pytest.fixture
def compare(tmp_path):
    def run(old, new):
        paths = []
        for name, rows in (("old.json", old), ("new.json", new)):
            paths.append(tmp_path / name)
            paths[-1].write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in rows]}))
        return compare_files(*paths)

    return run


def compare_files(*paths):
    command = [sys.executable, str(ROOT / "bench/compare.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_same_results_pass(compare):
    result = compare([row(0.4)], [row(0.4)])
    assert result.returncode == 0
    assert "0 of ours slower" in result.stdout


@pytest.mark.parametrize(("new", "code"), [(0.361, 0), (0.359, 1), (0.1, 1), (0.8, 0)])
def test_ten_per_cent_of_the_ratio_is_the_limit(compare, new, code):
    result = compare([row(0.4)], [row(new)])
    assert result.returncode == code
    assert "perturb flat-16M float32 ours" in result.stdout


def test_a_slower_machine_is_no_slower_op(compare):
    assert compare([row(0.4, seconds=1.0)], [row(0.4, seconds=9.0)]).returncode == 0


def test_a_slower_peer_moves_and_does_not_fail(compare):
    result = compare([row(0.4), row(0.4, "original loop")], [row(0.4), row(0.2, "original loop")])
    assert result.returncode == 0
    assert "-50%" in result.stdout


def test_one_slow_row_among_many_fails_and_comes_first(compare):
    dtypes = ("float32", "bfloat16", "float16")
    old = [row(0.4, dtype=d) for d in dtypes]
    result = compare(old, [row(f, dtype=d) for f, d in zip((0.5, 0.3, 0.4), dtypes, strict=True)])
    assert result.returncode == 1
    assert "bfloat16" in result.stdout.splitlines()[1]
    assert "1 of ours slower" in result.stdout


def test_rows_that_differ_in_updates_alone_are_not_mixed_up(compare):
    old = [row(0.4, op="step", updates=4), row(0.2, op="step", updates=16)]
    assert compare(old, old[::-1]).returncode == 0


def test_a_row_that_is_gone_fails(compare):
    result = compare([row(0.4), row(0.4, op="step")], [row(0.4)])
    assert result.returncode == 1
    assert "no longer measured: step" in result.stdout


def test_rows_without_a_copy_are_left_out(compare):
    first = {"op": "first call", "seconds": 3.0}
    assert compare([row(0.4), first], [row(0.4), first | {"seconds": 30.0}]).returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file"), ("[]", "not a result"), ('{"benchmarks": []}', "run all of `make bench`")],
)
def test_files_that_are_no_results_are_refused(tmp_path, text, says):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    result = compare_files(path, path)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_results_of_two_devices_are_refused(compare):
    result = compare([row(0.4)], [row(0.4, device="cuda")])
    assert result.returncode == 1
    assert "no row in common" in result.stderr

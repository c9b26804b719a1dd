"""A few random moments of the crash test; all thirty are `make crash-test`."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def crash_test():
    path = Path(__file__).parents[2] / "bench" / "crash_test.py"
    spec = importlib.util.spec_from_file_location("crash_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.crash_test


@pytest.mark.slow  # test_trainer.py kills a run once
def test_a_run_killed_while_it_steps_ends_the_same(crash_test, tmp_path):
    result = crash_test(moments=1, steps=600, seed=7, directory=tmp_path)
    assert result["killed_while"] == {"stepping": 1}
    assert all(result["equal"].values())


@pytest.mark.slow
def test_a_run_killed_five_times_ends_the_same(crash_test, tmp_path):
    result = crash_test(moments=5, steps=600, seed=1, directory=tmp_path)
    assert result["moments"] >= 3
    assert all(result["equal"].values())

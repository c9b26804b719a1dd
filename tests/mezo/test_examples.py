"""The examples run, and do what they say."""

import difflib
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def dropin():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: waking a second thread costs more than it computes
    spec = importlib.util.spec_from_file_location("dropin_original_loop", EXAMPLES / "dropin_original_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def body(function):
    return inspect.getsource(function).splitlines()[2:]


def test_at_most_five_lines_change(dropin):
    changes = list(difflib.ndiff(body(dropin.plain), body(dropin.fused)))
    assert sum(line.startswith("- ") for line in changes) <= 5
    assert sum(line.startswith("+ ") for line in changes) <= 5


@pytest.mark.parametrize("loop", ["plain", "fused"])
def test_both_loops_learn(dropin, loop):
    model = dropin.make_model(torch.float32)
    before = dropin.loss_of(model)
    getattr(dropin, loop)(model, dropin.loss_of, steps=300, lr=2e-2, eps=1e-3)
    assert dropin.loss_of(model) < 0.7 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_plain_loop_drifts(dropin, dtype):
    assert dropin.drift(dropin.plain, dtype, steps=50) > 0
    assert dropin.drift(dropin.fused, dtype, steps=50) == 0


def test_main_prints_both(dropin, capsys):
    dropin.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain: loss")
    assert lines[1].endswith("torch.float32 0.0e+00, torch.bfloat16 0.0e+00")

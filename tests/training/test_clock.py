"""A run that becomes many times slower says so once."""

import itertools
import types

import pytest

from mezo.api import train
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.training import clock
from mezo.training.trainer import SLOW


@pytest.mark.parametrize(
    ("slower", "serves", "said"), [(SLOW + 1, False, 1), (SLOW - 1, False, 0), (SLOW + 1, True, 0)]
)
def test_slow_steps_are_said_once(tiny_config, monkeypatch, capsys, slower, serves, said):
    """Of 100 steps those after the fortieth take that many times as long, by a clock of the test's own.

    Steps of a runtime that serves wait for users: that they are slow says nothing.
    """
    if serves:
        monkeypatch.setattr(HFRuntime, "promote", lambda self, step: None, raising=False)
    steps = []
    own = clock.Clock.measuring_step
    monkeypatch.setattr(clock.Clock, "measuring_step", lambda self: steps.append(1) or own(self))
    counted = itertools.accumulate(itertools.count(), lambda now, _: now + (slower if len(steps) > 40 else 1))
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: float(next(counted))))
    train(tiny_config.replace(steps=100, eval_every=100, noise=False, report=False))
    lines = [line for line in capsys.readouterr().err.splitlines() if "times as long as the fastest" in line]
    assert len(lines) == said
    assert not said or f"steps take {slower} times" in lines[0]

"""The demo's run directory; the demo itself is `make demo`."""

import dataclasses
import os
import signal

from mezo.api import resume, train
from mezo.studies import demo


def test_an_unfinished_demo_is_resumed_and_a_finished_one_kept(tiny_config, monkeypatch):
    from mezo.report.monitor import Monitor

    config = dataclasses.replace(tiny_config, objective="cross_entropy")
    assert demo._free_or_unfinished(config) == config
    shown, presses = Monitor.step, iter([False] * 5 + [True])

    def press(self, record, rate):
        shown(self, record, rate)
        if next(presses):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "step", press)
        assert train(config) is None
    assert demo._free_or_unfinished(config) == config, "to be resumed"
    other = demo._free_or_unfinished(dataclasses.replace(config, steps=50))
    assert other.output_dir == config.output_dir + "-2"
    resume(config.output_dir)
    assert demo._free_or_unfinished(config).output_dir == config.output_dir + "-2"

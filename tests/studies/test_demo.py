"""The demo's run directory; the demo itself is `make demo`."""

import os
import signal

from mezo.api import resume, train
from mezo.studies import demo


def test_an_unfinished_demo_is_resumed_and_a_finished_one_kept(tiny_config, monkeypatch):
    from mezo.report.monitor import Monitor

    config = tiny_config.replace(objective="cross_entropy")
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
    other = demo._free_or_unfinished(config.replace(steps=50))
    assert other.machine.output_dir == config.machine.output_dir + "-2"
    resume(config.machine.output_dir)
    assert demo._free_or_unfinished(config).machine.output_dir == config.machine.output_dir + "-2"

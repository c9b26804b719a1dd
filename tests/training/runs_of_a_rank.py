"""What torchrun starts in each rank: the runs of a JSON file in turn, since a start costs more than a tiny run.

The file is a list of {"flags": of `mezo`, "fault": the name of a function here or ""}. Rank 0 leaves the exit code of
each run beside it, a file an attempt. A list ends with a run that loses a rank, and a fault stays to its end.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from mezo.cli.main import main
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.training.measurement import Measurement

FAILED = 1  # what `mezo` returns where a run broke off
RANK, ATTEMPT = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]


def flip_a_bit() -> None:
    """Theta of rank 1 differs in one bit, not in the last one: a later sum may round that away."""
    load = HFRuntime.load

    def wrong(self, theta):
        load(self, theta)
        if RANK == "1":
            self.master.tensors[0].view(torch.int32)[0, 0] ^= 1 << 12

    HFRuntime.load = wrong


def die_in_step_7() -> None:
    """SIGKILL to rank 1, in the first attempt."""
    record = Measurement.record

    def die(self, step, *rest):
        if step.number == 7 and (RANK, ATTEMPT) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return record(self, step, *rest)

    Measurement.record = die


def run_all(path: Path) -> int:
    """The exit code of the last run."""
    codes = []
    for run in json.loads(path.read_text()):
        if run["fault"]:
            globals()[run["fault"]]()
        codes.append(main(run["flags"]))
        if RANK == "0":
            path.with_suffix(f".codes-{ATTEMPT}").write_text(json.dumps(codes))
        if codes[-1] == FAILED:
            break
    return codes[-1]


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))

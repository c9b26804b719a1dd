"""What can be reproduced without a hub account: a linear model, a small decoder, a small encoder, on film reviews.

Run: make reproduce-small, or python bench/reproduce_small.py --output bench/results/MACHINE/reproduce_small.json
With --parts only those are measured; the others stay as the file has them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from machine import describe
from reproduce_decoder import accuracy_study, few_shot
from reproduce_encoder import encoder
from reproduce_linear import linear
from reproduce_peers import peers
from reproduce_tuning import tuning

PARTS = {
    "linear": lambda scratch: linear(),
    "decoder": few_shot,
    "accuracy objective": accuracy_study,
    "encoder": encoder,
    "tuning": tuning,
    "peers": peers,
}


def main(argv: list[str] | None = None, parts: Mapping[str, Callable[[Path], dict]] = PARTS) -> int:
    """Measure the parts, writing the file after each.

    Args:
        argv: the command line, of the process if None.
        parts: by name, what measures each in a directory of its own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args(argv)
    for name in options.parts:
        began, machine = time.perf_counter(), describe()
        with tempfile.TemporaryDirectory() as scratch:
            part = parts[name](Path(scratch))
        # read as late as may be: another process may have measured another part
        found = json.loads(options.output.read_text()) if options.output.is_file() else {}
        found[name] = part | {"seconds_in_all": time.perf_counter() - began, "machine": machine}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {found[name]['seconds_in_all']:.0f} s -> {options.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

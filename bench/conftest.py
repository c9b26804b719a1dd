"""How every row is measured: parity first, then rounds in which the copy and the original take their turns."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from mezo_kernels import ParamLayout, perturb_, step_

sys.path.insert(0, str(Path(__file__).parent))
import machine
import rows


@pytest.fixture(scope="session", autouse=True)
def parity():
    """No timing on a red gate: the timed backend gives the bits of the reference."""
    for n in (1, 1027, 5000):
        results = []
        for backend in (None, "reference"):
            theta = ParamLayout({"w": torch.linspace(-1, 1, n), "v": torch.ones(7, n)})
            targets = [theta.like([torch.zeros_like(t, dtype=torch.bfloat16) for t in theta.tensors]) for _ in "+-"]
            perturb_(theta, 0.3, 2**63 + n, backend=backend)
            step_(theta, [(1, 0.1), (2, 0.2, 0.9)], 0.99, 3, 1e-2, *targets, backend=backend)
            results.append([t for layout in (theta, *targets) for t in layout.tensors])
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            pytest.exit(f"parity with the reference is broken at {n} elements: nothing was timed", returncode=1)


@pytest.fixture
def measure(benchmark):
    """Time a function as `rows.measure` does."""
    return functools.partial(rows.measure, benchmark)


@pytest.fixture(scope="session")
def compiler():
    """Skips where torch.compile cannot make code for this machine."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as error:
        pytest.skip(f"torch.compile does not run here: {type(error).__name__}: {str(error).splitlines()[0]}")


def pytest_terminal_summary(terminalreporter):
    for line in rows.summary:
        terminalreporter.write_line(line)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep what a reader needs: no raw samples, no dump of the machine."""
    output_json["machine_info"] = machine.describe()
    output_json["summary"] = rows.summary
    for row in output_json["benchmarks"]:
        row["stats"] = {name: row["stats"][name] for name in ("min", "median", "max", "iqr", "rounds")}
        for name in ("options", "params", "param", "group"):
            row.pop(name, None)

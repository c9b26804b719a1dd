"""How every row is measured: parity first, then rounds in which the copy and the original take their turns."""

import sys
from pathlib import Path

import pytest
import torch

from mezo_kernels import verify

sys.path.insert(0, str(Path(__file__).parent))
import machine
import providers
import rows
from shapes import FLOATS, make


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where everything is timed")


@pytest.fixture(scope="session")
def device(request):
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda needs a GPU that torch sees; torch.cuda.is_available() is False", returncode=1)
    return name


@pytest.fixture(scope="session", autouse=True)
def parity(device):
    """No timing on a red gate: every case of every op gives the bits of the reference on every backend here."""
    red = [f"{row.backend}: {row.check}: {row.detail}" for row in verify(device) if not row.ok]
    if red:
        pytest.exit(f"parity with the reference is broken, nothing was timed: {red[0]}", returncode=1)


@pytest.fixture
def measure(benchmark, device, request):
    """Time an op of a provider on a case, in turn with a copy and, where it is ours, with the original loop."""

    def run(op, shape, dtype, provider, **options):
        reason = providers.unsuitable(provider, shape, dtype, device)
        if reason:
            pytest.skip(reason)
        if provider == "torch.compile of the reference":
            request.getfixturevalue("compiler")
        case = make(shape, FLOATS[dtype], device)
        work = providers.PROVIDERS[provider](op, case, **options)
        ours = provider == "ours" and not options
        baseline = providers.original(op, case) if ours else None
        nbytes = rows.bytes_of(op, case.elements, FLOATS[dtype])
        facts = {"shape": shape, "tensors": len(case.params), "dtype": dtype, "provider": provider} | options
        rows.measure(benchmark, op, work, case.elements, nbytes, device, baseline, **facts)

    return run


@pytest.fixture(scope="session")
def compiler(device):
    """Skips where torch.compile cannot make code for this machine."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        pytest.skip(f"torch.compile does not run here: {type(error).__name__}: {str(error).splitlines()[0]}")


def pytest_terminal_summary(terminalreporter):
    for line in rows.summary:
        terminalreporter.write_line(line)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep what a reader needs: rows by our own clock, no raw samples, no dump of the machine."""
    output_json["machine_info"] = machine.describe(config.getoption("--device"))
    output_json["summary"] = rows.summary
    for row in output_json["benchmarks"]:
        for name in ("options", "params", "param", "group", "stats"):
            row.pop(name, None)

"""What the compiler makes of every kernel, for GPUs this machine need not have: see aot.py."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mezo_kernels import dispatch
from tests.kernels.tritons import VERSIONS, install

HERE = Path(__file__).parent
# registers, and issue slots an element, of the code as it is, plus a little: raise one only with a reason. By version
# of Triton, whose assemblers differ. 3.6 has none for sm_100, which the launcher refuses there, nor for gfx942, whose
# square root it writes in five fused operations that nobody has compared with the exact one
BY_VERSION = json.loads((HERE / "aot_ceilings.json").read_text())
CEILINGS = BY_VERSION[".".join(version("triton").split(".")[:2])]
QUICK = ("sm_90",)  # the others are slow tests: 15 s each
CASES = [
    pytest.param((target, variant), id=f"{target}-{variant}", marks=[] if target in QUICK else pytest.mark.slow)
    for target, variants in CEILINGS.items()
    for variant in variants
]
# the others have slow paths beside the fast one
FAST = [case for case in CASES if not case.values[0][1].startswith("any_")]
BLOCK_SIZE = 2048  # elements of a program


def compiled(*targets: str, triton: Path | None = None) -> dict:
    """The report for some targets, from another process: this one may have chosen Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton:
        env["PYTHONPATH"] = os.pathsep.join([str(triton), *filter(None, [env.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, HERE / "aot.py", *targets], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    report["reports"] = {(kernel["target"], kernel["variant"]): kernel for kernel in report["reports"]}
    return report


@pytest.fixture(scope="module")
def report() -> dict:
    return compiled(*QUICK)


@pytest.fixture(scope="module")
def others() -> dict:
    return compiled(*(target for target in CEILINGS if target not in QUICK))


@pytest.fixture(params=CASES)
def kernel(request) -> dict:
    report = request.getfixturevalue("report" if request.param[0] in QUICK else "others")
    return report["reports"][request.param]


fast = pytest.mark.parametrize("kernel", FAST, indirect=True)


@pytest.mark.parametrize("name", ["report", pytest.param("others", marks=pytest.mark.slow)])
def test_every_kernel_has_a_ceiling(request, name):
    found = set(request.getfixturevalue(name)["reports"])
    assert found == {case.values[0] for case in CASES if (case.values[0][0] in QUICK) == (name == "report")}


def test_no_spill_and_no_stack(kernel):
    assert (kernel["spills"], kernel["stack"]) == (0, 0)


def test_each_operation_is_rounded_on_its_own(kernel):
    """No fused multiply-add outside the square roots, no flush to zero, no approximate function."""
    assert (kernel["fused"], kernel["inexact"]) == (0, 0)
    assert (kernel["roots"] > 0) == ("rademacher" not in kernel["variant"])


@fast
def test_the_fast_path_moves_its_payload_in_128_bits(kernel):
    elements = BLOCK_SIZE // kernel["lanes"]
    # bfloat16 and float16 may be read by one load, whatever the branch: Triton 3.8 does so
    read = kernel["read"] - (2 if "mixed" in kernel["variant"] else 0)
    # tables are read in 128 bits too where their columns are adjacent
    assert kernel["loads"].get("128", 0) >= read * elements // 16
    assert kernel["loads"].get("16", 0) == 0
    assert kernel["stores"] == {"128": kernel["written"] * elements // 16}


@fast
def test_the_fast_path_keeps_values_in_registers(kernel):
    """A lane stores what it drew: no exchange through shared memory, no barrier."""
    assert (kernel["shared"], kernel["barriers"]) == (0, 0)


def test_registers_and_issue_slots_stay_below_their_ceilings(kernel):
    registers, slots = CEILINGS[kernel["target"]][kernel["variant"]]
    assert kernel["registers"] <= registers
    assert kernel["slots"] <= slots


@pytest.mark.slow  # the same gates, by the compilers and assemblers of other versions
@pytest.mark.parametrize("version", VERSIONS)
def test_gates_of_other_versions_of_triton(version, tmp_path):
    ceilings = BY_VERSION[version.rpartition(".")[0]]["sm_90"]
    report = compiled("sm_90", triton=install(version, tmp_path))["reports"]
    found = {name: kernel for (_, name), kernel in report.items()}
    assert found.keys() == ceilings.keys()
    for name, kernel in found.items():
        assert (kernel["spills"], kernel["stack"], kernel["fused"], kernel["inexact"]) == (0, 0, 0, 0), name
        assert (kernel["registers"] <= ceilings[name][0], kernel["slots"] <= ceilings[name][1]) == (True, True), name


def test_every_kernel_of_every_op_has_gates(report):
    """An op whose kernels nobody compiles here fails: give it variants and ceilings."""
    launched = report["kernels_of_ops"]
    assert set(launched) == set(dispatch.OPS)
    assert all(launched.values()), "an op launched no kernel"
    gated = {(target, kernel["kernel"]) for (target, _), kernel in report["reports"].items()}
    assert gated == {(target, name) for target in QUICK for names in launched.values() for name in names}


def test_no_per_step_value_compiles_a_second_variant(report):
    kernels = {name for names in report["kernels_of_ops"].values() for name in names}
    assert report["variants_of_a_run"] == dict.fromkeys(kernels, 1)

"""What Triton compiles of every kernel, run on the CPU: the bits of the reference, and every planted bug is found."""

import json
import os
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from mezo_kernels import cases, dispatch
from tests.kernels.tritons import VERSIONS, install

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TRITON = tuple(map(int, installed("triton").split(".")[:2]))
one_code = pytest.mark.skipif(
    TRITON >= (3, 9),
    reason="Triton 3.9 orders the code for sm_80 in another way; test_every_case_on_other_targets runs it",
)


def compiled(*command, triton: Path | None = None, **more: str) -> str:
    """What a command prints in a process that compiles kernels: this one may have chosen Triton's interpreter."""
    places = [str(place) for place in (triton, ROOT) if place]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(places), **more}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    return run.stdout


def report(*arguments: str, triton: Path | None = None):
    return json.loads(compiled(HERE / "run.py", *arguments, triton=triton))


def assert_right(rows: list) -> None:
    assert not [(check, detail) for check, ok, detail in rows if not ok]
    assert {check.split()[0] for check, _, _ in rows} >= set(dispatch.OPS)


def test_every_case_of_every_op():
    """dtypes, distributions, rules and copies in all storage, on an H100."""
    assert_right(report("cases", "sm_90"))


@pytest.mark.slow  # test_every_case_of_every_op is of one target
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_every_case_on_other_targets(target):
    assert_right(report("cases", target))


@pytest.mark.slow  # as above, of the installed version
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_every_case_by_other_versions_of_triton(target, version, tmp_path):
    assert_right(report("cases", target, triton=install(version, tmp_path)))


@one_code
def test_code_for_sm_80_is_that_for_sm_90():
    """Up to the header: what is shown of one is shown of the other."""
    texts = report("texts", "sm_90")
    assert len(texts) >= 6
    assert texts == report("texts", "sm_80")


@one_code
@pytest.mark.slow  # the quick sibling looks at six kernels
def test_code_of_every_kernel_for_sm_80_is_that_for_sm_90():
    assert report("texts", "sm_90", "every") == report("texts", "sm_80", "every")


def assert_found(found: dict) -> None:
    assert found.pop("none") is None, "the kernels as they are fail"
    assert len(found) >= 12
    assert not [name for name, how in found.items() if how is None]
    absent = {name for name, how in found.items() if how[0] == "absent"}
    assert absent <= ({"a barrier left out"} if TRITON < (3, 7) else set())  # what Triton 3.6 makes has no barriers


def test_every_planted_bug_is_found():
    assert_found(report("mutants", "PTX", "TABLE", "TILE", "PHILOX"))


@pytest.mark.slow  # more of the same
def test_more_planted_bugs_are_found():
    assert_found(report("mutants", "TILE_MORE"))


def pytest_on(target: str, *files: Path) -> None:
    options = ["-p", "tests.kernels.ptx.plugin", "-p", "no:cacheprovider", "-m", "not gpu"]
    compiled("-m", "pytest", *options, *files, MEZO_PTX=target)


def test_launch_path():
    pytest_on("sm_90", HERE / "launches.py")


@pytest.mark.slow  # test_every_case_of_every_op runs the same kernels on fewer shapes
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_the_tests_of_the_kernels(target):
    """Those that otherwise run in Triton's interpreter, on compiled kernels."""
    pytest_on(target, *(ROOT / "tests" / "kernels" / name for name in ("test_triton.py", "test_rules.py")))


def test_cases_hold_storage_for_every_mode():
    """The tables of these layouts send tiles down every path of the kernels, in both widths."""
    from mezo_kernels.triton import table

    seen = set()
    for dtypes in cases.MIXES:
        for aligned in (False, True):
            layout = cases.layout("cpu", *dtypes, aligned=aligned)
            made = table.build(layout.tensors, [], [], layout.geometry)
            (one,) = made.launches
            seen |= {(int(mode), one.width) for mode in one.tiles[:, 0] & 3} | {("kernel", one.mode)}
    assert {("kernel", table.FLAT), ("kernel", table.ANY)} <= seen
    assert {(mode, 4) for mode in (table.FLAT, table.BY_ROW, table.GENERAL)} | {(table.FLAT, 8)} <= seen

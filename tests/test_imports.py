"""The import rules of the design, read from the syntax tree of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mezo_kernels", "mezo")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODEL_LIBRARIES = {"transformers", "peft", "sglang"}
KERNEL_LIBRARIES = {"torch", "triton", "numba", "llvmlite", "numpy", "mezo_kernels"}
ALLOWED_MODEL_LIBRARIES = ("mezo/runtimes/", "mezo/tasks/", "mezo/checkpoint.py")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imports(where, source):
    """Dotted names that the module at `where` imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    package = where.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(path):
    return imports(relative(path), path.read_text(encoding="utf-8"))


def touches(path, *targets):
    """Those imports of a module that are one of `targets` or inside one."""
    return {name for name in imports_of(path) for target in targets if f"{name}.".startswith(f"{target}.")}


def under(*places):
    return [path for path in MODULES if relative(path).startswith(places)]


def offenders(paths, *targets):
    return {relative(path): touches(path, *targets) for path in paths if touches(path, *targets)}


def test_kernels_know_no_model():
    """Rule 1: torch, triton, numba, numpy and the standard library."""
    tops = {name.split(".")[0] for path in under("mezo_kernels/") for name in imports_of(path)}
    assert tops - set(sys.stdlib_module_names) <= KERNEL_LIBRARIES


def test_backends_agree_by_test_and_not_by_sharing_code():
    """Rule 2."""
    compiled = under("mezo_kernels/triton/", "mezo_kernels/cpu")
    assert compiled
    assert not offenders(compiled, "mezo_kernels.reference")
    assert not offenders(under("mezo_kernels/reference.py"), "mezo_kernels.cpu", "mezo_kernels.triton")
    assert not offenders(under("mezo_kernels/cpu"), "mezo_kernels.triton")
    assert not offenders(under("mezo_kernels/triton/"), "mezo_kernels.cpu")


def test_model_libraries_stay_in_their_places():
    """Rule 3."""
    elsewhere = [path for path in MODULES if not relative(path).startswith(ALLOWED_MODEL_LIBRARIES)]
    assert not offenders(elsewhere, *MODEL_LIBRARIES)


def test_a_runtime_knows_no_task_optimizer_or_trainer():
    """Rule 4, one half."""
    above = "mezo.tasks", "mezo.optim", "mezo.MeZO", "mezo.estimator", "mezo.objectives", "mezo.measurement"
    above += "mezo.rewards", "mezo.trainer", "mezo.cli"
    assert not offenders(under("mezo/runtimes/"), *above)


def test_the_trainer_knows_the_protocol_of_a_runtime_only():
    """Rule 4, the other half."""
    loop = "trainer", "measurement", "evaluation", "clock", "result"
    used = {name for part in loop for path in under(f"mezo/{part}.py") for name in touches(path, "mezo.runtimes")}
    assert used
    assert all(f"{name}.".startswith("mezo.runtimes.base.") for name in used)


def test_no_grab_bags():
    """Rule 5."""
    tracked = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert not [relative(path) for path in tracked if path.name in ("utils.py", "common.py", "helpers.py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_light(package):
    """The optimizer and the ops cost an `import torch`, no model library and no compiler."""
    heavy = "transformers", "peft", "sglang", "numba", "triton"
    code = f"import sys, torch; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert package in run.stdout.split()
    assert not {name.split(".")[0] for name in run.stdout.split()} & set(heavy)


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d\nfrom .base import e\nfrom ..optim import f\ndef g():\n    import peft\n"
    found = imports("mezo/runtimes/imagined.py", source)
    assert {"a.b", "c", "c.d", "mezo.runtimes.base.e", "mezo.optim", "mezo.optim.f", "peft"} <= found

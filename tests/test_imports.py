"""Who may import whom, read from the syntax tree of every module: one list, and what is not allowed fails."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from mezo_kernels import dispatch

ROOT = Path(__file__).parent.parent
PACKAGES = ("mezo_kernels", "mezo")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

LAYERS = (
    ("mezo.__main__",),
    ("mezo.cli",),
    ("mezo.studies", "mezo.serve"),
    ("mezo",),
    ("mezo.api", "mezo.trainer"),
    ("mezo.training",),
    ("mezo.report",),
    ("mezo.run",),
    ("mezo.runtimes", "mezo.tasks"),
    ("mezo.data", "mezo.models"),
    ("mezo.config", "mezo.optim"),
    ("mezo.method",),
    ("mezo_kernels", "mezo.errors", "mezo.ranges", "mezo.atomic", "mezo.progress"),
)
"""Packages from top to bottom: a module imports its own package, and packages below its own. Neighbours on one line
do not know each other, but for `NEIGHBOURS`."""
NEIGHBOURS: set[tuple[str, str]] = set()
BACKENDS = tuple(backend.module for backend in dispatch.BACKENDS.values())
"""Backends of the ops: they agree by test, not by sharing code."""
LIBRARIES = {
    "mezo_kernels": {"torch", "triton", "numba", "llvmlite", "numpy"},
    "transformers": ("mezo.models", "mezo.runtimes", "mezo.data", "mezo.tasks", "mezo.trainer"),
    "peft": ("mezo.models", "mezo.trainer"),
    "sglang": ("mezo.runtimes.sglang", "mezo.serve.http"),
    "matplotlib": ("mezo.report.figures",),
    "optuna": ("mezo.studies.tune",),
}
"""What `mezo_kernels` may import besides the standard library; and the packages that may import a model library."""


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name, source, is_package=False):
    """Dotted names that a module imports, anywhere in it; `from a import b` counts as a.b."""
    found = set()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {name_of(path): imports(name_of(path), path.read_text(), path.name == "__init__.py") for path in MODULES}


def inside(name, package):
    return f"{name}.".startswith(f"{package}.")


def layer_of(name):
    """(number from the top, package) of a module or of what is imported from one; None of other libraries."""
    places = [(i, package) for i, layer in enumerate(LAYERS) for package in layer if inside(name, package)]
    return max(places, key=lambda place: len(place[1]), default=None)


def allowed(importer, imported):
    (above, mine), (below, other) = layer_of(importer), layer_of(imported)
    return mine == other or above < below or (mine, other) in NEIGHBOURS


def offenders(names_to_imports):
    found = []
    for name, imported in sorted(names_to_imports.items()):
        known = {other for other in imported if layer_of(other)}
        found += [f"{name} imports {other}" for other in sorted(known) if not allowed(name, other)]
    return found


def test_every_module_has_a_place():
    assert not [name for name in IMPORTS if layer_of(name) is None]
    packages = {name_of(path) for path in (ROOT / "mezo").iterdir() if (path / "__init__.py").is_file()}
    assert packages <= {package for layer in LAYERS for package in layer}, "a new package needs a line in LAYERS"


def test_nothing_imports_upwards_or_its_neighbour():
    assert not offenders(IMPORTS)


def test_no_cycle_of_modules():
    target = lambda other: other if other in IMPORTS else other.rpartition(".")[0]  # noqa: E731
    modules = {name: {target(other) for other in found} & set(IMPORTS) for name, found in IMPORTS.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(modules[name]):
            visit(other)
        done.add(path.pop())

    for name in modules:
        visit(name)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("mezo.method.step", "mezo.training.trainer.Trainer"),
        ("mezo.data.task", "mezo.models.load"),
        ("mezo.runtimes.rows", "mezo.tasks.TASKS"),
        ("mezo.method.step", "mezo.config.Config"),
        ("mezo_kernels.ops", "mezo.errors.UserError"),
    ],
)
def test_the_list_forbids(importer, imported):
    assert offenders({importer: {imported}})


def test_kernels_know_no_model():
    tops = {other.split(".")[0] for name, found in IMPORTS.items() if inside(name, "mezo_kernels") for other in found}
    assert tops - set(sys.stdlib_module_names) - {"mezo_kernels"} <= LIBRARIES["mezo_kernels"]


def test_backends_agree_by_test_and_not_by_sharing_code():
    for mine in BACKENDS:
        others = tuple(backend for backend in BACKENDS if backend != mine)
        found = {other for name, own in IMPORTS.items() if inside(name, mine) for other in own}
        assert not [other for other in found if any(inside(other, backend) for backend in others)]


@pytest.mark.parametrize("library", ["transformers", "peft", "sglang", "matplotlib", "optuna"])
def test_model_libraries_stay_in_their_places(library):
    users = {name for name, found in IMPORTS.items() if any(inside(other, library) for other in found)}
    assert users
    assert not [name for name in users if not any(inside(name, place) for place in LIBRARIES[library])]


def test_training_knows_the_protocol_of_a_runtime_only():
    used = {other for name, found in IMPORTS.items() if inside(name, "mezo.training") for other in found}
    used = {other for other in used if inside(other, "mezo.runtimes")}
    assert used
    assert all(inside(other, "mezo.runtimes.base") for other in used)


def test_training_takes_groups_of_a_configuration_and_never_the_whole():
    used = {other for name, found in IMPORTS.items() if inside(name, "mezo.training") for other in found}
    assert {"mezo.config.Method", "mezo.config.Machine"} <= used
    assert not {"mezo.config", "mezo.config.Config", "mezo.config.Data", "mezo.config.Model"} & used


def test_no_grab_bags():
    tracked = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert not [path for path in tracked if path.name in ("utils.py", "common.py", "helpers.py", "misc.py")]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_light(package):
    """The optimizer and the ops cost an `import torch`, no model library and no compiler."""
    heavy = "transformers", "peft", "sglang", "numba", "triton"
    code = f"import sys, torch; before = set(sys.modules); import {package}; print(*(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert package in run.stdout.split()
    assert not {name.split(".")[0] for name in run.stdout.split()} & set(heavy)


def test_matplotlib_and_optuna_wait():
    """They take a second to import: a run needs one at its end alone, and only a sweep needs the other."""
    late = {"matplotlib", "optuna"}
    code = f"import sys, mezo.api, mezo.cli.tune, mezo.studies.demo; sys.exit(bool({late} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c import d\nfrom .base import e\nfrom ..optim import f\ndef g():\n    import peft\n"
    found = imports("mezo.runtimes.imagined", source)
    assert {"a.b", "c.d", "mezo.runtimes.base.e", "mezo.optim.f", "peft"} <= found


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]), ids=lambda path: path.name
)
def test_what_benches_and_examples_import_is_there(path):
    """Anywhere in a file: an import inside a function fails only when a measurement is under way."""
    for other in sorted(imports(path.stem, path.read_text())):
        module, _, name = other.rpartition(".")
        if inside(other, "mezo.runtimes.sglang"):
            pytest.importorskip("sglang")
        if other.partition(".")[0] in PACKAGES and module:
            assert other in IMPORTS or hasattr(importlib.import_module(module), name), other

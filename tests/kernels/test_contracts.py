"""What a caller reads: types of every parameter, and the contract of every function with three of them or more."""

import importlib
import inspect
import pkgutil

import pytest

import mezo_kernels

EXPORTED = {name: value for name in mezo_kernels.__all__ if inspect.isfunction(value := getattr(mezo_kernels, name))}


def functions():
    """Every public function and method that a module of the package defines, by name."""
    for found in pkgutil.walk_packages(mezo_kernels.__path__, "mezo_kernels."):
        module = importlib.import_module(found.name)
        own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
        for name, value in own.items():
            members = vars(value).items() if inspect.isclass(value) else [("", value)]
            for part, member in members:
                if inspect.isfunction(member) and not name.startswith("_") and not part.startswith("_"):
                    yield f"{module.__name__}.{name} {part}", member


def parameters(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_every_parameter_has_a_type():
    bare = [f"{name}: {p.name}" for name, f in functions() for p in parameters(f) if p.annotation is p.empty]
    assert not bare


@pytest.mark.parametrize("name", [name for name, function in EXPORTED.items() if len(parameters(function)) >= 3])
def test_contracts_say_what_goes_in_and_what_is_refused(name):
    text = inspect.getdoc(EXPORTED[name])
    before, _, rest = text.partition("Args:")
    arguments, _, refused = rest.partition("Raises:")
    assert before
    assert all(p.name in arguments for p in parameters(EXPORTED[name]))
    assert "ValueError: " in refused

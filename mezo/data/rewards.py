"""What generated text is worth: F1 over the right answers, or a Python function of the user's own."""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mezo.config import Method
from mezo.config.data import MEMORY
from mezo.data.answers import METRICS, best
from mezo.data.example import Example
from mezo.data.files import held
from mezo.errors import UserError

Judge = Callable[[Example, str], float]
"""How good a text is as the answer to an example; more is better."""


def judges(method: Method) -> dict[str, Judge]:
    """What judges the texts of a run, by the name that it is reported under.

    Args:
        method: f1 and exact_match are there if it generates for its task or trains f1, reward if it trains that.

    Raises:
        UserError: the reward cannot be loaded.
    """
    found: dict[str, Judge] = {}
    if method.generate == "on" or "f1" in method.objectives:
        found |= {name: _against_references(metric) for name, metric in METRICS.items()}
    if "reward" in method.objectives:
        found["reward"] = Reward(method.reward)
    return found


def _against_references(metric: Callable[[str, str], float]) -> Judge:
    return lambda example, output: best(metric, output, example.references)


class Reward:
    """A reward `fn(example, output) -> float` of the user's own, as a judge.

    Args:
        source: file.py:function, or module:function.

    Its arguments are a dict of the task's own fields and a text.

    Raises:
        UserError: there is no such file, module or function, or importing it fails.
    """

    def __init__(self, source: str):
        self.source = source
        place, _, name = source.rpartition(":")
        if source.startswith(MEMORY):
            self.function = held(place)
            return
        if not place or not name:
            raise UserError(f"--reward must be file.py:function or module:function, got {source!r}")
        self.function = getattr(_import(source, place), name, None)
        if not callable(self.function):
            raise UserError(f"--reward {source}: {place} has no function {name}: define it as {name}(example, output)")

    def __call__(self, example: Example, output: str) -> float:
        """The reward of an output. Raises UserError, naming the example, unless it is a finite number."""
        try:
            value = self.function(dict(example.fields), output)
        except Exception as error:
            raise UserError(
                f"--reward {self.source} raised {_named(error)} on {example.where} with the text"
                f" {output!r:.60}: a reward must take any text; correct it and start anew"
            ) from error
        number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
        if not number or not math.isfinite(value):
            raise UserError(
                f"--reward {self.source} gave {value!r:.60} for {example.where} with the text {output!r:.60}:"
                " it must be a finite number; correct it and start anew"
            )
        return float(value)


def reward_hash(source: str) -> str:
    """SHA-256 of the file that a reward is defined in; what that file imports is not covered."""
    place = source.rpartition(":")[0]
    if source.startswith(MEMORY):
        return hash_of_function(held(place))
    try:
        file = place if place.endswith(".py") else _origin(place)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"--reward {source}: {place} cannot be read ({error}): restore it") from error


def hash_of_function(function: Callable) -> str:
    """SHA-256 of the source of a function, or of its compiled code where there is no source."""
    try:
        content = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        content = repr(function).encode() if code is None else code.co_code + repr(code.co_consts).encode()
    return hashlib.sha256(content).hexdigest()


def trusted_reward(named: str, sha256: str | None, given: str, trusted: bool, run: str) -> str:
    """The reward of a run that is read back, once the user has said so and its file is the one the run had.

    A run directory may come from somebody else, and to import a reward is to run its code. Nothing is imported here.

    Args:
        named: the reward that the run names; "" for none.
        sha256: `reward_hash` of the run.
        given: what the user gives as --reward, "" for nothing.
        trusted: the user gives --trust-reward.
        run: for the error.
    Returns:
        `given`, else `named`.
    Raises:
        UserError: the user has not said so, or it is another file or function.
    """
    if not named:
        return given
    if not given and not trusted and not named.startswith(MEMORY):
        raise UserError(
            f"{run}: its reward {named} is Python code that this would run: read it and give --trust-reward, or"
            " --reward with your own copy"
        )
    source = given or named
    if source.rpartition(":")[2] != named.rpartition(":")[2]:
        raise UserError(f"--reward {source}: {run} has the function {named.rpartition(':')[2]}: give that one")
    if (found := reward_hash(source)) != sha256:
        raise UserError(
            f"--reward {source}: {run} was made with another file (reward_hash {sha256}, got {found}): give that one"
        )
    return source


def _origin(module: str) -> str:
    """The file of a module, found without running any package that it lies in."""
    top, *inner = module.split(".")
    spec, name = importlib.util.find_spec(top), top
    for part in inner:
        name = f"{name}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec.origin


def _import(source: str, place: str) -> ModuleType:
    """The module that a file or a dotted name stands for."""
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"--reward {source}: no such file: {place}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"mezo_reward_{Path(place).stem}", place)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickle look a class's module up
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: anything may go wrong in it
        raise UserError(f"--reward {source}: it cannot be imported ({_named(error)})") from error
    return module


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

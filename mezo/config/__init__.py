"""Configuration of a run: four groups of options, which refuse bad values before anything is loaded or written."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mezo.config.checks import check
from mezo.config.data import Data
from mezo.config.machine import HF, Machine, SGLang
from mezo.config.method import Method
from mezo.config.model import Full, Lora, LoraB, LoraXS, Model, Prefix
from mezo.config.options import (
    PATH,
    RESUMABLE,
    Option,
    build,
    check_ranges,
    flat,
    groups_of,
    options_of,
    over,
    refuse_strangers,
    shown,
    strangers,
    typed_values,
)
from mezo.config.workload import Workload
from mezo.errors import UserError

__all__ = [
    "HF",
    "Config",
    "Data",
    "Full",
    "Lora",
    "LoraB",
    "LoraXS",
    "Machine",
    "Method",
    "Model",
    "Prefix",
    "SGLang",
    "Workload",
]


@dataclass(frozen=True)
class Config:
    """Everything that says what a run does. `Config.of` makes one of flat options, as on the command line.

    Args:
        data, model, method, machine: its groups.
        given: flat names of the options that were given; the others have their defaults.

    >>> config = Config.of(model="m", output_dir="o", task="sst2", update_rule="momentum", momentum=0.5)
    >>> config.method.rule, config.replace(update_rule="sgd").method.rule
    (Momentum(momentum=0.5), SGD())
    """

    data: Data
    model: Model
    method: Method
    machine: Machine
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in groups_of(type(self)):
            check_ranges(getattr(self, name))
        check(self)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option by its flat name."""
        return options_of(cls)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A configuration from flat options.

        Raises:
            UserError: an unknown name, a value of another type or outside its range, an option that belongs to a
                tuning, runtime or update rule that is not chosen, or options that no run can have together.
        """
        values = typed_values(cls.options(), values)
        refuse_strangers(cls.options(), values)
        groups = {name: build(group, values) for name, group in groups_of(cls).items()}
        return cls(**groups, given=frozenset(values))

    @classmethod
    def of_run(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from a run's config.json.

        It may hold options of tunings, runtimes and rules that were not chosen, as programs before this one wrote all.
        They are left out where they have their default, or say nothing about what is computed.
        """
        options = cls.options()
        values = typed_values(options, values)
        idle = {o.name for o, _ in strangers(options, values) if RESUMABLE in o.marks or values[o.name] == o.default}
        return cls.of(**{name: value for name, value in values.items() if name not in idle})

    def to_dict(self) -> dict[str, Any]:
        """Flat options: `Config.of(**config.to_dict())` is the same configuration."""
        values: dict[str, Any] = {}
        for name in groups_of(type(self)):
            values |= flat(getattr(self, name))
        return values

    @property
    def for_runtime(self) -> tuple[Model, Machine, Workload]:
        """What a runtime is made of: its first three arguments."""
        method = self.method
        work = Workload(
            rule=method.logged_rule,
            steps=method.steps,
            batch_size=method.batch_size,
            perturbations=method.perturbations,
            directions=method.directions,
            seed=method.seed,
            objectives=tuple(method.objectives),
            scores=method.scores,
            max_new_tokens=method.max_new_tokens if method.generates else 0,
            classes=len(self.data.label_words),
        )
        return self.model, self.machine, work

    def changes(self) -> dict[str, Any]:
        """Flat options that are not at their default."""
        options = self.options()
        return {name: value for name, value in self.to_dict().items() if value != options[name].default}

    def to_json(self) -> str:
        """The configuration as it is written to config.json."""
        return json.dumps(self.to_dict(), indent=2)

    def replace(self, **changes: Any) -> Self:
        """The same configuration with other flat options; another tuning, runtime or rule comes with its defaults.

        Raises:
            UserError: as `of`.
        """
        values = over(self.options(), self.to_dict(), changes)
        made = type(self).of(**values)
        return dataclasses.replace(made, given=(self.given | changes.keys()) & values.keys())

    def absolute(self) -> Self:
        """The same configuration, valid from any working directory."""
        options, values = self.options(), self.to_dict()
        paths = {n: str(Path(v).absolute()) for n, v in values.items() if PATH in options[n].marks and _exists(v)}
        file, colon, function = self.method.reward.rpartition(":")
        if file.endswith(".py"):
            paths["reward"] = f"{Path(file).absolute()}{colon}{function}"
        return dataclasses.replace(self.replace(**paths), given=self.given)


def _exists(path: str) -> bool:
    return bool(path) and Path(path).exists()


def refuse_contradiction(given: Mapping[str, Any], fixed: Mapping[str, Any], target: str) -> None:
    """Raise UserError if an option that was given says otherwise than what is fixed, whatever its default is.

    Args:
        given: flat options.
        fixed: those that leave no choice: a run's own, or what an adapter is.
        target: what fixes them, for the message.
    """
    for name, value in given.items():
        if name in fixed and _unordered(value) != _unordered(fixed[name]):
            flag = Config.options()[name].flag
            raise UserError(f"{flag} {shown(value)} contradicts {target}, which has {shown(fixed[name])}: leave it out")


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, (tuple, list)) else value

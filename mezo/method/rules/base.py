"""The update rule of a run: what is done with an estimate, and which parameters weight decay leaves alone."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mezo.config import Config
from mezo.config.checks import ONE_SIDED, STATEFUL
from mezo.errors import UserError
from mezo_kernels import Rule
from mezo_kernels.philox import STREAMS


@dataclass(frozen=True)
class UpdateRule:
    """How the updates of a log move theta; written to the header of a log that has another rule than plain SGD.

    Args:
        name: as --update-rule has it. "conservative" and "fzoo" move theta as "sgd" does, by other coefficients.
        beta1, beta2, eps, l2: of `mezo_kernels.Rule`.
        no_decay: patterns of canonical names that weight decay leaves alone, as a shell has them.
        distribution: of z.
        normalised: coefficients are over the root mean square of z, as the perturbations were; replay takes them as
            they are.

    >>> UpdateRule("adam").bytes, UpdateRule().bytes
    (8, 0)
    """

    name: str = "sgd"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0
    no_decay: tuple[str, ...] = ()
    distribution: str = "normal"
    normalised: bool = False

    @classmethod
    def of(cls, config: Config, names: Iterable[str]) -> "UpdateRule":
        """The rule of a run that trains parameters of these names. Raises UserError for a pattern that fits none."""
        for pattern in config.no_decay:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"--no-decay {pattern} fits no trained parameter; {next(iter(names))} is one")
        l2 = config.weight_decay if config.update_rule == "adam" else 0.0
        beta1 = config.momentum if config.update_rule == "momentum" else config.beta1
        z = config.distribution, config.normalise_z
        return cls(config.update_rule, beta1, config.beta2, config.adam_eps, l2, config.no_decay, *z)

    @classmethod
    def of_header(cls, first_line: dict) -> "UpdateRule":
        """The rule of a log. Raises UserError if this program does not know it."""
        values = first_line.get("rule", {})
        try:
            rule = cls(**{**values, "no_decay": tuple(values.get("no_decay", ()))})
            if rule.name in STATEFUL:
                rule.fused(True)
            elif rule.name not in ("sgd", "conservative", "fzoo"):
                raise ValueError(f"unknown rule {rule.name!r}")
            if rule.distribution not in STREAMS:
                raise ValueError(f"unknown distribution {rule.distribution!r}")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the log's update rule cannot be applied ({error}); use the program that wrote it"
            ) from error
        return rule

    def header(self) -> dict | None:
        """What the header of a log holds of it; None of plain SGD, whose logs are those of version 1."""
        if self.name == "sgd" and not (self.no_decay or self.normalised):
            return None
        values = {**dataclasses.asdict(self), "no_decay": list(self.no_decay)}
        own = {"distribution": self.distribution != "normal", "normalised": self.normalised}
        return {name: value for name, value in values.items() if own.get(name, True)}

    def fused(self, decays: bool) -> Rule | None:
        """The fused rule with state, or None where `step_` does it all; `decays`: for parameters that decay."""
        if self.name not in STATEFUL:
            return None
        return Rule(self.name, self.beta1, self.beta2, self.eps, self.l2 if decays else 0.0)

    @property
    def bytes(self) -> int:
        """Bytes of state for each trained parameter."""
        rule = self.fused(True)
        return 4 * rule.states if rule else 0

    @property
    def one_sided(self) -> bool:
        """Whether an estimate compares theta + eps z with theta itself."""
        return self.name in ONE_SIDED

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on the parameter of this canonical name."""
        return not any(fnmatchcase(name, pattern) for pattern in self.no_decay)

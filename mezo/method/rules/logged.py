"""A rule as the header of a log holds it: what is needed to apply the log's updates, and no more."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mezo.errors import UserError
from mezo.method.rules.base import RULES, Rule
from mezo.method.rules.sgd import SGD

if TYPE_CHECKING:
    from mezo_kernels import Rule as Kernel

CONSTANTS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
"""Keys of a header's rule that every log has, with what stands there for a rule without them."""


@dataclass(frozen=True)
class LoggedRule:
    """How the updates of a log move theta; in the header of every log whose rule is not plain descent.

    Args:
        rule: the update rule.
        l2: weight decay as part of the gradient, of Adam alone.
        no_decay: patterns of canonical names that weight decay leaves alone, as a shell has them.
        normalised: coefficients are over the root mean square of z, as the perturbations were; replay takes them as
            they are.
        anchored: decay goes towards theta_0, not zero.

    >>> LoggedRule(RULES["momentum"](0.5)).header()["beta1"], LoggedRule().header()
    (0.5, None)
    """

    rule: Rule = field(default_factory=SGD)
    l2: float = 0.0
    no_decay: tuple[str, ...] = ()
    normalised: bool = False
    anchored: bool = False

    @classmethod
    def of_header(cls, first_line: dict) -> "LoggedRule":
        """The rule of a log. Raises UserError if this program does not know it."""
        from mezo_kernels.philox import STREAMS

        values = dict(first_line.get("rule", {}))
        try:
            rule = RULES[values.pop("name", "sgd")]
            constants = {key: values.pop(key, value) for key, value in CONSTANTS.items()}
            distribution = values.pop("distribution", "normal")
            if distribution not in STREAMS:
                raise ValueError(f"unknown distribution {distribution!r}")
            if distribution != rule.distribution:
                raise ValueError(f"{rule.name} along z of distribution {distribution!r}")
            own = {key: values.pop(key) for key in rule.logged_as.values() if key not in constants}
            options = {option: (constants | own)[key] for option, key in rule.logged_as.items()}
            logged = cls(rule(**options), **{**values, "no_decay": tuple(values.get("no_decay", ()))})
            logged.kernel(True)
        except KeyError as error:
            raise UserError(f"the log's update rule cannot be applied (unknown rule {error}); {REMEDY}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"the log's update rule cannot be applied ({error}); {REMEDY}") from error
        return logged

    def header(self) -> dict | None:
        """What the header of a log holds of it; None of plain descent, whose logs are those of version 1."""
        if isinstance(self.rule, SGD) and not (self.no_decay or self.normalised or self.anchored):
            return None
        constants = CONSTANTS | {key: getattr(self.rule, option) for option, key in self.rule.logged_as.items()}
        values = {"name": self.rule.name, **constants, "l2": self.l2, "no_decay": list(self.no_decay)}
        if self.rule.distribution != "normal":
            values["distribution"] = self.rule.distribution
        return values | {key: True for key in ("normalised", "anchored") if getattr(self, key)}

    def kernel(self, decays: bool) -> "Kernel | None":
        """The fused op's rule, None where `step_` does it all; `decays`: for parameters that weight decay acts on."""
        return self.rule.kernel(self.l2 if decays else 0.0)

    def decays(self, name: str) -> bool:
        """Whether weight decay acts on the parameter of this canonical name."""
        return not any(fnmatchcase(name, pattern) for pattern in self.no_decay)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise UserError for a pattern of `no_decay` that fits none of the trained parameters."""
        names = list(names)
        for pattern in self.no_decay:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"--no-decay {pattern} fits no trained parameter; {names[0]} is one")


REMEDY = "use the program that wrote it"

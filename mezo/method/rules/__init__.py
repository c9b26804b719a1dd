"""Update rules: what moves theta. A new rule is a file here and a line in RULES."""

from mezo.method.rules.base import Rule
from mezo.method.rules.conservative import Conservative
from mezo.method.rules.fzoo import FZOO
from mezo.method.rules.sgd import SGD
from mezo.method.rules.stateful import Adam, AdamW, Momentum, Sign

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (SGD, Momentum, Adam, AdamW, Sign, Conservative, FZOO)}
"""By the name that `--update-rule` and `MeZO(rule=...)` take."""

__all__ = ["RULES", "Rule"]

"""Update rules: what moves theta. A new rule is a file in this folder, and nothing else."""

import importlib
import pkgutil

from mezo.method.rules.base import RULES, Rule

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["RULES", "Rule"]

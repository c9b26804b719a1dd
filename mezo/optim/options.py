"""Options of a param group: what its rule has of them, their ranges, and what all groups must have alike."""

import dataclasses
import math

from mezo.method.rules import RULES, Rule
from mezo.ranges import outside
from mezo_kernels.philox import STREAMS, check_seed

OF_ALL = ("eps", "seed", "num_perturbations", "distribution", "normalise_z")
"""Options that all groups must have alike."""
COUNTS = ("steps", "skipped_steps", "projected_grads", "moments")
"""What a step leaves. It stands in every group: whatever saves an optimizer carries its groups, and often no more."""
_FIELD = {"momentum": "momentum", "betas": "beta1", "adam_eps": "adam_eps", "elite_share": "elite_share",
          "refresh_every": "refresh_every"}  # fmt: skip
"""Options that some rules have, and the field by which these are known."""


def rule_of(group: dict) -> Rule:
    """The rule of a param group, with the options it has there."""
    options = {name: group[name] for name in defaults_of(group["rule"])}
    if "betas" in options:
        options["beta1"], options["beta2"] = options.pop("betas")
    return RULES[group["rule"]](**options)


def defaults_of(rule: str) -> dict:
    """What a rule has of the options in `_FIELD`, and their defaults."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(sorted(RULES))}; got {rule!r}")
    fields = {field.name: field.default for field in dataclasses.fields(RULES[rule])}
    defaults = {name: fields[field] for name, field in _FIELD.items() if field in fields}
    return defaults | ({"betas": (fields["beta1"], fields["beta2"])} if "betas" in defaults else {})


def fill_in(group: dict, strict: bool = True) -> None:
    """Give a group the defaults of its rule, and take away options of other rules.

    Args:
        group: changed in place.
        strict: raise ValueError for a value given to an option of another rule.
    """
    defaults = defaults_of(group["rule"])
    for name in _FIELD:
        given = group.pop(name, None)
        if strict and given is not None and name not in defaults:
            rules = " or ".join(rule for rule in RULES if name in defaults_of(rule))
            raise ValueError(f"{name} is of the rule {rules}, not of {group['rule']}: leave it out, or give rule=")
        if name in defaults:
            group[name] = defaults[name] if given is None else given


def check_options(group: dict) -> None:
    """Raise ValueError for a value that a group cannot have."""
    for name, inside, text in (
        ("lr", lambda v: v >= 0, ">= 0"),
        ("eps", lambda v: v > 0, "> 0"),
        ("weight_decay", lambda v: v >= 0, ">= 0"),
    ):
        if not (math.isfinite(group[name]) and inside(group[name])):
            raise ValueError(f"{name} must be a finite number {text}, got {group[name]}")
    for option, why in outside(rule_of(group)):
        raise ValueError(f"{option} {why}")
    if group["anchored_decay"] and rule_of(group).l2(group["weight_decay"]):
        raise ValueError(f"anchored_decay: {group['rule']} has decay in the gradient, towards zero; give rule='adamw'")
    check_seed(group["seed"])
    if not isinstance(group["num_perturbations"], int) or group["num_perturbations"] < 1:
        raise ValueError(f"num_perturbations must be an integer >= 1, got {group['num_perturbations']!r}")
    if group["distribution"] not in (None, *STREAMS):
        raise ValueError(f"distribution must be one of {', '.join(STREAMS)}; got {group['distribution']!r}")


def check_alike(groups: list[dict]) -> None:
    """Raise ValueError where groups differ in what a step has once."""
    for name in OF_ALL:
        values = [group[name] for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(f"a step has one {name}: give all param groups the same, got {values}")


def rule_of_all(groups: list[dict]) -> Rule:
    """The rule that says what a step measures; groups may differ in rules that measure both signs and no more."""
    check_alike(groups)
    rules = {group["rule"]: rule_of(group) for group in groups}
    if len(periods := {rule_of(group).period for group in groups}) > 1:
        raise ValueError(f"a step has one refresh_every: give all param groups the same, got {sorted(periods)}")
    for rule in rules.values():
        if len(rules) > 1 and (rule.one_sided or rule.compares or rule.guides or rule.remembers):
            raise ValueError(
                f"{rule.name} measures in its own way: give all param groups the same rule, got {sorted(rules)}"
            )
        refused = rule.refusals(
            num_perturbations=groups[0]["num_perturbations"],
            weight_decay=max(group["weight_decay"] for group in groups),
            normalise_z=groups[0]["normalise_z"],
        )
        for option, why in refused:
            raise ValueError(f"{option} {why}")
    return next(iter(rules.values()))

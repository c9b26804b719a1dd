"""Ranges that stand on the fields of a dataclass, such as `lr: Annotated[float, Gt(0)]`, and values outside of them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

LARGEST, SMALLEST = 3.4028234663852886e38, 2.0**-126
"""Largest and smallest normal float32."""
AtLeastOne = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
NotBelowZero = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Ge(SMALLEST), Le(LARGEST)]
"""A float32 above 0."""

WORDS = {Ge: ("ge", "at least {}"), Gt: ("gt", "above {}"), Le: ("le", "at most {}"), Lt: ("lt", "below {}")}
HOLDS = {
    Ge: lambda value, bound: value >= bound,
    Gt: lambda value, bound: value > bound,
    Le: lambda value, bound: value <= bound,
    Lt: lambda value, bound: value < bound,
}


def outside(instance) -> Iterator[tuple[str, str]]:
    """(field, what it must be and what came) of every field of a dataclass whose number is outside its range.

    A number that is not finite is outside every range; None stands for a value that was not given.

    Args:
        instance: of a dataclass whose fields are annotated with Ge, Gt, Le and Lt of `annotated_types`.

    >>> @dataclasses.dataclass
    ... class Run:
    ...     momentum: Share = 0.9
    >>> list(outside(Run(1.0))), list(outside(Run()))
    ([('momentum', 'must be at least 0 and below 1, got 1.0')], [])
    """
    hints = get_type_hints(type(instance), include_extras=True)
    for field in dataclasses.fields(instance):
        value, bounds = getattr(instance, field.name), _bounds(hints[field.name])
        if not bounds or value is None:
            continue
        if not math.isfinite(value) or not all(HOLDS[type(b)](value, getattr(b, WORDS[type(b)][0])) for b in bounds):
            texts = [WORDS[type(b)][1].format(_number(getattr(b, WORDS[type(b)][0]))) for b in bounds]
            range_ = "a float32 number above 0" if bounds == [*Positive.__metadata__] else " and ".join(texts)
            yield field.name, f"must be {range_}, got {value}"


def _bounds(hint) -> list:
    """Ge, Gt, Le and Lt of an annotation, of `X | None` too."""
    if get_origin(hint) is Annotated:
        return [mark for mark in hint.__metadata__ if type(mark) in HOLDS]
    return [mark for part in get_args(hint) for mark in _bounds(part)]


def _number(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)

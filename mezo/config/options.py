"""Options as fields of dataclasses: their flat names, ranges and texts; from flat values to dataclasses and back.

A group, such as `Data`, is a frozen dataclass whose fields are options. A choice, such as `Model.tuning`, is a field
that holds one of several kinds, each a frozen dataclass with a `name` and with options of its own. On the command line,
in YAML and in config.json names are flat: `tuning: lora, r: 8`.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mezo.errors import UserError, require
from mezo.ranges import outside

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Named:
    """Mark of a field whose flat name is not that of the field."""

    name: str


@dataclass(frozen=True)
class Choice:
    """Mark of a field that holds one of several kinds.

    Args:
        name: flat name of the choice, such as "tuning".
        kinds: name of each kind -> its dataclass.
    """

    name: str
    kinds: Mapping[str, type]

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Mark:
    """Mark of a field; see the three below."""

    name: str


REQUIRED = Mark("required")
"""There is no run without it."""
RESUMABLE = Mark("resumable")
"""It says where, how or how far a run is computed, not what: a resumed run may have another."""
PATH = Mark("path")
"""It may be a path, which is made absolute before it is written down."""


@dataclass(frozen=True)
class Option:
    """A field as the command line, YAML and config.json see it.

    Args:
        name: flat name.
        type: of its values, without marks.
        default: where none is given.
        text: what the field's docstring says.
        section: the dataclass that declares it.
        choice: flat name of the choice that it belongs to, "" if it belongs to every run.
        kinds: names of the kinds of that choice that have it.
        summaries: (name, what it is) of each kind, if the option is itself a choice.
        marks: of the field.
    """

    name: str
    type: Any
    default: Any
    text: str
    section: type
    choice: str = ""
    kinds: tuple[str, ...] = ()
    summaries: tuple[tuple[str, str], ...] = ()
    marks: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        """As on the command line."""
        return flag_of(self.name)

    @property
    def owner(self) -> str:
        """Whose it is, such as "--tuning lora or prefix"; "" if it belongs to every run."""
        *others, last = sorted(self.kinds) or [""]
        return f"{flag_of(self.choice)} {', '.join(others)}{' or ' if others else ''}{last}" if self.choice else ""


def flag_of(name: str) -> str:
    """The flag of a flat name.

    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def options_of(root: type) -> dict[str, Option]:
    """Every option by its flat name: those of the groups that are the fields of `root`, in order.

    Args:
        root: a dataclass; its fields that are dataclasses are groups.
    """
    found: dict[str, Option] = {}
    for group in groups_of(root).values():
        found |= options_in(group)
    return found


def groups_of(root: type) -> dict[str, type]:
    """Field name -> group, of the fields that are dataclasses."""
    hints = get_type_hints(root)
    return {
        field.name: hints[field.name] for field in fields(root) if hasattr(hints[field.name], "__dataclass_fields__")
    }


def options_in(group: type, choice: str = "", kind: str = "") -> dict[str, Option]:
    """The options of one dataclass by flat name; those of a choice's kinds come after it.

    Args:
        group: with the options as its fields.
        choice: flat name of the choice, if the dataclass is a kind of one.
        kind: its own name among the kinds.
    """
    found: dict[str, Option] = {}
    for name, plain, marks, field in _fields(group):
        section, text = _declared(group, field.name)
        mine = {"text": text, "section": section, "marks": marks}
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if (pick := _choice(marks)) is None:
            found[name] = Option(name, plain, default, choice=choice, kinds=(kind,) if kind else (), **mine)
            continue
        summaries = tuple((each, kind_chosen.summary) for each, kind_chosen in pick.kinds.items())
        found[name] = Option(name, Literal[tuple(pick.kinds)], default.name, summaries=summaries, **mine)
        for each, kind_chosen in pick.kinds.items():
            for option in options_in(kind_chosen, name, each).values():
                before = found.get(option.name)
                found[option.name] = _joined(before, option) if before else option
    return found


def _joined(one: Option, other: Option) -> Option:
    """An option that several kinds have."""
    return Option(**{**vars(one), "kinds": one.kinds + other.kinds})


def build(group: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from flat values; it takes those that are its own."""
    chosen = {}
    for name, _, marks, field in _fields(group):
        if (pick := _choice(marks)) is not None:
            kind = pick.kinds[values[name]] if name in values else type(field.default)
            chosen[field.name] = build(kind, values)
        elif name in values:
            chosen[field.name] = values[name]
    return group(**chosen)


def flat(instance: Any) -> dict[str, Any]:
    """Flat values of a dataclass: what `build` makes it of."""
    found: dict[str, Any] = {}
    for name, _, marks, field in _fields(type(instance)):
        value = getattr(instance, field.name)
        found |= {name: value} if _choice(marks) is None else {name: value.name, **flat(value)}
    return found


def check_ranges(instance: Any) -> None:
    """Raise UserError for a number outside the range that stands on its field."""
    for name, why in outside(instance):
        raise UserError(f"{flag_of(name)} {why}")
    for _, _, marks, field in _fields(type(instance)):
        if _choice(marks) is not None:
            check_ranges(getattr(instance, field.name))


def typed_values(options: Mapping[str, Option], values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values, each of its option's type. Raises UserError for an unknown name or a value of another type."""
    for name in values:
        if name not in options:
            raise UserError(f"unknown configuration key {name!r:.200}; known keys: {', '.join(options)}")
    return {name: typed(name, value, options[name].type) for name, value in values.items()}


def strangers(options: Mapping[str, Option], values: Mapping[str, Any]) -> Iterator[tuple[Option, str]]:
    """(option, the kind that is chosen) of values whose option belongs to a kind that is not."""
    for name in values:
        option = options[name]
        if option.choice:
            chosen = values.get(option.choice, options[option.choice].default)
            if chosen not in option.kinds:
                yield option, chosen


def refuse_strangers(options: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Raise UserError for a value whose option belongs to a kind that is not chosen, whatever the value."""
    for option, chosen in strangers(options, values):
        raise UserError(
            f"{option.flag} {shown(values[option.name])} belongs to {option.owner}, and this run has"
            f" {flag_of(option.choice)} {chosen}: leave it out, or choose {option.owner}"
        )


def over(options: Mapping[str, Option], base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `base`; another kind of a choice leaves the base's options of the former kind behind.

    Args:
        options: all there are, by flat name.
        base, given: values by flat name.
    """
    left = {option.name for option, _ in strangers(options, {**base, **given})} - set(given)
    return {name: value for name, value in {**base, **given}.items() if name not in left}


def shown(value: Any) -> str:
    """A value as in an error."""
    return " ".join(map(str, value)) or "(nothing)" if isinstance(value, tuple) else str(value)


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: YAML reads 1e-3 as text, and a list of one item may be written as the item.

    Args:
        name: of the option, for the error.
        value: as it was read.
        kind: str, int, float, bool, a Literal, a number or a Literal, or a tuple of any length of one of these.
    """
    options = get_args(kind)
    if get_origin(kind) in (Union, UnionType):  # a number, or one of a few words
        number, words = options
        return value if value in get_args(words) else typed(name, value, number)
    if get_origin(kind) is Literal:
        require(value in options, f"{name} must be one of {', '.join(options)}; got {value!r}")
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(typed(name, item, options[0]) for item in items)
    if kind is float and (isinstance(value, int | str) and not isinstance(value, bool)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    fits = type(value) is kind and (kind is not int or abs(value) <= 2**64)
    require(fits, f"{name} must be {KINDS[kind]}, got {value!r:.200}")
    return value


@functools.cache
def _fields(group: type) -> list[tuple[str, Any, tuple, Any]]:
    """(flat name, type, marks, field) of every field of a dataclass."""
    plain, marked = get_type_hints(group), get_type_hints(group, include_extras=True)
    found = []
    for field in fields(group):
        hint = marked[field.name]
        marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
        names = [mark.name for mark in marks if isinstance(mark, Named | Choice)]
        found.append((names[0] if names else field.name, plain[field.name], marks, field))
    return found


def _choice(marks: tuple) -> Choice | None:
    return next((mark for mark in marks if isinstance(mark, Choice)), None)


def _declared(group: type, field: str) -> tuple[type, str]:
    """The class that declares a field, and the docstring below it."""
    for parent in group.__mro__:
        if field in vars(parent).get("__annotations__", {}):
            return parent, _texts(parent).get(field, "")
    return group, ""


@functools.cache
def _texts(group: type) -> dict[str, str]:
    """Docstrings of fields: the string below each, which Python itself does not keep."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(group))).body
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        value = getattr(below, "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(value, ast.Constant):
            found[field.target.id] = " ".join(str(value.value).split())
    return found

"""What a task is, and how its rows become records with one form: fields, options, label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mezo.config import UserError


@dataclass(frozen=True)
class Task:
    """A data set with its prompt. A task of your own is one of these, passed to `mezo.tasks.register`.

    Args:
        name: what `--task` takes.
        load: returns the rows by split ("train", and optionally "dev" and "test"), each a mapping of field names to
            values: with label words the row has `label`, an index into them; without, it has `options` (a list of
            strings) and `answer` (an index, or the option's text).
        template: the default prompt, such as "{text} It was".
        label_words: the default options, one per class, or () where each row brings its own.
        text_field: the only field that is shortened where a prompt exceeds the token budget; None: none is.
        dev_size: examples cut from train for dev, at most a tenth of it, where there is no dev split and the run asks
            for no number; 0: no dev.
        sources: the file behind each split, for error messages.

    >>> Task("mine", lambda: {"train": [{"text": "Fun.", "label": 1}]}, "{text} It was", (" bad", " good")).name
    'mine'
    """

    name: str
    load: Callable[[], dict[str, list[dict[str, Any]]]]
    template: str = "{text}"
    label_words: tuple[str, ...] = ()
    text_field: str | None = "text"
    dev_size: int = 500
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One checked row.

    Args:
        fields: the values that the template takes.
        options: the possible answers as text.
        label: index of the right one.
        where: file and line, for error messages.
    """

    fields: dict[str, str]
    options: tuple[str, ...]
    label: int
    where: str


def check_rows(
    rows: Sequence[Mapping[str, Any]],
    source: str,
    template_fields: Sequence[str],
    label_words: Sequence[str] = (),
    min_options: int = 2,
) -> list[Record]:
    """Records of one split.

    Args:
        rows: as `Task.load` returns them.
        source: the file or split, for error messages; row i is its line i + 1.
        template_fields: fields that each row must have.
        label_words: the options of every row; without them each row has `options` and `answer`.
        min_options: the fewest options a row may bring.

    Raises:
        UserError: no rows, a missing field, a label or answer that is none of the options.

    >>> check_rows([{"text": "Fun.", "label": 1}], "a.jsonl", ["text"], [" bad", " good"])[0].label
    1
    """
    if not rows:
        raise UserError(f"{source} is empty: give at least one example")
    records = []
    for line, row in enumerate(rows, 1):
        where = f"{source} line {line}"
        fields = {name: _field(row, name, where) for name in template_fields}
        if label_words:
            options, label = tuple(label_words), _label(row, len(label_words), where)
        else:
            options = _options(row, min_options, where)
            label = _answer(row, options, where)
        records.append(Record(fields, options, label, where))
    return records


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise UserError(f"{where} has no field {name!r}, which the prompt takes; it has {_names(row)}: change --prompt")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: field {name!r} must be a string or a number, got {value!r:.60}")
    return _encodable(str(value), name, where)


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}: repair it"
        ) from None
    return text


def _label(row: Mapping[str, Any], classes: int, where: str) -> int:
    if "label" not in row:
        raise UserError(f"{where} has no field 'label'; it has {_names(row)}: add the index of the right label word")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
        raise UserError(
            f"{where}: label must be an index into the {classes} label words (0 to {classes - 1}), got {label!r:.60}"
        )
    return label


def _options(row: Mapping[str, Any], min_options: int, where: str) -> tuple[str, ...]:
    if "options" not in row:
        remedy = "give --label-words" if "label" in row else "add the possible answers"
        raise UserError(f"{where} has no field 'options'; it has {_names(row)}: {remedy}")
    options = row["options"]
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) and option for option in options):
        raise UserError(f"{where}: options must be a list of non-empty strings, got {options!r:.60}")
    if len(options) < min_options:
        raise UserError(f"{where}: options must be at least {min_options}, got {len(options)}: add the wrong answers")
    if len(set(options)) < len(options):
        raise UserError(f"{where}: two options are equal: {list(options)!r:.60}: drop one")
    return tuple(_encodable(option, "options", where) for option in options)


def _answer(row: Mapping[str, Any], options: Sequence[str], where: str) -> int:
    if "answer" not in row:
        raise UserError(f"{where} has no field 'answer'; it has {_names(row)}: add the right option or its index")
    answer = row["answer"]
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    raise UserError(
        f"{where}: answer must be one of the {len(options)} options or its index from 0, got {answer!r:.60}"
    )


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"

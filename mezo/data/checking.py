"""Rows as they are stored to items of one form: fields, options, label; each mistake named with its line."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from mezo.data.task import Item, Row, Task
from mezo.errors import UserError
from mezo.progress import say

SHOWN = 10  # bad rows that an error lists


def items_of(
    task: Task,
    split: str,
    rows: Iterable[Row | UserError],
    template_fields: Sequence[str],
    label_words: Sequence[str] = (),
    min_options: int = 2,
    skip_bad: bool = False,
    read: Callable[[Row, str], Iterator[Row]] | None = None,
) -> tuple[list[Item], int]:
    """Checked items of one split, and how many bad rows were skipped; rows without an answer are left out.

    Args:
        task: whose rows they are.
        split: its name; row i is line i + 1 of the split's source.
        rows: as they are stored; an error in place of one that could not be read.
        template_fields: fields that each row must have.
        label_words: the options of every row; without them each row has `options` and `answer`.
        min_options: the fewest options a row may bring; 0: it may have none and no answer either.
        skip_bad: leave out rows with a missing field, or a label or answer that is none of the options.
        read: makes rows of this form of a row and of the place that messages name; None takes them as they are.

    Raises:
        UserError: no rows, or bad ones; it has the first ten of them, and how often each thing is wrong.

    >>> task = Task("mine", dict)
    >>> items_of(task, "train", [{"text": "Fun.", "label": 1}], ["text"], [" bad", " good"])[0][0].label
    1
    """
    source, unit = task.sources.get(split, f"{task.name} {split}"), task.counted.get(split, "line")
    items, bad, line = [], [], 0
    for line, stored in enumerate(rows, 1):
        where = f"{source} {unit} {line}"
        try:
            items += items_of_row(task, stored, where, template_fields, label_words, min_options, read)
        except UserError as error:
            bad.append(error)
    if bad and not (skip_bad and items):
        raise all_of(bad, source, line)
    if not items:
        what = "has no row with a known answer" if line else "is empty"
        raise UserError(f"{source} {what}: give at least one example")
    if bad:
        say_skipped(bad, source, line)
    return items, len(bad)


def items_of_row(
    task: Task,
    stored: Row | UserError,
    where: str,
    template_fields: Sequence[str],
    label_words: Sequence[str],
    min_options: int,
    read: Callable[[Row, str], Iterator[Row]] | None,
) -> list[Item]:
    """The items of one row: one, or one for each turn of a conversation. See `items_of`; `where` is for messages."""
    row = _answered(task, stored, where)
    if row is None:
        return []
    return [
        _item(each, where, template_fields, label_words, min_options) for each in (read(row, where) if read else (row,))
    ]


def say_skipped(bad: Sequence[UserError], source: str, rows: int) -> None:
    """Say how many rows are left out, and why."""
    say(f"{source}: {len(bad)} of {rows} rows are skipped: {_counted(_reasons(bad, source))}")


def all_of(bad: Sequence[UserError], source: str, rows: int) -> UserError:
    """One error of those of several rows: the first ten, and how often each thing is wrong."""
    reasons = _reasons(bad, source)
    if len(bad) == 1:
        return bad[0]
    if len(bad) == rows and len(reasons) == 1:  # the options are wrong, not the rows
        return UserError(f"{bad[0]}; so it is with all {rows} rows")
    head = f"{source}: {len(bad)} of {rows} rows cannot be used ({_counted(reasons)})"
    shown = "".join(f"\n  {error}" for error in bad[:SHOWN])
    return UserError(f"{head}: correct them, or leave them out with --skip-bad-rows{shown}")


def _counted(reasons: Counter) -> str:
    return ", ".join(
        f"{count} {'time' if count == 1 else 'times'}: {reason}" for reason, count in reasons.most_common()
    )


def _reasons(bad: Sequence[UserError], source: str) -> Counter:
    """How often each thing is wrong; what is said of a single row after it is left out."""
    prefix = re.compile(rf"{re.escape(source)} (line|row) \d+:? ")
    return Counter(re.split(r", got |; it has | \(|: ", prefix.sub("", str(error)))[0] for error in bad)


def _answered(task: Task, stored: Row | UserError, where: str) -> Row | None:
    if isinstance(stored, UserError):  # a line that could not be read
        raise stored
    try:
        return task.row(stored)
    except KeyError as error:
        missing = error.args[0]
        raise UserError(
            f"{where} has no field {missing!r}, which task {task.name} takes; it has {_names(stored)}: add it"
        ) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not as task {task.name} stores its rows ({error}): correct it") from error


def _item(row: Row, where: str, template_fields: Sequence[str], label_words: Sequence[str], min_options: int) -> Item:
    fields = {name: _field(row, name, where) for name in template_fields}
    if label_words:
        options, label = tuple(label_words), _label(row, len(label_words), where)
        return Item(fields, options, label, where, references=(options[label].strip(),), row=row)
    if not min_options and "options" not in row:
        return Item(fields, (), 0, where, row=row)
    options = _options(row, min_options, where)
    label = _answer(row, options, where)
    references = _texts(row, "references", where) or (options[label].strip(),)
    names = _texts(row, "option_names", where)
    if names and (len(names) != len(options) or names[label] not in references):
        wanted = "option_names must be one an option, the right one's among references"
        raise UserError(f"{where}: {wanted}, got {names!r:.60}: correct them")
    return Item(fields, options, label, where, references=references, names=names, row=row)


def _texts(row: Row, name: str, where: str) -> tuple[str, ...]:
    """A field that lists texts, or () where the row has none."""
    texts = row.get(name) or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{where}: {name} must be a list of non-empty strings, got {texts!r:.60}: correct it")
    return tuple(_encodable(text, name, where) for text in texts)


def _field(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise UserError(
            f"{where} has no field {name!r}, which the prompt takes; it has {_names(row)}: {_remedy(row, name)}"
        )
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: field {name!r} must be a string or a number, got {value!r:.60}")
    return _encodable(str(value), name, where)


def _remedy(row: Row, missing: str) -> str:
    if missing == "prompt" and "label" in row:
        return "give --label-words, the word of each label in order"
    return "change --prompt, or give --text-column" if missing in ("text", "prompt") else "change --prompt"


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}: repair it"
        ) from None
    return text


def _label(row: Row, classes: int, where: str) -> int:
    if "label" not in row:
        raise UserError(
            f"{where} has no field 'label'; it has {_names(row)}: add the index of the right label word, or give"
            " --label-column"
        )
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
        raise UserError(
            f"{where}: label must be an index into the {classes} label words (0 to {classes - 1}), got {label!r:.60}"
        )
    return label


def _options(row: Row, min_options: int, where: str) -> tuple[str, ...]:
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


def _answer(row: Row, options: Sequence[str], where: str) -> int:
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


def _names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "no fields"

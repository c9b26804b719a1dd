"""Which columns of a user's data are the text and the label, what kind of data it is, and what its labels stand for.

A task knows its own fields. Files, folders and tables of users have columns of any name; those of `datasets` and of TRL
(Hugging Face) have a few usual ones, which are found by themselves. What was chosen is one sentence.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mezo.config import Data
from mezo.data.files import Stored
from mezo.data.task import Row
from mezo.data.template import Template
from mezo.errors import UserError

TEXTS = (
    "text", "sentence", "content", "review", "comment", "document", "tweet", "title", "question", "query", "utterance",
    "body", "message", "input",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "category", "sentiment", "target", "intent", "emotion", "gold_label", "label_text", "y",
)  # fmt: skip
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("sentence_A", "sentence_B"), ("question", "passage"), ("question", "sentence"), ("query", "passage"),
)  # fmt: skip
MOST_CLASSES = 1000
"""Labels above are no numbers of classes."""
TURNS = ("messages", "conversations")
KINDS = {
    "options": "prompts with options and answers",
    "labelled": "texts with labels",
    "text": "texts alone: the loss is of all their tokens",
    "completion": "prompts and completions: the loss is of the completion",
    "preference": "chosen and rejected completions: the options of a prompt, chosen being right",
    "messages": "conversations: each turn of the assistant is an example, the loss is of that turn",
}
"""Kinds of data: the first two are this package's, the others TRL's."""
OF_TRL = ("text", "completion", "preference", "messages")


@dataclass(frozen=True)
class Labels:
    """What the labels of a column stand for.

    Args:
        names: names of the classes in the order of their numbers; () where labels are the numbers themselves.
        kind: Python type of a label.
        words: the label words, in the same order.
        matched: names go to the words of the same spelling; else by order.
        written: numbers are written as text, as in CSV.
    """

    names: tuple[str, ...]
    kind: type
    words: tuple[str, ...]
    matched: bool = False
    written: bool = False

    def number(self, label: object, where: str) -> int:
        """The class of a label. Raises UserError, which begins with `where`, if it is none."""
        if self.written and isinstance(label, str) and is_number(label):
            return int(label)
        fits = type(label) is self.kind or (self.kind is int and type(label) is float and label.is_integer())
        if not fits:
            kind = {int: "a whole number", str: "text", bool: "true or false"}[self.kind]
            raise UserError(f"{where}: label must be {kind}, as in other rows, got {label!r:.60}")
        if self.kind is bool or not self.names:
            return int(label)
        if self.kind is int:  # the number of a class of `datasets`
            return self._placed(self.names[label]) if 0 <= label < len(self.names) else label
        if (place := self._placed(label)) is None:
            known = ", ".join(map(repr, self.names))
            raise UserError(f"{where}: label must be one of {known}, got {label!r:.60}")
        return place

    def _placed(self, name: str) -> int | None:
        if self.matched:
            return next((i for i, word in enumerate(self.words) if _plain(word) == _plain(name)), None)
        return self.names.index(name) if name in self.names else None

    def __str__(self) -> str:
        names = self.names or tuple(map(str, range(len(self.words))))
        places = [self._placed(name) if self.names and self.kind is not bool else i for i, name in enumerate(names)]
        shown = (f"{name} -> {self.words[i]!r}" for name, i in zip(names, places, strict=True) if i is not None)
        return ", ".join(shown)


@dataclass(frozen=True)
class Reading:
    """How the rows of a user's data become rows of this package.

    Args:
        kind: one of `KINDS`.
        text: column of {text}, or the two columns of {text} and {text_pair}; () where the prompt names its own.
        label: column of the labels; "" where the kind has none.
        labels: what these stand for, where there are label words.
        turns: column of a conversation.
        conversational: prompts and completions are lists of messages.
    """

    kind: str
    text: tuple[str, ...] = ()
    label: str = ""
    labels: Labels | None = None
    turns: str = ""
    conversational: bool = False

    @property
    def plain(self) -> bool:
        """Rows are taken as they are: with text and a number as label, or with prompt, options and answer."""
        usual = self.text in ((), ("text",)) and self.label in ("", "label")
        return usual and self.kind in ("labelled", "options") and (self.labels is None or not self._named)

    @property
    def _named(self) -> bool:
        return bool(self.labels.names) or self.labels.kind is not int or self.labels.written

    def row(self, stored: Row, where: str = "") -> Row:
        """A stored row with the fields that the prompt takes, and its label as a number.

        Raises:
            UserError: a column without a value, or a label that is none.
        """
        if self.plain:
            return stored
        found = dict(stored)
        for name, column in zip(("text", "text_pair"), self.text, strict=False):
            if column not in stored:
                raise UserError(f"{where} has no value in the column {column!r}: fill it, or leave the row out")
            found[name] = stored[column]
        if self.kind == "labelled" and self.label in stored:
            label = stored[self.label]
            found["label"] = self.labels.number(label, where) if self.labels else label
        return found

    def __str__(self) -> str:
        text = " and ".join(map(repr, self.text))
        parts = [f"text from {text}"] if self.text else []
        if self.label:
            parts.append(f"label from {self.label!r}" + (f" ({self.labels})" if self.labels else ""))
        return ", ".join([KINDS[self.kind], *parts])


def reading_of(data: Data, stored: Mapping[str, Stored], answers: bool, by_number: bool = False) -> Reading:
    """How to read a run's files: by the options that were given, else by the usual names.

    Args:
        data: prompt, label words, --text-column and --label-column.
        stored: rows by split; the first split decides, the training data where there is any.
        answers: each row needs a right answer; where a reward alone is trained, it does not.
        by_number: labels that are numbers need no words: a head for classes scores them.
    Raises:
        UserError: a column that is not there, or labels that do not go with the label words.
    """
    first = next(iter(stored.values()))
    columns = first.columns
    for column in (*data.text_column, *filter(None, [data.label_column])):
        if column not in columns:
            flag = "--label-column" if column == data.label_column else "--text-column"
            raise UserError(f"{flag} {column}: {first.source} has no such column, it has {_listed(columns)}")
    if len(data.text_column) > 2:
        raise UserError(f"--text-column takes one column or two, got {len(data.text_column)}: put others into --prompt")
    if not columns:  # no row could be read: that is what will be said
        return Reading("options")
    kind = _kind(data, columns, answers)
    if kind == "labelled":
        return _labelled(data, stored, columns, by_number)
    if kind == "text":
        return Reading(kind, data.text_column[:1] or _text(data, columns, ""))
    turns = next((name for name in TURNS if name in columns), "") if kind == "messages" else ""
    example = next((row for row in first if not isinstance(row, UserError)), {})
    lists = [name for name in ("prompt", "completion", "chosen") if isinstance(example.get(name), list)]
    return Reading(kind, turns=turns, conversational=bool(turns or (lists and kind != "options")))


def _kind(data: Data, columns: Sequence[str], answers: bool) -> str:
    if not answers:
        return "options"
    if data.label_words or data.label_column:
        return "labelled"
    if "options" in columns:
        return "options"
    if {"chosen", "rejected"} <= set(columns):
        return "preference"
    if set(TURNS) & set(columns):
        return "messages"
    if {"prompt", "completion"} <= set(columns):
        return "completion"
    text = data.text_column or set(TEXTS) & set(columns) or any(set(pair) <= set(columns) for pair in PAIRS)
    if set(LABELS) & set(columns) and (text or data.prompt):
        return "labelled"
    return "text" if "text" in columns or data.text_column else "options"


def _labelled(data: Data, stored: Mapping[str, Stored], columns: Sequence[str], by_number: bool) -> Reading:
    first = next(iter(stored.values()))
    label = data.label_column or next((name for name in LABELS if name in columns), "")
    if not label:
        raise UserError(
            f"{first.source} has no column for the label, it has {_listed(columns)}: name it with --label-column,"
            " or leave --label-words out"
        )
    text = data.text_column or _text(data, columns, label)
    return Reading("labelled", tuple(text), label, _labels(data, label, stored, by_number))


def _text(data: Data, columns: Sequence[str], label: str) -> tuple[str, ...]:
    """The columns of {text} and {text_pair}; () where the prompt asks for neither."""
    fields = Template.parse(data.prompt, None).fields if data.prompt else ()
    if data.prompt and not {"text", "text_pair"} & set(fields):
        return ()
    if "text" in columns and "text_pair" not in fields:
        return ("text",)
    if not data.prompt or "text_pair" in fields:
        pair = next((pair for pair in PAIRS if set(pair) <= set(columns)), ())
        if pair:
            return pair
    one = next((name for name in TEXTS if name in columns), "")
    others = [name for name in columns if name not in (label, "id", "idx")]
    if not one and len(others) == 1:
        one = others[0]
    return (one,) if one else ()


def _labels(data: Data, column: str, stored: Mapping[str, Stored], by_number: bool) -> Labels:
    """What the labels of a column stand for, from the training data, else from all there is."""
    first = next(iter(stored.values()))
    classes = first.classes.get(column)
    values = list(classes) if classes else _distinct(first, column)
    kind = int if classes else _type_of(values)
    if kind is str and first.untyped and all(is_number(value) for value in values):
        # CSV has no numbers: those of the labels are written as text
        return Labels((), int, _words(data, first, column, values if by_number else ()), written=True)
    if kind not in (int, str, bool):
        what = f"{kind.__name__} ({values[0]!r:.60})" if kind else "no value"
        raise UserError(f"{first.source}: the column {column!r} must hold labels, a number or a name a row, got {what}")
    names = tuple(classes or ())
    if kind is bool:
        names = ("false", "true")
    elif kind is str:
        names = tuple(sorted({value for value in values if isinstance(value, str)}))
    if not data.label_words and names:
        return Labels(names, kind, tuple(f" {name}" for name in names))
    words = _words(data, first, column, values if by_number and kind is int else ())
    if not names:
        return Labels((), kind, words)
    spelt = {_plain(word) for word in words}, {_plain(name) for name in names}
    matched = spelt[0] <= spelt[1] or spelt[1] <= spelt[0]
    if kind is bool and not matched:
        return Labels(names, kind, words)
    if not matched and len(names) != len(words):
        raise UserError(
            f"{first.source}: the column {column!r} has {len(names)} labels ({_listed(names)}), --label-words has"
            f" {len(words)}: give a word for each, in this order"
        )
    if matched and kind is str:
        names = tuple(name for name in names if _plain(name) in map(_plain, words))
    return Labels(names, kind, words, matched)


def _words(data: Data, stored: Stored, column: str, numbers: Sequence = ()) -> tuple[str, ...]:
    """The label words; where none are given and labels are such numbers, 0 to the largest of them."""
    if not data.label_words and numbers:
        return tuple(f" {i}" for i in range(max(2, *(1 + int(n) for n in numbers if _is_whole(n)))))
    if not data.label_words:
        raise UserError(
            f"{stored.source}: the labels in the column {column!r} are numbers: give --label-words, the word of each in"
            " order"
        )
    return data.label_words


def _distinct(stored: Stored, column: str) -> list:
    if not isinstance(stored.rows, list):
        if not hasattr(stored.rows.features[column], "dtype"):  # a list or a structure
            return [stored.rows[0][column]]
        parts = (batch.column(column).unique().to_pylist() for batch in stored.batches())
        return [value for value in dict.fromkeys(itertools.chain(*parts)) if value is not None and value != ""]
    seen: dict[tuple, object] = {}
    for row in stored.rows:
        value = None if isinstance(row, UserError) else row.get(column)
        if isinstance(value, str | int | float) and value != "":
            seen.setdefault((type(value), value), value)
    return list(seen.values())


def _type_of(values: Sequence) -> type | None:
    """The type that labels have; a number that is written with a point, such as 1.0, is a whole one."""
    kinds = [int if isinstance(value, float) and value.is_integer() else type(value) for value in values]
    return max(dict.fromkeys(kinds), key=kinds.count, default=None)


def _is_whole(value: object) -> bool:
    """Whether a label is a whole number, written as text or not, of a class there may be."""
    whole = is_number(value) if isinstance(value, str) else isinstance(value, int) or float(value).is_integer()
    return whole and int(value) < MOST_CLASSES


def is_number(text: str) -> bool:
    """Whether a text is a whole number.

    >>> is_number("-1"), is_number("1.5")
    (True, False)
    """
    return text.removeprefix("-").isdecimal()


def _plain(name: str) -> str:
    return name.strip().casefold()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"

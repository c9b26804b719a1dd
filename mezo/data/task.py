"""What a task is: where its rows come from, what a model is asked about each, and how answers are judged."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
"""One example as it is stored: field names to values."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked about a row, and what it may answer.

    Args:
        template: text around the row's fields; a masked model answers at `<mask>`, any other after the prompt.
        label_words: the options, one per class in the order of the labels, or () where each row brings its own.
        text_field: the only field that is shortened where a prompt exceeds the token budget; None: none is.

    >>> Prompt("{text} It was<mask>.", (" terrible", " great")).text_field
    'text'
    """

    template: str
    label_words: tuple[str, ...] = ()
    text_field: str | None = "text"


def as_stored(row: Row) -> Row:
    """The row as it is: for data whose fields need no change.

    >>> as_stored({"text": "Fun.", "label": 1})
    {'text': 'Fun.', 'label': 1}
    """
    return row


@dataclass(frozen=True)
class Task:
    """A data set with its prompt. A task of your own is one of these, passed to `mezo.tasks.register`.

    Args:
        name: what `--task` takes.
        load: returns the stored rows by split: "train", and optionally "dev" and "test".
        prompt: for models that continue text; None: the task has none.
        masked: for models that fill a mask; None: the task has none.
        row: turns a stored row into one with the fields of the template and, with label words, `label`, an index into
            them; without, `options` (a list of strings) and `answer` (an index, or the option's text). None: no answer
            is known, the row is left out. Rows of local files (--train-file beside --task) pass through it too.
            Beside `options`, `references` may list every right answer as text, and `option_names` say what each
            option is as an answer; several may be right then.
        objective: what is trained unless the run names another: "cross_entropy", or "lm_cross_entropy" where the answer
            is text.
        metric: which figure of an evaluation is the task's own: "accuracy", "f1", "auc" or "loss".
        generate: answers are judged as generated text, by F1 and exact match, unless the run says otherwise.
        dev_size: examples cut from train for dev, at most a tenth of it, where there is no dev split and the run asks
            for no number; 0: no dev.
        sources: the file behind each split, for error messages.
        counted: what a row of each split is called in messages; "line" where nothing is said.

    >>> rows = {"train": [{"text": "Fun.", "label": 1}, {"text": "Dull.", "label": 0}]}
    >>> Task("mine", lambda: rows, Prompt("{text} It was", (" bad", " good"))).objective
    'cross_entropy'
    """

    name: str
    load: Callable[[], Mapping[str, Iterable[Row]]]
    prompt: Prompt | None = None
    masked: Prompt | None = None
    row: Callable[[Row], Row | None] = as_stored
    objective: str = "cross_entropy"
    metric: str = "accuracy"
    generate: bool = False
    dev_size: int = 500
    sources: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A row that has been checked: what stands between a stored `Row` and a tokenised `Example`.

    Args:
        fields: the values that the template takes.
        options: the possible answers as text.
        label: index of the right one.
        where: file and line, for error messages.
        before: text in front of the prompt, such as demonstrations; never cut.
        references: every right answer as text.
        names: what each option is as an answer, where that is judged as text.
        row: all the task's own fields.
    """

    fields: dict[str, str]
    options: tuple[str, ...]
    label: int
    where: str
    before: str = ""
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)

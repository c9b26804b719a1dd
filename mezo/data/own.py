"""The task behind --train-file, --dev-file and --test-file: a user's own data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mezo.config import Data, Method
from mezo.data.columns import OF_TRL, Reading, reading_of
from mezo.data.files import Stored, open_rows
from mezo.data.task import Prompt, Task
from mezo.errors import require

LM = ("text", "completion", "messages")
"""Kinds of data whose loss is that of the tokens of a text."""


@dataclass(frozen=True)
class OwnData(Task):
    """A task made of a user's files, by what is in them.

    Args:
        reading: how its rows are read.
        stored: its rows by split.
    """

    reading: Reading = field(default_factory=lambda: Reading("options"))
    stored: Mapping[str, Stored] = field(default_factory=dict)


def own_task(data: Data, method: Method | None = None, by_number: bool = False) -> OwnData:
    """The task behind the files that the configuration names.

    Args:
        data: names the files.
        method: its objectives; where they ask for no right answer, rows need none.
        by_number: labels that are numbers need no words.
    Raises:
        UserError: a file cannot be read, or its columns do not go with the options.
    """
    stored = _stored(data)
    objectives = method.objectives if method else {}
    answers = method is None or method.scores or "f1" in objectives or method.generate == "on"
    reading = reading_of(data, stored, answers, by_number)
    words = data.label_words or (reading.labels.words if reading.labels else ())
    prompt = _prompt(data, reading, words)
    return OwnData(
        "jsonl",
        lambda: stored,
        prompt,
        objective="lm_cross_entropy" if reading.kind in LM else "cross_entropy",
        dev_size=0,
        reading=reading,
        stored=stored,
        **_places(stored),
    )


def _prompt(data: Data, reading: Reading, words: tuple[str, ...]) -> Prompt:
    """The prompt where the configuration names none."""
    if reading.kind == "text":
        return Prompt("{text}")
    if reading.kind == "labelled":
        return Prompt("{text}\n{text_pair}" if len(reading.text) == 2 else "{text}", words)
    # a prompt with options of its own ends with the question: cutting its end would cut what is asked
    return Prompt("{prompt}", text_field="prompt" if data.truncation == "left" else None)


def with_files(task: Task, data: Data) -> Task:
    """The task with its rows taken from the files that the configuration names, and from nowhere else.

    Returns:
        `task` itself where no file is named.
    """
    if not (data.train_file or data.dev_file or data.test_file):
        return task
    for name in ("text_column", "label_column", "chat_template"):
        flag = "--" + name.replace("_", "-")
        require(not getattr(data, name), f"{flag}: beside --task files have the fields of the task: leave it out")
    stored = _stored(data)
    return replace(task, load=lambda: stored, **_places(stored))


def _stored(data: Data) -> dict[str, Stored]:
    data.refuse_missing_files()
    files = {"train": data.train_file, "dev": data.dev_file, "test": data.test_file}
    return {split: open_rows(path, split) for split, path in files.items() if path}


def _places(stored: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
    """What messages call the rows of each split."""
    sources = {split: each.source for split, each in stored.items()}
    return {"sources": sources, "counted": {split: each.unit for split, each in stored.items()}}


def is_of_trl(task: Task) -> bool:
    """Whether the rows of a task are in a format of TRL."""
    return isinstance(task, OwnData) and task.reading.kind in OF_TRL

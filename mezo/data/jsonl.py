"""Local files: JSON lines with a task's own fields, with text and label, or with prompt, options and answer."""

import json
from dataclasses import replace
from pathlib import Path

from mezo.config import Data
from mezo.data.task import Prompt, Task
from mezo.errors import UserError


def jsonl_task(data: Data) -> Task:
    """The task behind --train-file, --dev-file and --test-file.

    With --label-words a line is `{"text": ..., "label": index}`; without, it is
    `{"prompt": ..., "options": [...], "answer": index or text}`. The template may take any other field.

    Args:
        data: names the files.

    Returns:
        A task that reads them when it is loaded; it has no dev split unless a file is given.
    """
    # A prompt of the user's own ends with the question: cutting its end would cut what is asked.
    prompt = Prompt("{text}") if data.label_words else Prompt("{prompt}", text_field=None)
    return with_files(Task("jsonl", dict, prompt, dev_size=0), data)


def with_files(task: Task, data: Data) -> Task:
    """The task with its rows taken from the files that the configuration names, and from nowhere else.

    Returns:
        A task that reads them when it is loaded; `task` itself where no file is named.
    """
    files = {"train": data.train_file, "dev": data.dev_file, "test": data.test_file}
    files = {split: path for split, path in files.items() if path}
    if not files:
        return task
    return replace(task, load=lambda: {split: read_jsonl(path) for split, path in files.items()}, sources=files)


def read_jsonl(path: str | Path) -> list[dict | UserError]:
    """The objects of a JSON lines file, one a line; in place of a line that is none, what is wrong with it.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is empty.
    """
    try:
        # utf-8-sig: some editors put a byte order mark first.
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        refuse_binary(path, error.object)
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if lines == [""]:
        raise UserError(f"{path} is empty: give at least one example, one JSON object a line")
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


MAGIC = {b"\x1f\x8b": ("gzip", "unpack it"), b"PAR1": ("Parquet", "write it with datasets' Dataset.to_json")}
"""First bytes of files that are no text, what they are, and the remedy."""


def refuse_binary(path: str | Path, content: bytes) -> None:
    """Raise UserError that names the format, where the first bytes are those of a known one."""
    for magic, (name, remedy) in MAGIC.items():
        if content.startswith(magic):
            raise UserError(f"{path} is a {name} file, expected JSON lines: {remedy}")


def _parse(line: str, where: str) -> dict | UserError:
    if not line.strip():
        return UserError(f"{where} is blank: remove it, one JSON object a line")
    try:
        # NaN stands for a missing value, as null does: where a task reads the field, it is refused as that
        row = json.loads(line, parse_constant=lambda name: None if name == "NaN" else float(name))
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        return UserError(f"{where} is not JSON ({reason}): {line!r:.60}: one JSON object a line")
    if not isinstance(row, dict):
        return UserError(f'{where} must be a JSON object such as {{"text": ..., "label": 0}}, got {line!r:.60}')
    return row

"""The data formats of TRL (Hugging Face's trainers of language models) as prompts with options.

A completion is the one option of its prompt, a rejected one the second. A conversation becomes an example for each turn
of the assistant, after all that was said before. Messages are written out by the tokenizer's chat template. The formats
are those of https://huggingface.co/docs/trl/dataset_formats.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mezo.config import Data
from mezo.data.columns import Reading
from mezo.data.task import Row
from mezo.errors import UserError

Messages = Sequence[Mapping[str, str]]
ROLES = {"human": "user", "gpt": "assistant"}
"""Names that conversations of `from` and `value` have for the roles."""
Expand = Callable[[Row, str], Iterator[Row]]


def expander(reading: Reading, data: Data, tokenizer: PreTrainedTokenizerBase) -> Expand:
    """A function from a stored row, and where it is, to rows with prompt, options and answer.

    Args:
        reading: of data in a format of TRL.
        data: --chat-template.
        tokenizer: the model's, with its own chat template.
    Raises:
        UserError: messages are to be written, and there is no template for them.
    """
    write = _writer(data, tokenizer) if reading.conversational else _plain
    if reading.kind == "messages":
        return lambda row, where: _turns(row, reading.turns, where, write)
    if reading.kind == "preference":
        return lambda row, where: _preference(row, where, write)
    return lambda row, where: _completion(row, where, write)


def _writer(data: Data, tokenizer: PreTrainedTokenizerBase) -> Callable:
    template = _template(data.chat_template)
    if template is None and not tokenizer.chat_template:
        raise UserError(
            f"the data has messages, and the tokenizer of {tokenizer.name_or_path} has no chat template: give"
            " --chat-template FILE.jinja, or data without roles"
        )

    def written(messages: Messages, where: str, row: Row, prompt: bool) -> str:
        known = [_known(message, where) for message in messages]
        options = {"tools": row["tools"]} if row.get("tools") else {}
        options |= row.get("chat_template_kwargs") or {}
        try:
            return tokenizer.apply_chat_template(
                known, chat_template=template, tokenize=False, add_generation_prompt=prompt, **options
            )
        except Exception as error:  # a template raises what its author likes
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{where}: the chat template refuses these messages ({why})") from error

    return written


def _template(given: str) -> str | None:
    """--chat-template: the text of a file, or the text itself; None where nothing is given."""
    if not given:
        return None
    if "{%" in given or "{{" in given:
        return given
    if not os.path.isfile(given):
        raise UserError(f"--chat-template {given}: no such file; give a Jinja template, as a file or as text")
    return Path(given).read_text(encoding="utf-8")


def _known(message: object, where: str) -> dict:
    """A message with role and content."""
    if isinstance(message, Mapping) and "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise UserError(f"{where}: a message must have role and content, got {message!r:.60}")
    return {name: value for name, value in message.items() if value is not None}


def _plain(text: object, where: str, row: Row, prompt: bool) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: prompt, completion, chosen and rejected must be text, got {text!r:.60}")
    return text


def _turns(row: Row, column: str, where: str, write: Callable) -> Iterator[Row]:
    """An example for each turn of the assistant."""
    messages = row.get(column)
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: {column} must be a list of messages with role and content, got {messages!r:.60}")
    messages = [_known(message, where) for message in messages]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError(f"{where} has no assistant turn, which is what is learnt: add one, or leave the row out")
    if turns[0] == 0:
        raise UserError(f"{where} begins with the assistant: put what it answers before")
    for i in turns:
        prompt = write(messages[:i], where, row, True)
        yield _with_options(row, prompt, [_after(prompt, write(messages[: i + 1], where, row, False), where)])


def _completion(row: Row, where: str, write: Callable) -> Iterator[Row]:
    prompt, completion = (_field(row, name, where) for name in ("prompt", "completion"))
    yield _joined(row, prompt, [completion], where, write)


def _preference(row: Row, where: str, write: Callable) -> Iterator[Row]:
    chosen, rejected = (_field(row, name, where) for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if prompt is None:  # what both begin with
        n = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        n -= isinstance(chosen, str) and chosen[n - 1 : n] == " "  # the space belongs to the word after it
        if n <= 0:
            raise UserError(f"{where}: chosen and rejected begin with nothing in common, and have no prompt: add one")
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    yield _joined(row, prompt, [chosen, rejected], where, write)


def _joined(row: Row, prompt: object, completions: Sequence, where: str, write: Callable) -> Row:
    """A row of a prompt and its completions, which are texts or messages."""
    if write is _plain:
        texts = [_plain(text, where, row, False) for text in completions]
        return _with_options(row, _plain(prompt, where, row, True), texts)
    if not all(isinstance(each, list) for each in (prompt, *completions)):
        raise UserError(f"{where}: prompt and completions must all be messages, as in the first row: correct it")
    if not any(message.get("role") == "assistant" for each in completions for message in each):
        raise UserError(f"{where} has no assistant turn, which is what is learnt: add one, or leave the row out")
    before = write(prompt, where, row, True)
    after = [_after(before, write([*prompt, *each], where, row, False), where) for each in completions]
    return _with_options(row, before, after)


def _after(prompt: str, whole: str, where: str) -> str:
    """What of a conversation comes after its prompt."""
    if not whole.startswith(prompt):
        raise UserError(
            f"{where}: the chat template writes a prompt otherwise once it is answered, so that the answer's tokens"
            " cannot be told: give --chat-template with one that only adds to it"
        )
    return whole[len(prompt) :]


def _field(row: Row, name: str, where: str) -> object:
    if row.get(name) is None:
        raise UserError(f"{where} has no value in the column {name!r}: fill it, or leave the row out")
    return row[name]


def _with_options(row: Row, prompt: str, options: list[str]) -> Row:
    return {**row, "prompt": prompt, "options": options, "answer": 0}

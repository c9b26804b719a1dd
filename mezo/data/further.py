"""Training examples of what comes while a run trains: further rows, and answers that somebody judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mezo.data.example import Example
from mezo.data.task import Item, Row
from mezo.errors import require

ANSWERED = ("text", "completion", "messages")
"""Kinds of data whose loss is that of one text after another, which an answer that was good is an example of."""


class Further:
    """Makes training examples as those of a run's own data were made.

    Args:
        of_row: the examples of a row of the task.
        of_answer: the example of an item whose one field is `prompt`.
        words: label words; () where there are none.
        kind: of data, see `KINDS`; or "reward", where texts are judged by a function.
        max_length: most tokens of a prompt with its longest option.
    """

    def __init__(
        self,
        of_row: Callable[[Row, str], list[Example]],
        of_answer: Callable[[Item], Example],
        words: Sequence[str],
        kind: str,
        max_length: int,
    ):
        self._of_row, self._of_answer = of_row, of_answer
        self.words, self.kind, self.max_length = tuple(words), kind, max_length

    def of_row(self, row: Any, where: str) -> list[Example]:
        """The examples of one further row of the task: one, or one for each turn of a conversation.

        Args:
            row: as a line of --train-file has it.
            where: what messages call it.
        Raises:
            UserError: it is no such row, with the field that is wrong.
        """
        require(isinstance(row, Mapping), f"{where} must be an object with the fields of the task, got {row!r:.60}")
        options = "chat_template_kwargs"
        require(options not in row, f"{where}: {options} are options, which a run that is served keeps: leave them out")
        examples = self._of_row(row, where)
        require(bool(examples), f"{where} has no answer that is known: add it")
        return examples

    def of_answer(
        self, prompt: str | Sequence[int], completion: str, tokens: Sequence[int], score: float
    ) -> list[Example]:
        """The example of an answer that somebody judged; [] where nothing follows from it.

        A score above 0 says that the answer was right. Any other says that it was wrong, so that of two label words
        the other one was right; nothing follows else.

        Args:
            prompt: text, or the tokens that a model was given.
            completion: what it answered.
            tokens: of it, where the prompt is given by its tokens.
            score: from -1 to 1.
        Raises:
            UserError: an answer is no example of this task, or has no room.
        """
        if self.words:
            return self._classified(prompt, completion, score)
        require(
            self.kind in ANSWERED,
            f"completion: the examples of this run are of the kind {self.kind!r}, which an answer with a score is none"
            " of: give a whole row to /mezo/examples",
        )
        require(bool(completion), "completion: it is empty, there is nothing to learn from it")
        if score <= 0:
            return []
        if isinstance(prompt, str):
            return [self._of_answer(Item({"prompt": prompt}, (completion,), 0, "prompt", references=(completion,)))]
        require(bool(tokens), "completion: it has no tokens, there is nothing to learn from it")
        return [self._fitting(Example(tuple(prompt), (tuple(tokens),), 0, where="prompt"))]

    def _classified(self, prompt: str | Sequence[int], completion: str, score: float) -> list[Example]:
        """The example of a text whose answer is one of the label words."""
        plain = [word.strip().casefold() for word in self.words]
        known = ", ".join(map(repr, self.words))
        said = completion.strip().casefold()
        require(said in plain, f"completion: it must be one of the label words {known}, got {completion!r:.60}")
        label = plain.index(said)
        if score <= 0 and len(plain) != 2:
            return []
        label = label if score > 0 else 1 - label
        item = Item({"prompt": "."}, self.words, label, "prompt", references=(self.words[label].strip(),))
        if isinstance(prompt, str):
            return [self._of_answer(replace(item, fields={"prompt": prompt}))]
        return [self._fitting(replace(self._of_answer(item), prompt=tuple(prompt)))]

    def _fitting(self, example: Example) -> Example:
        """An example that is given by its tokens, which are not cut."""
        tokens = len(example.prompt) + max(map(len, example.options))
        limit = self.max_length
        require(tokens <= limit, f"prompt: with its completion it has {tokens} tokens, --max-length is {limit}")
        return example

"""Examples of training data of millions of rows: tokenised where a step asks for them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from mezo.data.example import Example

SHOWN = 256  # examples that are looked at in place of all
CACHED = 4096  # examples that are held


class LargeExamples(Sequence[Example]):
    """Examples of a training set that is too large to be tokenised ahead: each is made when it is asked for.

    Args:
        rows: (row, turn) of each example: number of the row, and which of the examples it makes.
        labels: of each example.
        make: examples of some rows, by row: as many as it makes.
        identity: SHA-256 of the content and of what decides the tokens.
        alike: all examples have the same options.
        max_length: most tokens of a prompt with its longest option.
    """

    def __init__(
        self,
        rows: tuple[np.ndarray, np.ndarray],
        labels: np.ndarray,
        make: Callable[[Sequence[int]], list[list[Example]]],
        identity: str,
        alike: bool,
        max_length: int,
    ):
        self.rows, self.labels, self.make, self.identity = rows, labels, make, identity
        self.alike, self.max_length = alike, max_length
        self.checks: list[Callable[[Sequence[Example]], None]] = []
        self._held: OrderedDict[int, Example] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        if i not in self._held:
            self.fetch([i])
        self._held.move_to_end(i)
        return self._held[i]

    def fetch(self, indices: Sequence[int]) -> None:
        """Make the examples of a batch, at once."""
        missing = [i for i in dict.fromkeys(indices) if i not in self._held]
        if not missing:
            return
        numbers, turns = self.rows
        made = self.make([int(numbers[i]) for i in missing])
        found = [examples[turns[i]] for i, examples in zip(missing, made, strict=True)]
        for check in self.checks:
            check(found)
        self._held |= dict(zip(missing, found, strict=True))
        while len(self._held) > max(CACHED, len(indices)):
            self._held.popitem(last=False)

    @property
    def shown(self) -> list[int]:
        """Numbers of examples that are looked at in place of all: spread evenly over them."""
        return np.unique(np.linspace(0, len(self) - 1, SHOWN).astype(np.int64)).tolist()


def looked_at(examples: Sequence[Example]) -> Sequence[Example]:
    """All examples of a split, or those that a large one shows in place of all."""
    if not isinstance(examples, LargeExamples):
        return examples
    examples.fetch(examples.shown)
    return [examples[i] for i in examples.shown]


def labels_of(examples: Sequence[Example]) -> Sequence[int]:
    """The label of every example of a split."""
    return examples.labels if isinstance(examples, LargeExamples) else [example.label for example in examples]

"""Which examples step t trains on: a pure function of (run_seed, t), so that a run can stop and resume anywhere."""

import functools

import numpy as np
import torch

from mezo_kernels.philox import philox_4x32

BLOCK = 1 << 16  # examples whose words are drawn at a time
SHUFFLE = 0x73687566  # "shuf": the stream word of the counter that orders an epoch


class Batches:
    """Shuffled epochs laid end to end and cut into batches.

    Args:
        n_examples: size of the training set.
        batch_size: examples per batch.
        run_seed: 0 <= run_seed < 2**64.

    A set that grows while it is trained on is a function of when it grew too: `grow`.

    >>> batches = Batches(5, 2, run_seed=0)
    >>> sorted(sum((batches(t) for t in range(5)), []))
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    def __init__(self, n_examples: int, batch_size: int, run_seed: int):
        self.batch_size, self.run_seed = batch_size, run_seed
        self._parts = [(0, 0, n_examples)]  # where epochs of one size begin, the number of the first, and their size
        self._epoch = functools.lru_cache(maxsize=4)(self._order)

    @property
    def n_examples(self) -> int:
        """Examples of the epochs to come."""
        return self._parts[-1][2]

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        return [self._at(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def begins_epoch(self, step: int) -> bool:
        """Whether an epoch begins in the batch of a step."""
        return self._next_epoch(step) < (step + 1) * self.batch_size

    def grow(self, step: int, n_examples: int) -> None:
        """Have all epochs that begin in the batch of a step, or later, hold more examples.

        Args:
            step: no earlier than that of the last call.
            n_examples: of the set from then on; those there were keep their numbers.

        >>> batches = Batches(2, 2, run_seed=0)
        >>> batches.grow(1, 4)
        >>> [sorted(batches(0)), sorted(batches(1) + batches(2))]
        [[0, 1], [0, 1, 2, 3]]
        """
        start, first, size = self._parts[-1]
        begins = self._next_epoch(step)
        self._parts.append((begins, first + (begins - start) // size, n_examples))

    def _next_epoch(self, step: int) -> int:
        """Where the first epoch begins that does not begin before the batch of a step."""
        start, _, size = self._parts[-1]
        return max(start, start - (start - step * self.batch_size) // size * size)

    def _at(self, place: int) -> int:
        start, first, size = next(part for part in reversed(self._parts) if part[0] <= place)
        epoch, at = divmod(place - start, size)
        return int(self._epoch(first + epoch, size)[at])

    def _order(self, epoch: int, n_examples: int) -> np.ndarray:
        """Indices sorted by their Philox words; ties, one in 2**32 pairs, keep their order."""
        words = np.empty(n_examples, np.uint32)
        for start in range(0, n_examples, BLOCK):
            index = torch.arange(start, min(start + BLOCK, n_examples))
            counter = (index, torch.full_like(index, epoch), torch.zeros_like(index), torch.full_like(index, SHUFFLE))
            word, *_ = philox_4x32(*counter, self.run_seed & 0xFFFFFFFF, self.run_seed >> 32)
            words[start : start + BLOCK] = word.numpy()
        return np.argsort(words, kind="stable")

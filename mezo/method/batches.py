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

    >>> batches = Batches(5, 2, run_seed=0)
    >>> sorted(sum((batches(t) for t in range(5)), []))
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    def __init__(self, n_examples: int, batch_size: int, run_seed: int):
        self.n_examples, self.batch_size, self.run_seed = n_examples, batch_size, run_seed
        self._epoch = functools.lru_cache(maxsize=4)(self._order)

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._epoch(p // self.n_examples)[p % self.n_examples]) for p in positions]

    def _order(self, epoch: int) -> np.ndarray:
        """Indices sorted by their Philox words; ties, one in 2**32 pairs, keep their order."""
        words = np.empty(self.n_examples, np.uint32)
        for start in range(0, self.n_examples, BLOCK):
            index = torch.arange(start, min(start + BLOCK, self.n_examples))
            counter = (index, torch.full_like(index, epoch), torch.zeros_like(index), torch.full_like(index, SHUFFLE))
            word, *_ = philox_4x32(*counter, self.run_seed & 0xFFFFFFFF, self.run_seed >> 32)
            words[start : start + BLOCK] = word.numpy()
        return np.argsort(words, kind="stable")

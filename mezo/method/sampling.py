"""Sampled text: the random numbers of a step, which every copy of theta is given alike.

A token is the largest of log p + g over the vocabulary, with g = -log(-log u) and u uniform: so it is drawn from p
(Gumbel 1954). g is a function of the step, the example, the token's place in the text and its number in the
vocabulary, and of nothing else. Both signs, and all directions, are given the same g: texts differ where the copies of
theta do, not by luck (common random numbers). A runtime, a batch or a number of ranks changes no g.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mezo_kernels.philox import check_seed, philox_4x32

TEXT = 3  # stream word of the counter that random numbers of text are drawn at; 0 to 2 are those of z and LoRA
SEED_OF_TEXT = 0x74657874  # "text": the stream word of the counter that yields seeds
_MASK = 0xFFFFFFFF

Pick = Callable[[torch.Tensor, int], torch.Tensor]
"""From logits (rows, vocabulary) and a place in the text the next token of each row, (rows,) int64."""


@dataclass(frozen=True)
class Sampling:
    """How the texts of a step are sampled.

    Args:
        temperature: that logits are divided by, > 0.
        seed: of the step's texts, in [0, 2**64).

    >>> Sampling(1.0, text_seed(0, 5)).seed_of(7)
    2709371591108401062
    """

    temperature: float
    seed: int

    def seed_of(self, example: int) -> int:
        """Seed of the text of an example, by its number in its split; in [0, 2**63), as an engine's integers are."""
        w0, w1, _, _ = philox_4x32(example & _MASK, example >> 32, 0, SEED_OF_TEXT, self.seed & _MASK, self.seed >> 32)
        return w0 + ((w1 >> 1) << 32)

    def pick(self, examples: Sequence[int]) -> Pick:
        """What samples the texts of these examples, a row each.

        Args:
            examples: by their numbers in the split.
        """
        seeds = [self.seed_of(i) for i in examples]

        def picked(logits: torch.Tensor, place: int) -> torch.Tensor:
            probabilities = (logits.float() / self.temperature).softmax(-1)
            return sampled(probabilities, seeds, [place] * len(seeds))

        return picked


def likeliest(logits: torch.Tensor, place: int) -> torch.Tensor:
    """The most likely token of each row; a `Pick`."""
    return logits.float().argmax(-1)


def text_seed(run_seed: int, step: int) -> int:
    """Seed of the texts of a step: words w0 + 2**32 w1 of the Philox block (step, 0) under key run_seed.

    Args:
        run_seed: seed of the run, in [0, 2**64).
        step: number of the step, in [0, 2**64).

    >>> text_seed(0, 5)
    12808086438504747297
    """
    counter = (step & _MASK, step >> 32, 0, SEED_OF_TEXT)
    w0, w1, _, _ = philox_4x32(*counter, check_seed(run_seed) & _MASK, run_seed >> 32)
    return w0 + (w1 << 32)


def sampled(probabilities: torch.Tensor, seeds: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """The token of largest log p + g of each row, (rows,) int64.

    Args:
        probabilities: (rows, vocabulary), >= 0; float32, say.
        seeds: of each row's text, in [0, 2**64).
        places: of the token in each row's text, from 0.

    >>> sampled(torch.tensor([[0.0, 1.0, 0.0]]), [7], [0])
    tensor([1])
    """
    asked = list(zip(seeds, places, strict=True))
    drawn = {each: row for row, each in enumerate(dict.fromkeys(asked))}  # rows of several copies share theirs
    noise = gumbel(list(drawn), probabilities.shape[-1], probabilities.device)
    rows = torch.tensor([drawn[each] for each in asked], device=probabilities.device)
    return (probabilities.float().log() + noise[rows]).argmax(-1)


def gumbel(asked: Sequence[tuple[int, int]], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel numbers g = -log(-log u), float32 (asked, size); u is (word + 1/2) / 2**32 of a Philox word.

    The words of number j are those of the block (j // 4, place, 0, TEXT) under the seed as key.

    Args:
        asked: (seed, place) of each row.
        size: of the vocabulary.
        device: where they are drawn.
    """
    seeds, places = zip(*asked, strict=True)
    halves = [torch.tensor([[half(seed)] for seed in seeds], device=device) for half in (_low, _high)]
    group = torch.arange(-(-size // 4), device=device).expand(len(asked), -1)
    place = torch.tensor([[p] for p in places], device=device).expand_as(group)
    zero = torch.zeros_like(group)
    words = torch.stack(philox_4x32(group, place, zero, zero + TEXT, *halves), -1).flatten(1)[:, :size]
    u = (words.double() + 0.5) * 2.0**-32  # float32 would round those near 1 to 1, whose g is infinite
    return -(-u.log()).float().log()


def _low(seed: int) -> int:
    return seed & _MASK


def _high(seed: int) -> int:
    return seed >> 32

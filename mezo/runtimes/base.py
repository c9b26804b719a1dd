"""What a runtime is: it holds the model and theta, scores batches, and steps theta. The trainer knows no more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Args:
        prompt: token ids, special tokens included.
        options: token ids of each answer option; the answer follows the prompt, or fills its mask.
        label: index of the right option.
        mask: position of the mask token in `prompt` (masked language models; one-token options only), else None.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int
    mask: int | None = None


@dataclass
class TokenCount:
    """Tokens scored, and the work done for them, in tokens through the whole model.

    Args:
        scored: tokens that plain forward passes would have run.
        computed: tokens run; one that went through m of n layers counts m / n. Cache filling is included.
    """

    scored: int = 0
    computed: float = 0.0

    @property
    def reused(self) -> float:
        """Tokens whose work was taken from a cache."""
        return self.scored - self.computed


@dataclass(frozen=True)
class AdapterSpec:
    """What is trained, fixed for a run: enough to rebuild theta with no model at hand.

    Args:
        peft: fields of PEFT's adapter_config.json.
        shapes: full shape of each trained parameter by canonical name, in order.
        model: id or path of the base model.
        model_hash: SHA-256 of the base weights in `dtype`.
        dtype: of the base model, e.g. "float32".
    """

    peft: dict
    shapes: dict[str, tuple[int, ...]]
    model: str
    model_hash: str
    dtype: str


@dataclass(frozen=True)
class StepUpdate:
    """theta <- theta * decay - sum_k coefficients[k] z(seeds[k])."""

    seeds: Sequence[int] = ()
    coefficients: Sequence[float] = ()
    decay: float = 1.0


def passes(updates: Sequence) -> list[tuple]:
    """Step updates (or records) as updates of `mezo_kernels.step_`: each decays theta, then adds its directions.

    >>> passes([StepUpdate([7], [0.5], decay=0.9), StepUpdate([8], [0.25])])
    [(0, 0.0, 0.9), (7, 0.5), (8, 0.25)]
    """
    made = []
    for update in updates:
        if update.decay != 1:
            made.append((0, 0.0, update.decay))
        made += zip(update.seeds, update.coefficients, strict=True)
    return made


class Runtime(Protocol):
    """A model, theta, and the two perturbed copies of theta."""

    spec: AdapterSpec
    tokens: TokenCount
    eval_tokens: TokenCount
    seconds_filling: float

    def prepare(self, splits: dict[str, Sequence[Example]]) -> None:
        """Register every example that will be scored, named by split and index from then on, and fill caches."""

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """Set theta from float32 tensors by canonical name."""

    def theta(self) -> dict[str, torch.Tensor]:
        """Copies of theta on the CPU, float32, by canonical name."""

    def step(self, updates: Sequence[StepUpdate], next_seed: int, eps: float, *, watch: bool = False) -> None:
        """Apply the updates in one pass and write theta + eps z(next_seed) and theta - eps z(next_seed).

        With `watch`, keep what `verify` needs.
        """

    def verify(self) -> str | None:
        """Rebuild with the reference backend what the watched step wrote; name the first difference, or None."""

    def score_pair(self, split: str, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Option scores at theta + eps z and theta - eps z, each float64 (len(indices), options), padded with -inf."""

    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """Option scores at theta itself; the perturbed copies stay as they are."""

    def describe(self) -> str:
        """One line on what is trained, where, and what is cached."""

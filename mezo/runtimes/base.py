"""What a runtime is: it holds the model and theta, scores batches, and steps theta. The trainer knows no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mezo.data.example import Example
from mezo.method.step import Step, Update
from mezo.models.spec import TrainedSpec


@dataclass
class TokenCount:
    """Tokens scored, and the work done for them, in tokens through the whole model.

    Args:
        scored: tokens that the forward passes asked for would have run without a cache; an engine's warm-ups count too.
        computed: tokens run; one that went through m of n layers counts m / n. Cache filling is included.
    """

    scored: int = 0
    computed: float = 0.0

    @property
    def reused(self) -> float:
        """Tokens whose work was taken from a cache."""
        return self.scored - self.computed


class Runtime(Protocol):
    """A model, theta, and perturbed copies of theta.

    Args:
        spec: what is trained.
        tokens, eval_tokens: work of training and of evaluation.
        seconds: time so far by part, such as "kernels" and "forward".
        seconds_filling: time so far spent on filling caches ahead of use.
        pairs: perturbations whose two copies are held at once.
        device: where this process draws numbers.
    """

    spec: TrainedSpec
    tokens: TokenCount
    eval_tokens: TokenCount
    seconds: dict[str, float]
    seconds_filling: float
    pairs: int
    device: torch.device

    def prepare(self, splits: dict[str, Sequence[Example]]) -> None:
        """Register every example that will be scored, named by split and index from then on, and fill caches."""

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """Set theta from tensors by canonical name, float32 or of the base's dtype.

        The perturbed copies are stale until `perturb` or `update`.
        """

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """theta_0 of a new run where the model at hand decides it, float32, on the CPU, by canonical name.

        The hf runtime's alone, of --tuning prefix; elsewhere the header of the log says what theta_0 is.
        """

    def theta(self) -> dict[str, torch.Tensor]:
        """Copies of theta on the CPU, float32, by canonical name."""

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """Apply the updates and write the perturbed copies of a step, theta +- eps_k z(seed_k), in one pass.

        Args:
            updates: in order.
            then: at most `pairs` perturbations; None writes none, and the copies are stale.
            watch: keep what `verify` needs.
        """

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """Write the perturbed copies of a step, at most `pairs` perturbations; theta stays as it is."""

    def verify(self) -> str | None:
        """Rebuild with the reference backend what the watched step wrote; name the first difference, or None."""

    def equalise(self) -> None:
        """Write theta, rounded once, to every perturbed copy: what `score_pairs` then differs by is noise."""

    def score_pairs(self, split: str, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Option scores at theta + eps z and theta - eps z of each perturbation of the last step; one-sided at
        theta + eps z of each and theta itself, which is scored once a batch.

        Each is float64 (len(indices), options), padded with -inf.
        """

    def score(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """Option scores at theta itself; the perturbed copies are as they were afterwards."""

    def generate(self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """Text that theta itself puts after each prompt, by the most likely token each time (greedy).

        Args:
            split, indices: whose prompts.
            max_new_tokens: most tokens of a text, which the end-of-text token ends before.
            stop: a text ends before the first of these.
        Returns:
            Texts without white space around them.
        """

    def generate_pairs(
        self, split: str, indices: Sequence[int], max_new_tokens: int, stop: Sequence[str]
    ) -> list[tuple[list[str], list[str]]]:
        """As `generate`, at theta + eps z and theta - eps z of each perturbation of the last step."""

    def gradient(
        self, split: str, indices: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """d loss(option scores) / d theta by autograd at theta, on the CPU, float32, by canonical name.

        The hf runtime's alone: an engine keeps no graph, and the configuration refuses --true-gradient there.
        """

    def save_model(self, directory: Path) -> None:
        """Write theta as `score` reads it, as a transformers model with its tokenizer; an earlier one there gives way.

        The hf runtime's alone, of --tuning full: an adapter is written from `theta`.
        """

    def describe(self) -> str:
        """One line on what is trained, where, and what is cached."""

    def close(self) -> None:
        """Free what outlives this object: processes, scratch files. Safe to call twice."""

"""What a runtime is: it holds the model and theta, scores batches, and steps theta. The trainer knows no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch

from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.sampling import Sampling
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
        seconds_filling, tokens_filled: time and tokens so far spent on filling caches.
        seconds_proving: time that the proof at the start took.
        pairs: perturbations whose two copies are held at once.
        device: where this process draws numbers.
    """

    spec: TrainedSpec
    tokens: TokenCount
    eval_tokens: TokenCount
    seconds: dict[str, float]
    seconds_filling: float
    tokens_filled: int
    seconds_proving: float
    pairs: int
    device: torch.device

    def prepare(self, splits: dict[str, Sequence[Example]], adapter: str = "") -> None:
        """Register every example that will be scored, named by split and index from then on, and fill caches.

        Args:
            splits: examples by split.
            adapter: directory of the adapter that theta will be, which `prove_adapter` compares with.
        """

    def prove_adapter(self) -> None:
        """Compare scores at theta with PEFT's under the adapter that `prepare` was given, on a few examples, once.

        Nothing is compared where none was given.

        Raises:
            UserError: they differ, or PEFT cannot load it.
        """

    def load(self, theta: dict[str, torch.Tensor]) -> None:
        """Set theta from tensors by canonical name, float32 or of the base's dtype; and what is frozen, if it is there.

        The perturbed copies are stale until `perturb` or `update`.
        """

    def theta(self) -> dict[str, torch.Tensor]:
        """Copies of theta on the CPU, float32, by canonical name."""

    def update(self, updates: Sequence[Update], then: Step | None = None, *, watch: bool = False) -> None:
        """Apply the updates and write the perturbed copies of a step, theta +- eps_k z(seed_k), in one pass.

        Args:
            updates: in order.
            then: at most `pairs` perturbations, or one along several z; None writes none, and the copies are stale.
            watch: keep what `verify` needs.
        """

    def perturb(self, step: Step, *, watch: bool = False) -> None:
        """Write the perturbed copies of a step, at most `pairs` perturbations; theta stays as it is."""

    def verify(self) -> str | None:
        """Rebuild with the reference backend what the watched step wrote; name the first difference, or None."""

    def equalise(self) -> None:
        """Write theta, rounded once, to every perturbed copy: what `score_pairs` then differs by is noise."""

    def score_pairs(
        self, split: str, indices: Sequence[int], shares: Sequence[Sequence[int]] | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Option scores at theta + eps z and theta - eps z of each perturbation of the last step; one-sided at
        theta + eps z of each and theta itself, which is scored once a batch; under a rule that guides theta + eps z
        of each, twice the same tensor, but for the one perturbation along several z.

        Args:
            split: name of the split.
            indices: numbers of examples in it.
            shares: for the first so many perturbations, places in `indices` of the examples that are scored under it;
                None scores all of them under every perturbation. Not one-sided.
        Returns:
            Of each perturbation two tensors, float64 (examples, options), padded with -inf.
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
        self,
        split: str,
        indices: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str],
        shares: Sequence[Sequence[int]] | None = None,
        sampling: Sampling | None = None,
    ) -> list[tuple[list[str], list[str]]]:
        """As `generate`, at theta + eps z and theta - eps z of each perturbation of the last step.

        Args:
            split, indices, max_new_tokens, stop: as there.
            shares: see `score_pairs`.
            sampling: of the texts, an example's by the same random numbers at every copy; None takes the most likely
                token each time.
        """

    def describe(self) -> str:
        """One line on what is trained, where, and what is cached."""

    def close(self) -> None:
        """Free what outlives this object: processes, scratch files. Safe to call twice."""


@runtime_checkable
class Differentiable(Protocol):
    """A runtime that keeps what autograd needs: hf; an engine keeps no graph."""

    def gradient(
        self, split: str, indices: Sequence[int], loss: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """d loss(option scores) / d theta by autograd at theta.

        Args:
            split: name of the split.
            indices: numbers of examples in it.
            loss: from option scores, float64 (len(indices), options), a number.
        Returns:
            Float32 on the CPU, by canonical name.
        """


@runtime_checkable
class Savable(Protocol):
    """A runtime that can write its model as a whole: hf, for --tuning full; an adapter is written from `theta`."""

    def save_model(self, directory: Path) -> None:
        """Write theta as `score` reads it, as a transformers model with its tokenizer; one that is there gives way."""


@runtime_checkable
class InitialTheta(Protocol):
    """A runtime whose model decides where a run starts, as under --tuning prefix; else a log's header says it alone."""

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """theta_0 of a new run, and what is frozen beside it, float32, on the CPU, by canonical name."""


@runtime_checkable
class Follower(Protocol):
    """A runtime that several machines are parts of: sglang."""

    def follow(self) -> None:
        """On the second and later machines: serve until the trainer, on the first, ends it."""


@runtime_checkable
class Serves(Protocol):
    """A runtime whose engine answers others too: that of mezo serve."""

    def promote(self, step: int) -> None:
        """Have others be answered by theta as it is now, from their next request on.

        Args:
            step: how many steps it has done.
        """


@runtime_checkable
class Grows(Protocol):
    """A runtime that takes further examples of a split that is held whole, after `prepare`."""

    def refuse_further(self, examples: Sequence[Example]) -> None:
        """Raise UserError for examples that there is no room for: longer ones, or with more options, than planned."""

    def grow(self, split: str, examples: Sequence[Example]) -> None:
        """Register further examples of a split, which follow those it has.

        Raises:
            UserError: see `refuse_further`.
        """


Kind = TypeVar("Kind")


def require(runtime: Runtime, kind: type[Kind], option: str, other: str = "hf") -> Kind:
    """The runtime as one of the protocols above, which an option needs.

    Args:
        runtime: at hand.
        kind: the protocol.
        option: as the user wrote it.
        other: --runtime that has it.
    Raises:
        UserError: the runtime is of another kind.
    """
    if not isinstance(runtime, kind):
        raise UserError(f"{option}: {type(runtime).__name__} is not {kind.__name__}; use --runtime {other}")
    return runtime

"""What a runtime is: it holds the model and theta, scores batches, and steps theta. The trainer knows no more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

LINEAR_HEAD = "score"
"""Name of the linear head, which PEFT saves whole beside the adapter (modules_to_save)."""


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Args:
        prompt: token ids, special tokens included.
        options: token ids of each answer option; the answer follows the prompt, or fills its mask.
        label: index of the right option.
        mask: position of the mask token in `prompt` (masked language models; one-token options only), else None.
        pooled: options are outputs of a linear head, ((0,), (1,), ...), over the mean of all positions of `prompt`.
        references: every right answer as text, where text is judged.
        names: what each option says as an answer, where it is judged as text; else ().
        fields: the task's own, where a reward reads them.
        where: file and line, for error messages.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int
    mask: int | None = None
    pooled: bool = False
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)


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


@dataclass(frozen=True)
class TrainedSpec:
    """What is trained, fixed for a run: enough to rebuild theta, of an adapter with no model at hand.

    Args:
        peft: fields of PEFT's adapter_config.json; None where the base model's own parameters are trained.
        shapes: full shape of each trained parameter by canonical name, in order.
        model: id or path of the base model.
        model_hash: SHA-256 of the base weights in `dtype`.
        dtype: of the base model, e.g. "float32".
    """

    peft: dict | None
    shapes: dict[str, tuple[int, ...]]
    model: str
    model_hash: str
    dtype: str


@dataclass(frozen=True)
class StepUpdate:
    """theta <- theta * decay - sum_k coefficients[k] z(seeds[k]), or what a rule with state makes of it.

    Args:
        seeds, coefficients, decay: see above. With `lr` the sum is the estimate of the gradient, unscaled.
        lr: learning rate, where the rule applies it; else None, and the coefficients hold it.
        skipped: nothing is changed, a rule's state neither.
    """

    seeds: Sequence[int] = ()
    coefficients: Sequence[float] = ()
    decay: float = 1.0
    lr: float | None = None
    skipped: bool = False


def update_of(record) -> StepUpdate:
    """What a record of the log does to theta."""
    return StepUpdate(record.seeds, record.coefficients, record.decay, record.lr, record.skipped)


def passes(updates: Sequence) -> list[tuple]:
    """Step updates as updates of `mezo_kernels.step_`: each decays theta, then adds its directions.

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

        The perturbed copies are stale until `step`.
        """

    def initial_theta(self, run_seed: int) -> dict[str, torch.Tensor]:
        """theta_0 of a new run where the model at hand decides it, float32, on the CPU, by canonical name.

        The hf runtime's alone, of --tuning prefix; elsewhere the header of the log says what theta_0 is.
        """

    def theta(self) -> dict[str, torch.Tensor]:
        """Copies of theta on the CPU, float32, by canonical name."""

    def step(
        self, updates: Sequence[StepUpdate], seeds: Sequence[int], eps: float | Sequence[float], *, watch: bool = False
    ) -> None:
        """Apply the updates and write theta + eps z(seed) and theta - eps z(seed) for each seed, in one pass.

        At most `pairs` seeds; eps is one for all or one a seed. With `watch`, keep what `verify` needs.
        """

    def verify(self) -> str | None:
        """Rebuild with the reference backend what the watched step wrote; name the first difference, or None."""

    def equalise(self) -> None:
        """Write theta, rounded once, to every perturbed copy: what `score_pairs` then differs by is noise."""

    def score_pairs(self, split: str, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Option scores at theta + eps z and theta - eps z of each seed of the last step; under a one-sided rule at
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
        """As `generate`, at theta + eps z and theta - eps z of each seed of the last step."""

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

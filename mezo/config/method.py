"""How a run trains: its steps, what they minimise, how long they go on, and how the run is judged on the way."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from mezo.config.options import RESUMABLE, Choice, typed
from mezo.errors import require
from mezo.method.rules import RULES, Rule
from mezo.method.rules.logged import LoggedRule
from mezo.method.rules.sgd import SGD
from mezo.ranges import AtLeastOne, NotBelowZero, NotNegative, Positive

SCORED = ("cross_entropy", "lm_cross_entropy", "accuracy")
"""Objectives that the scores of the options decide."""
GENERATED = ("f1", "reward")
"""Objectives that generated text decides."""


@dataclass(frozen=True)
class Step:
    """Method: what a step measures, and what moves the trained parameters (theta)."""

    batch_size: AtLeastOne = 16
    """Training examples of a step."""
    lr: Positive = 1e-4
    """Learning rate: how far a step moves theta along its estimate of the gradient."""
    eps: Positive = 1e-2
    """How far theta is moved to either side, along random directions z, to measure the loss there."""
    num_perturbations: AtLeastOne = 1
    """Directions z that every example of a step is measured along, whose estimates are averaged; two forward passes
    each."""
    directions: AtLeastOne = 1
    """Groups that a batch is divided into, each measured along directions z of its own: more directions for the same
    forward passes. --directions equal to --batch-size gives each example its own."""
    follow_coherence: bool = False
    """From each evaluation on take the fewest directions, a divisor of --directions, whose estimates have at most a
    tenth more variance than those of --directions would, by how far the gradients of examples agree. Fewer are cheaper.
    """
    normalise_z: bool = False
    """Divide each z by its root mean square over all trained parameters, so that all directions have one length."""
    clip: NotBelowZero = 0.0
    """Bring each estimate of the slope along z (projected_grad) into [-clip, clip]; 0 leaves it as it is."""
    max_step_ratio: NotBelowZero = 0.0
    """Shorten a step to this many times the median length of the 100 before it; 0 leaves all as they are."""
    weight_decay: NotBelowZero = 0.0
    """Multiply theta by 1 - lr weight_decay at each step; the rule adam adds weight_decay theta to the gradient
    instead."""
    no_decay: tuple[str, ...] = ()
    """Parameters that weight decay leaves alone: patterns of their names, such as '*lora_B*'."""
    anchored_decay: bool = False
    """Weight decay draws theta back to where the run began, theta_0, not to zero: theta - lr weight_decay (theta -
    theta_0), as L2-SP does (Li et al. 2018, arXiv 1802.01483). For long runs on rewards, which wander far from what the
    model was."""
    seed: Annotated[int, Ge(0), Lt(2**64)] = 0
    """Seed of the run: the fresh adapter, the batches and the directions z are functions of it."""
    rule: Annotated[Rule, Choice("update_rule", RULES)] = SGD()  # noqa: RUF009  frozen
    """What moves theta, from the losses of a step."""

    @property
    def perturbations(self) -> int:
        """Perturbations of a step: --num-perturbations of each group of the batch."""
        return self.directions * self.num_perturbations

    @property
    def half_distance(self) -> float:
        """Half the way, along z, between the two thetas of a projected_grad: eps, or eps / 2 where one is theta."""
        return self.rule.half_distance(self.eps)

    @property
    def logged_rule(self) -> LoggedRule:
        """The update rule as the header of the log holds it."""
        l2 = self.rule.l2(self.weight_decay)
        return LoggedRule(self.rule, l2, self.no_decay, self.normalise_z, self.anchored_decay)


@dataclass(frozen=True)
class Objective:
    """Objective: what a step minimises."""

    objective: str = "auto"
    """cross_entropy of the options; lm_cross_entropy, of the right option's tokens; accuracy; or, of text that the
    model writes, f1 or reward; the last three are maximised. cross_entropy:1,reward:0.5 is a sum with weights. auto is
    the task's own, cross_entropy for files."""
    reward: str = ""
    """A Python function of yours, file.py:function or module:function. It takes an example (a dict of the task's own
    fields) and the text written for it, and returns a number, the same one each time."""
    z_score_rewards: bool = False
    """Standardise rewards and F1s over the texts of a step: of its examples, its directions and both signs."""
    center_rewards: bool = False
    """Take from each reward the mean over the texts of its prompt before --z-score-rewards standardises them: then the
    scale is that of the differences between texts, whatever prompts differ by."""
    temperature: NotBelowZero = 0.0
    """Sample the texts of a step at this temperature, by the same random numbers at both signs and along every
    direction; 0 takes the most likely token each time (greedy), as evaluations always do."""
    generate: Literal["auto", "on", "off"] = "auto"
    """Let the model write text at evaluations too, judged by F1 and exact match; auto does so for tasks whose answer is
    text."""
    max_new_tokens: AtLeastOne = 50
    """Most tokens of a text that the model writes."""
    stop: tuple[str, ...] = ("\\n",)
    """A text ends before any of these; \\n is a line break."""

    @property
    def objectives(self) -> dict[str, float]:
        """Weights by name of the objective, e.g. {"cross_entropy": 1.0, "reward": 0.5}."""
        weights = {}
        for term in self.objective.split(","):
            name, colon, weight = term.strip().partition(":")
            require(name not in weights, f"--objective {self.objective}: {name} is there twice: drop one")
            weights[name] = typed(f"--objective {self.objective}: a weight", weight, float) if colon else 1.0
        return weights

    @property
    def scores(self) -> bool:
        """Whether a step needs option scores."""
        return any(name not in GENERATED for name in self.objectives)

    @property
    def generates(self) -> bool:
        """Whether steps or evaluations need generated text."""
        return self.generate == "on" or any(name in GENERATED for name in self.objectives)

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a generated text."""
        return tuple(stop.replace("\\n", "\n") for stop in self.stop)


@dataclass(frozen=True)
class Schedule:
    """Schedule: how long a run is, how the learning rate moves, and what ends the run early."""

    steps: AtLeastOne = 1000
    """Steps of the run."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes to the end of the run; the MeZO paper's is constant, the others fall to 0."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises from 0 first."""
    early_stopping: Annotated[int, Ge(0), RESUMABLE] = 0
    """Evaluations without an improvement on dev after which the run ends; 0 never ends it."""
    max_loss_ratio: Annotated[float, Ge(0), RESUMABLE] = 0.0
    """End with an error where the mean loss of 100 steps is this many times that of the first 100; 0 only warns, from 2
    on."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluation: what is scored when, and what is measured beside."""

    eval_every: NotNegative = 0
    """Steps between evaluations on dev; 0 is a tenth of the run."""
    eval_test: bool = True
    """Load the test examples, and score them before and after the run."""
    eval_train: bool = False
    """Score the training examples too, before and after the run."""
    best_metric: Literal["auto", "loss", "accuracy"] = "auto"
    """The figure of dev that chooses the best step. auto: what the run is for, that is the reward if one is trained, F1
    of written text, the loss of lm_cross_entropy, else the accuracy, or the loss among steps whose accuracies differ by
    no more than their standard error."""
    noise: Annotated[bool, RESUMABLE] = True
    """At every evaluation score one batch four times at theta itself, and report the noise that this puts on the
    estimates, how they spread over examples and directions, and what rounding leaves of a perturbation."""
    report: Annotated[bool, RESUMABLE] = True
    """Write report.html, a page with tables and curves, at the end of the run; `mezo report` writes it at any time."""
    true_gradient: Annotated[bool, RESUMABLE] = False
    """At every evaluation compare the estimate with the gradient itself, by autograd; with --runtime hf, for models
    small enough."""


@dataclass(frozen=True)
class Method(Evaluation, Schedule, Objective, Step):  # the fields of the last come first
    """How a run trains; its options are those of its four parts."""

"""What a run asks of a runtime, in numbers."""

from dataclasses import dataclass, field

from mezo.method.rules.logged import LoggedRule


@dataclass(frozen=True)
class Workload:
    """What a run asks of a runtime, besides a model and a machine.

    Args:
        rule: the update rule that moves theta.
        steps: of the run.
        done: of these, where the run is resumed.
        batch_size: training examples of a step.
        perturbations: of a step.
        directions: groups that a batch is divided into, each with perturbations of its own.
        seed: of the run.
        objectives: names of what is minimised.
        scores: a step needs option scores.
        max_new_tokens: most tokens of a generated text; 0 where no text is.
        classes: outputs of a head for classes; read where there is one.
    """

    rule: LoggedRule = field(default_factory=LoggedRule)
    steps: int = 1
    done: int = 0
    batch_size: int = 1
    perturbations: int = 1
    directions: int = 1
    seed: int = 0
    objectives: tuple[str, ...] = ("cross_entropy",)
    scores: bool = True
    max_new_tokens: int = 0
    classes: int = 0

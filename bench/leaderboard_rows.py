"""The rows of LEADERBOARD.md and its tasks beside the demo's: what each differs in."""

from dataclasses import dataclass, field

from mezo.config import Config
from mezo.report.leaderboard import rows_scored

FILMS = "movie"  # the task of the demo
XS = {"tuning": "lora-xs", "r": 32, "lora_alpha": 32}
XS16 = {"tuning": "lora-xs", "r": 16, "lora_alpha": 16}
XS8 = {"tuning": "lora-xs", "r": 8, "lora_alpha": 8}
CALIBRATED = {**XS8, "lora_a": "calibrated"}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        title: for people.
        lrs: grid that the search begins with, in order.
        options: flat options that differ from the demo's.
        gradients: AdamW by backpropagation; a row scored is a forward pass and the pass back, which costs more.
    """

    title: str
    lrs: tuple[float, ...]
    options: dict = field(default_factory=dict)
    gradients: bool = False

    def scored(self, config: Config) -> int:
        """Rows that a run of this row scores in training."""
        return config.method.steps * config.method.batch_size if self.gradients else rows_scored(config)


ROWS = {
    "adamw": Row("AdamW with gradients, batch 32", (1e-3, 2e-3, 4e-3), gradients=True),
    "mezo": Row("MeZO: one direction a step, batch 32", (8e-3, 16e-3)),
    "mezo-constant": Row("MeZO, constant lr", (4e-3, 8e-3), {"lr_schedule": "constant"}),
    "n-spsa": Row("n-SPSA: 4 directions for all of a batch of 8", (8e-3, 16e-3),
                  {"batch_size": 8, "num_perturbations": 4}),
    "fzoo": Row("FZOO: 7 one-sided directions for all of a batch of 8", (1e-4, 2e-4, 4e-4),
                {"batch_size": 8, "num_perturbations": 7, "update_rule": "fzoo"}),
    "directions-8": Row("8 directions, batch 32", (8e-3, 16e-3), {"directions": 8}),
    "directions-32": Row("a direction an example, batch 32", (8e-3, 16e-3), {"directions": 32}),
    "directions-128": Row("a direction an example, batch 128", (8e-3, 16e-3, 32e-3),
                          {"batch_size": 128, "directions": 128}),
    "one-sided": Row(
        "one-sided: 7 directions for all of a batch of 8",
        (8e-3, 16e-3),
        {"batch_size": 8, "num_perturbations": 7, "update_rule": "one-sided"},
    ),
    "guided": Row("guided: a vector from 6 directions for all of a batch of 8, a pair along it", (2e-3, 4e-3, 8e-3),
                  {"batch_size": 8, "num_perturbations": 6, "update_rule": "guided"}),
    "ranks-32": Row(
        "a direction an example, batch 32, ranks of the losses",
        (1e-2, 2e-2, 4e-2),
        {"directions": 32, "update_rule": "ranks"},
    ),
    "adam-32": Row("a direction an example, batch 32, Adam", (5e-4, 1e-3, 2e-3),
                   {"directions": 32, "update_rule": "adam"}),
    "subspace-32": Row("a direction an example, batch 32, Adam in a subspace of 10 steps", (2e-3, 4e-3, 8e-3),
                       {"directions": 32, "update_rule": "subspace-adam", "refresh_every": 10, "beta2": 0.95}),
    "lora-b-32": Row("lora-b, a direction an example, batch 32", (8e-3, 16e-3),
                     {"directions": 32, "tuning": "lora-b"}),
    "xs-1": Row("lora-xs r 32, one direction a step, batch 32", (8e-3, 16e-3), XS),
    "xs-32": Row("lora-xs r 32, a direction an example, batch 32", (4e-3, 8e-3, 16e-3), {**XS, "directions": 32}),
    "xs-128": Row("lora-xs r 32, a direction an example, batch 128", (16e-3, 32e-3),
                  {**XS, "batch_size": 128, "directions": 128}),
    "xs8-1": Row("lora-xs r 8, one direction a step, batch 32", (16e-3, 32e-3), XS8),
    "xs8-32": Row("lora-xs r 8, a direction an example, batch 32", (16e-3, 32e-3, 64e-3), {**XS8, "directions": 32}),
    "xs16-128": Row("lora-xs r 16, a direction an example, batch 128", (32e-3, 64e-3),
                    {**XS16, "batch_size": 128, "directions": 128}),
    "xs8-128": Row("lora-xs r 8, a direction an example, batch 128", (64e-3, 128e-3),
                   {**XS8, "batch_size": 128, "directions": 128}),
    "calibrated-b-32": Row("lora-b r 8, calibrated, a direction an example, batch 32", (0.125, 0.25),
                           {"tuning": "lora-b", "r": 8, "lora_alpha": 8, "lora_a": "calibrated", "directions": 32}),
    "calibrated-1": Row("lora-xs r 8, calibrated, one direction a step, batch 32", (0.125, 0.25), CALIBRATED),
    "calibrated-32": Row("lora-xs r 8, calibrated, a direction an example, batch 32", (0.125, 0.25),
                         {**CALIBRATED, "directions": 32}),
    "calibrated-64": Row("lora-xs r 8, calibrated, a direction an example, batch 64", (0.25, 0.5),
                         {**CALIBRATED, "batch_size": 64, "directions": 64}),
    "calibrated-128": Row("lora-xs r 8, calibrated, a direction an example, batch 128", (0.25, 0.5),
                          {**CALIBRATED, "batch_size": 128, "directions": 128}),
    "calibrated16-128": Row("lora-xs r 16, calibrated, a direction an example, batch 128", (0.25, 0.5),
                            {**XS16, "lora_a": "calibrated", "batch_size": 128, "directions": 128}),
    "calibrated16-fzoo": Row("lora-xs r 16, calibrated, FZOO: 7 one-sided directions for all of a batch of 8",
                             (2e-3, 4e-3), {**XS16, "lora_a": "calibrated", "batch_size": 8, "num_perturbations": 7,
                                            "update_rule": "fzoo"}),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Sentences to tell apart, by the same splits as the demo's: 512 to train on, 400 of dev and 500 to test.

    Args:
        title: for people.
        prompt: with {text}.
        label_words: of a negative and of a positive sentence.
    """

    title: str
    prompt: str
    label_words: tuple[str, str]

    @property
    def shown(self) -> str:
        """Prompt and words as a reader of the table sees them."""
        words = " and ".join(f"`{word.strip()}`" for word in self.label_words)
        return f"prompt `{self.prompt}`, words {words}".replace("\n", "\\n")


TASKS = {
    "product": Task("product reviews", "{text} It was", (" terrible", " great")),
    "tweet": Task("tweets", "{text} I am", (" sad", " happy")),
}
"""Beside the demo's, by the kind of their sentences. Of four prompts each these leave most room: on 200 sentences of
dev the model's AUC without training is 0.826 and 0.828, while `Tweet: {text} Sentiment:` begins at 0.941."""


FEWER = (
    "adamw",
    "mezo",
    "mezo-constant",
    "fzoo",
    "directions-32",
    "lora-b-32",
    "guided",
    "xs-32",
    "calibrated-32",
    "calibrated-128",
    "calibrated16-128",
)
"""Of the tasks beside the demo's."""

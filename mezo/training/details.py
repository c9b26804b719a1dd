"""What single examples of an evaluation show, beside its figures: texts, a table of answers, confident mistakes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mezo.data.example import Example
from mezo.method.objectives import predictions

SHOWN = 3  # texts and mistakes of an evaluation
LONGEST = 300  # characters of a text that is shown
MOST_CLASSES = 20  # of a table of answers

Decode = Callable[[Sequence[int]], str]
"""From token ids to text."""


def figures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation without its single examples.

    >>> figures_of({"accuracy": 0.5, "confusion": [[1, 1], [0, 0]]})
    {'accuracy': 0.5}
    """
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def texts(
    examples: Sequence[Example], outputs: Sequence[str], verdicts: Mapping[str, Sequence[float]], decode: Decode | None
) -> dict[str, Any]:
    """`samples` of a row of metrics.jsonl: the first few generated texts, the same examples at every evaluation.

    Args:
        examples: that were written for.
        outputs: the texts.
        verdicts: on each text, by the name of the figure.
        decode: the tokenizer's; None leaves the prompts out.
    """
    return {
        "samples": [
            {
                "prompt": _end(decode(example.prompt)) if decode else "",
                "text": output[:LONGEST],
                "references": [text[:LONGEST] for text in _right(example, decode)[:SHOWN]],
                "judged": {name: values[i] for name, values in verdicts.items()},
            }
            for i, (example, output) in enumerate(zip(examples[:SHOWN], outputs[:SHOWN], strict=True))
        ]
    }


def answers(scores: torch.Tensor, examples: Sequence[Example], decode: Decode | None) -> dict[str, Any]:
    """`classes`, `confusion` and `mistakes` of a row of metrics.jsonl, where all examples have the same options.

    Args:
        scores: float64 (examples, options).
        examples: that were scored.
        decode: the tokenizer's; None leaves the prompts out.
    Returns:
        `classes`: what they are called. `confusion`: of each class, how many of its examples were given each answer.
        `mistakes`: the wrong answers of highest probability among the options. {} where the options are not classes, or
        are too many, or a score is NaN.
    """
    classes = examples[0].options
    if len(classes) < 2 or len(classes) > MOST_CLASSES or any(example.options != classes for example in examples):
        return {}
    if not torch.isfinite(scores).all():
        return {}
    chosen, labels = predictions(scores), torch.tensor([example.label for example in examples])
    table = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    table.index_put_((labels, chosen), torch.ones(len(labels), dtype=torch.int64), accumulate=True)
    probability = scores.softmax(-1).gather(1, chosen[:, None])[:, 0]
    wrong = [i for i in probability.argsort(descending=True, stable=True).tolist() if chosen[i] != labels[i]]
    mistakes = [
        {
            "prompt": _end(decode(examples[i].prompt)) if decode else "",
            "where": examples[i].where[-LONGEST:],
            "right": int(labels[i]),
            "chosen": int(chosen[i]),
            "probability": probability[i].item(),
        }
        for i in wrong[:SHOWN]
    ]
    words = decode is not None and not examples[0].pooled
    names = [decode(option).strip()[:LONGEST] if words else str(i) for i, option in enumerate(classes)]
    return {"classes": names, "confusion": table.tolist(), "mistakes": mistakes}


def _right(example: Example, decode: Decode | None) -> Sequence[str]:
    """Right answers as text, or the right option."""
    if example.references or not example.options or decode is None:
        return example.references
    return (decode(example.options[example.label]).strip(),)


def _end(prompt: str) -> str:
    """The end of a prompt, where the question is."""
    return prompt if len(prompt) <= LONGEST else f"... {prompt[-LONGEST:]}"

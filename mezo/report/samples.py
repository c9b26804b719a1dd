"""Single examples of a run as rows of tables: generated texts, what was answered, confident mistakes, a baseline."""

from collections.abc import Sequence
from typing import Any

from mezo.method.objectives import standard_error

Rows = list[tuple[str, ...]]
MOST_EVALUATIONS = 20  # whose texts are shown


def class_names(row: dict[str, Any], words: Sequence[str] = ()) -> list[str]:
    """What classes are called: the run's label words, else as the row says.

    Args:
        row: of metrics.jsonl.
        words: label words of the run's configuration, which an encoder's linear head needs: it has no words.
    """
    classes = row.get("classes", [])
    return [word.strip() for word in words] if len(words) == len(classes) else list(classes)


def texts(**evaluations: dict[str, Any]) -> Rows:
    """What was written for the same examples, a column an evaluation, head first; [] where no text is.

    Args:
        evaluations: rows of metrics.jsonl of one split, by the heads of their columns.
    """
    pairs = list(zip(*(row.get("samples", ()) for row in evaluations.values()), strict=False))
    lines = [(one["prompt"], " | ".join(one["references"]), *map(_judged, (one, *others))) for one, *others in pairs]
    return [("prompt", "right", *evaluations), *lines] if lines else []


def texts_by_step(rows: Sequence[dict[str, Any]]) -> Rows:
    """What was written at each evaluation, head first; [] where no text is. Of very many evaluations some.

    Args:
        rows: of metrics.jsonl, of one split.
    """
    written = [row for row in rows if row.get("samples")]
    count = min(len(written), MOST_EVALUATIONS)
    shown = [written[i * (len(written) - 1) // max(1, count - 1)] for i in range(count)]
    lines = [
        (str(row["step"]), one["prompt"], " | ".join(one["references"]), one["text"], judgement(one))
        for row in shown
        for one in row["samples"]
    ]
    return [("step", "prompt", "right", "text", "judged"), *lines] if lines else []


def judgement(sample: dict[str, Any]) -> str:
    """What judges say of a text.

    >>> judgement({"text": "Fun.", "judged": {"reward": 0.25, "f1": 1.0}})
    'reward 0.25, f1 1'
    """
    return ", ".join(f"{name} {value:.3g}" for name, value in sample["judged"].items())


def _judged(sample: dict[str, Any]) -> str:
    return f"{sample['text']} ({judgement(sample)})"


def answered(row: dict[str, Any], names: Sequence[str]) -> Rows:
    """How often each class was given each answer, head first; [] where the options are no classes.

    Args:
        row: of metrics.jsonl.
        names: of the classes.
    """
    table = row.get("confusion", [])
    if not table or any(len(counts) != len(names) for counts in (table, *table)):
        return []
    lines = [
        (name, *map(str, counts), f"{100 * counts[i] / max(sum(counts), 1):.1f} %")
        for i, (name, counts) in enumerate(zip(names, table, strict=True))
    ]
    return [("is", *(f"answered {name}" for name in names), "of these right"), *lines]


def mistakes(row: dict[str, Any], names: Sequence[str]) -> Rows:
    """The wrong answers that the model is surest of, head first; [] where there are none.

    Args:
        row: of metrics.jsonl.
        names: of the classes.
    """
    call = lambda number: names[number] if number < len(names) else str(number)  # noqa: E731
    lines = [
        (each["prompt"] or each["where"], call(each["right"]), call(each["chosen"]), f"{each['probability']:.3f}")
        for each in row.get("mistakes", [])
    ]
    return [("example", "is", "answered", "probability"), *lines] if lines else []


def yardstick(row: dict[str, Any]) -> str:
    """How far chance goes in an accuracy, and what needs no model at all; "" where the options are no classes.

    >>> yardstick({"accuracy": 0.8, "confusion": [[30, 10], [10, 50]]})
    'standard error 4.0 points on 100 examples; always the most common class: 60.0 %'
    """
    table = row.get("confusion", [])
    n = sum(map(sum, table))
    if not n or row.get("accuracy") is None:
        return ""
    error, most = standard_error(row["accuracy"], n), max(map(sum, table)) / n
    return (
        f"standard error {100 * error:.1f} points on {n:,} examples; always the most common class: {100 * most:.1f} %"
    )

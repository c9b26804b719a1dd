"""The prompt that SNLI, MNLI and RTE share for models that fill a mask: "premise? Yes, hypothesis"."""

from mezo.data.task import Prompt, Row
from mezo.tasks.sentences import lower_first, without_stop


def masked_prompt(label_words: tuple[str, ...]) -> Prompt:
    """The shared prompt with a task's own label words; its fields are those of `joined`."""
    return Prompt("{statement}?<mask>, {continuation}", label_words, text_field="statement")


def joined(row: Row) -> Row:
    """The row with `statement`, its premise without the full stop, and `continuation`, its hypothesis in lower case.

    >>> row = joined({"premise": "A man sleeps.", "hypothesis": "The man is awake.", "label": 2})
    >>> row["statement"], row["continuation"]
    ('A man sleeps', 'the man is awake.')
    """
    return {**row, "statement": without_stop(row["premise"]), "continuation": lower_first(row["hypothesis"])}

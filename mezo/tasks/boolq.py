"""BoolQ: yes-or-no questions people typed, with a passage that answers them (Clark et al. 2019).

As first released, which is what the paper ran on: SuperGLUE puts the article's title in front of each passage.
"""

from mezo.data.hub import from_hub
from mezo.data.task import Prompt, Row, Task
from mezo.tasks.sentences import upper_first


def asked(row: Row) -> Row:
    """The question as one writes it: a capital first, a question mark last.

    >>> row = asked({"question": "is it cold", "passage": "Ice is cold.", "answer": True})
    >>> row["question"], row["label"]
    ('Is it cold?', 1)
    """
    return {**row, "question": upper_first(row["question"]).removesuffix("?") + "?", "label": int(row["answer"])}


BOOLQ = Task(
    "boolq",
    from_hub("google/boolq"),
    prompt=Prompt("{passage} {question}\n", ("No", "Yes"), text_field="passage"),
    row=asked,
)

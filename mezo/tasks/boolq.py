"""BoolQ: yes-or-no questions people typed, with a passage that answers them (Clark et al. 2019; SuperGLUE)."""

from mezo.tasks.base import Prompt, Row, Task
from mezo.tasks.hub import from_hub, labelled
from mezo.tasks.sentences import upper_first


def asked(row: Row) -> Row:
    """The question as one writes it: a capital first, a question mark last.

    >>> asked({"question": "is it cold", "passage": "Ice is cold.", "label": 1})["question"]
    'Is it cold?'
    """
    return {**row, "question": upper_first(row["question"]).removesuffix("?") + "?"}


BOOLQ = Task(
    "boolq",
    from_hub("aps/super_glue", "boolq"),
    prompt=Prompt("{passage} {question}\n", ("No", "Yes"), text_field="passage"),
    row=labelled(asked),
)

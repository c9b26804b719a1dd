"""COPA: which of two sentences is the cause, or the effect, of a premise (Roemmele et al. 2011; SuperGLUE)?"""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Row, Task
from mezo.tasks.sentences import lower_first, without_stop


def choice(row: Row) -> Row:
    """The premise without its full stop, the conjunction, and both sentences as they go on from it.

    >>> row = {"premise": "It rained.", "choice1": "I got wet.", "choice2": "The sun shone.", "question": "effect"}
    >>> [choice({**row, "label": 0})[field] for field in ("premise", "conjunction", "options")]
    ['It rained', 'so', [' I got wet.', ' the sun shone.']]
    """
    return {
        **row,
        "premise": without_stop(row["premise"]),
        "conjunction": "so" if row["question"] == "effect" else "because",
        "options": [" " + _continued(row["choice1"]), " " + _continued(row["choice2"])],
        "answer": row["label"],
    }


def _continued(sentence: str) -> str:
    return sentence.strip() if sentence.strip().startswith(("I ", "I'")) else lower_first(sentence)


COPA = Task(
    "copa",
    from_hub("aps/super_glue", "copa"),
    prompt=Prompt("{premise} {conjunction}", text_field="premise"),
    row=labelled(choice),
    objective="lm_cross_entropy",
)

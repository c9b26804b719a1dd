"""SST-2: movie review sentences, negative or positive (Socher et al. 2013; GLUE)."""

from mezo.data.hub import from_hub, labelled
from mezo.data.task import Prompt, Row, Task

WORDS = (" terrible", " great")


def stripped(row: Row) -> Row:
    """Each sentence ends with a space on the hub, which would separate the template from it by two.

    >>> stripped({"idx": 0, "sentence": "a smart , sweet film ", "label": 1})["sentence"]
    'a smart , sweet film'
    """
    return {**row, "sentence": row["sentence"].strip()}


SST2 = Task(
    "sst2",
    from_hub("stanfordnlp/sst2"),
    prompt=Prompt("{sentence} It was", WORDS, text_field="sentence"),
    masked=Prompt("{sentence} It was<mask>.", WORDS, text_field="sentence"),
    row=labelled(stripped),
)

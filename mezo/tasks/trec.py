"""TREC: what a question asks for, six coarse classes (Voorhees and Tice 2000)."""

from mezo.data.hub import from_hub
from mezo.data.task import Prompt, Row, Task

CLASSES = {
    "DESC": " Description",
    "ENTY": " Entity",
    "ABBR": " Expression",
    "HUM": " Human",
    "LOC": " Location",
    "NUM": " Number",
}


def coarse(row: Row) -> Row:
    """The coarse class as the label; the hub's `label` is one of fifty fine ones.

    >>> coarse({"text": "Who wrote Hamlet ?", "label": 1, "label_coarse_original": "HUM"})["label"]
    3
    """
    return {**row, "label": list(CLASSES).index(row["label_coarse_original"])}


TREC = Task(
    "trec",
    from_hub("SetFit/TREC-QC", test="test"),
    masked=Prompt("<mask>: {text}", tuple(CLASSES.values())),
    row=coarse,
)

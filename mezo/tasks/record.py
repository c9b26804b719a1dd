"""ReCoRD: which entity of a news passage fills the blank of a statement about it (Zhang et al. 2018; SuperGLUE)?"""

from mezo.data.hub import from_hub
from mezo.data.task import Prompt, Row, Task


def completed(row: Row) -> Row | None:
    """The statement completed with each entity; every name of the right one is right. None: no answer is known.

    >>> row = {"passage": "Ann met Bo.\\n@highlight\\nThey sang", "query": "@placeholder sang", "answers": ["Ann"]}
    >>> [completed({**row, "entities": ["Bo", "Ann"]})[field] for field in ("passage", "options", "answer")]
    ['Ann met Bo.\\n- They sang', [' Bo sang', ' Ann sang'], 1]
    """
    if not row["answers"]:
        return None
    names = list(dict.fromkeys([*row["entities"], *row["answers"]]))
    return {
        **row,
        "passage": row["passage"].replace("@highlight\n", "- "),
        "options": [" " + row["query"].replace("@placeholder", name) for name in names],
        "answer": names.index(row["answers"][0]),
        "option_names": names,
        "references": list(dict.fromkeys(row["answers"])),
    }


RECORD = Task(
    "record",
    from_hub("aps/super_glue", "record"),
    prompt=Prompt("{passage}\n-", text_field="passage"),
    row=completed,
    objective="lm_cross_entropy",
)

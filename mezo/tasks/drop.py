"""DROP: questions that take counting or arithmetic over a passage (Dua et al. 2019); the first answer is trained on."""

from mezo.data.hub import from_hub
from mezo.data.task import Prompt, Row, Task


def answered(row: Row) -> Row | None:
    """The first answer as the only option, with the line break that ends it; None: there is none.

    >>> row = {"passage": "Two won, one lost.", "question": "How many played? ", "query_id": "1"}
    >>> answered({**row, "answers_spans": {"spans": ["3"], "types": ["number"]}})["options"]
    [' 3\\n']
    """
    references = [text.strip() for text in row["answers_spans"]["spans"] if text.strip()]
    if not references:
        return None
    options = [f" {references[0]}\n"]
    return {**row, "question": row["question"].strip(), "options": options, "answer": 0, "references": references}


DROP = Task(
    "drop",
    from_hub("ucinlp/drop"),
    prompt=Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:", text_field="passage"),
    row=answered,
    objective="lm_cross_entropy",
    metric="f1",
    generate=True,
)
